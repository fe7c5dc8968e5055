"""The manifest and all beside the shards are made from the journals alone, and come out as they were."""

import shutil
from dataclasses import replace

import pytest
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CorruptShard, ManifestError
from actcache.harvesting.finalise import finalise, finished_manifest
from actcache.store.journal import read_journals


def test_lines_in_any_order_give_the_manifest_of_the_cache(tiny_cache):
    records = read_journals(tiny_cache.path)
    plan = tiny_cache.manifest.plan
    assert finished_manifest(plan, records) == finished_manifest(plan, records[::-1]) == tiny_cache.manifest


@pytest.mark.parametrize("at", [0, 3, -1])
def test_a_missing_shard_is_named(tiny_cache, at):
    records = read_journals(tiny_cache.path)
    lost = records.pop(at)
    with pytest.raises(ManifestError, match=f"1 shards of {lost.split} are missing, the first is {lost.index}"):
        finished_manifest(tiny_cache.manifest.plan, records)


def test_a_shard_of_fewer_rows_than_planned_is_missing(tiny_cache):
    first, *others = read_journals(tiny_cache.path)
    with pytest.raises(ManifestError, match=f"1 shards of {first.split} are missing, the first is {first.index}"):
        finished_manifest(tiny_cache.manifest.plan, [replace(first, n_rows=first.n_rows - 1), *others])


def test_a_hook_that_some_shards_lack_is_left_out(tiny_model, tiny_texts, tmp_path):
    """As when a run that adds a hook is killed: what is there of it is not lost, and not served."""
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000, hook_names=HOOKS[:1])
    before = grown.manifest
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000, hook_names=HOOKS[2:])
    records = read_journals(tmp_path / "c")
    added = [record for record in records if {hook.hook_name for hook in record.hooks} == {HOOKS[2]}]
    some = [record for record in records if record not in added[1:]]
    assert len(added) > 1
    assert finished_manifest(before.plan, some) == before


def test_all_beside_the_shards_is_made_again_however_often(tiny_cache, tmp_path):
    root = shutil.copytree(tiny_cache.path, tmp_path / "c")
    (root / "manifest" / "cache.json").unlink()
    shutil.rmtree(root / "stats")
    for path in (root / "acts.zarr").rglob("zarr.json"):
        path.unlink()
    for _ in range(2):
        finalise(root, tiny_cache.manifest.plan, read_journals(root))
        assert promised_files(root) == promised_files(tiny_cache.path)


def test_damaged_partials_stop_it_before_the_manifest(tiny_cache, tmp_path):
    root = shutil.copytree(tiny_cache.path, tmp_path / "c")
    (root / "manifest" / "cache.json").unlink()
    path = next((root / "manifest" / "partials").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptShard, match=path.name):
        finalise(root, tiny_cache.manifest.plan, read_journals(root))
    assert not (root / "manifest" / "cache.json").exists()
