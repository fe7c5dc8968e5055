"""Fixtures of the harvest's tests."""

import pytest
from support.tiny_caches import TOKENS, harvest_tiny


@pytest.fixture(scope="session")
def whole(tiny_model, tiny_texts, tmp_path_factory):
    """The cache that every other way to its rows must come to, byte for byte; do not change it."""
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("whole") / "c", tokens=TOKENS)
