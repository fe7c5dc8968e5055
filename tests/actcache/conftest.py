"""Fixtures of several rooms: caches of small chunks, to be damaged.

actcache is imported in the fixtures: its shapes are checked only from then on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest


def _patch_small_chunks(setattr: Callable[[str, int], None]) -> None:
    from support.tiny_models import D_MODEL

    setattr("actcache.format.arrays.MAX_CHUNK_BYTES", 32 * 2 * D_MODEL)
    setattr("actcache.format.arrays.SEQUENCE_SHARD_TOKENS", 16 * 16)


@pytest.fixture(scope="module")
def small_chunks():
    """Several chunks in a shard, and several shards of sequences; for whoever makes or reads such caches."""
    with pytest.MonkeyPatch.context() as patch:
        _patch_small_chunks(patch.setattr)
        yield


@pytest.fixture(scope="session")
def sound(tiny_model, tiny_texts, tmp_path_factory):
    """codec -> a cache of small chunks; do not change them."""
    from support.repairs import SETTINGS
    from support.tiny_caches import harvest_tiny

    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        _patch_small_chunks(patch.setattr)
        return {
            codec: harvest_tiny(tiny_model, tiny_texts, folder / codec, codec=codec, **SETTINGS).path
            for codec in ("lossless", "raw", "int8")
        }


@pytest.fixture
def copied(sound, tmp_path):
    return shutil.copytree(sound["lossless"], tmp_path / "c")
