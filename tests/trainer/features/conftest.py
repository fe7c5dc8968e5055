"""Fixtures of the tests of features. Nothing of actcache or trainer is imported here at module level."""

import pytest


@pytest.fixture(scope="session")
def planted_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of planted rows, a few shards; do not change it."""
    from support.feature_cases import new_planted_cache

    return new_planted_cache(tmp_path_factory.mktemp("planted") / "c")
