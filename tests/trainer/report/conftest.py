"""Fixtures of the tests of the report. Nothing of actcache or trainer is imported here at module level."""

from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An evaluated run, one that is not evaluated, and a baseline."""
    from support.report_pages import make_runs

    return make_runs(tmp_path / "runs")
