"""Where files lie is part of the format: caches of years ago must be found."""

from actcache.format import paths
from actcache.format.arrays import ArraySpec

HOOK = "blocks.1.hook_resid_post"


def test_places_are_frozen():
    names = ("STORE", "PLAN", "CACHE_MANIFEST", "ORIGIN", "MANIFEST", "EXCLUSIVE_LOCK")
    assert {name: getattr(paths, name) for name in names} == {
        "STORE": "acts.zarr",
        "PLAN": "manifest/plan.json",
        "CACHE_MANIFEST": "manifest/cache.json",
        "ORIGIN": "log/origin.json",
        "MANIFEST": "manifest",
        "EXCLUSIVE_LOCK": "manifest/settling.lock",
    }
    assert paths.partials_key("train", 7, HOOK) == f"manifest/partials/train-000007-{HOOK}.safetensors"
    assert paths.statistics_key("validation", HOOK) == f"stats/validation/{HOOK}.json"


def test_shards_lie_where_zarr_looks_for_them():
    """The default chunk key encoding of zarr v3: c, then the chunk's number along each axis."""
    wide = ArraySpec(path=f"{HOOK}/acts", dtype="bfloat16", width=8, chunk_rows=32)
    flat = ArraySpec(path="tokens/id", dtype="int32", width=None, chunk_rows=32)
    assert paths.shard_key(wide, 12) == f"{HOOK}/acts/c/12/0"
    assert paths.shard_key(flat, 12) == "tokens/id/c/12"


def test_a_real_cache_has_them(tiny_cache):
    """Every file of a cache that was harvested lies at one of these places."""
    manifest = tiny_cache.manifest
    for split, shards in manifest.shards.items():
        for shard in shards:
            for hook in manifest.hooks:
                key = paths.partials_key(split, shard.index, hook.hook_name)
                assert key in shard.partials
                assert (tiny_cache.path / key).is_file()
                assert (tiny_cache.path / paths.statistics_key(split, hook.hook_name)).is_file()
    for name in (paths.PLAN, paths.CACHE_MANIFEST, paths.ORIGIN, paths.EXCLUSIVE_LOCK, f"{paths.STORE}/zarr.json"):
        assert (tiny_cache.path / name).is_file()
