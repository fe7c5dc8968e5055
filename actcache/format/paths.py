"""Where the files of a cache lie: paths below the cache, the store acts.zarr, or a split."""

from __future__ import annotations

from actcache.format.arrays import ArraySpec

STORE = "acts.zarr"
PLAN = "manifest/plan.json"
CACHE_MANIFEST = "manifest/cache.json"
ORIGIN = "log/origin.json"
MANIFEST = "manifest"
KEPT = "kept"
EXCLUSIVE_LOCK = "manifest/settling.lock"


def shard_key(array: ArraySpec, index: int) -> str:
    """Path of a shard's file below its split, in Zarr's default chunk key encoding."""
    return f"{array.path}/c/{index}" + ("" if array.width is None else "/0")


def partials_key(split: str, index: int, hook_name: str) -> str:
    """Path, below the cache, of the partial statistics of one hook in one shard."""
    return f"manifest/partials/{split}-{index:06d}-{hook_name}.safetensors"


def statistics_key(split: str, hook_name: str) -> str:
    """Path of a hook's statistics below the cache."""
    return f"stats/{split}/{hook_name}.json"
