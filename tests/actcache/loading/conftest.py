"""Fixtures of the loader's tests."""

import pytest
from support.tiny_caches import HOOKS, PROFILES, harvest_tiny


@pytest.fixture(scope="session")
def caches(tiny_model, tiny_texts, tiny_cache, tmp_path_factory):
    """A cache of each profile, of the same rows; do not change them."""
    out = tmp_path_factory.mktemp("profiles")
    others = {
        name: harvest_tiny(tiny_model, tiny_texts, out / name, hook_names=HOOKS[:2], **settings)
        for name, settings in PROFILES.items()
        if settings
    }
    return {"lossless": tiny_cache, **others}
