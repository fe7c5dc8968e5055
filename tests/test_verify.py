import json
import shutil

import pytest
from tiny_caches import HOOKS

from actcache.cache import open_cache
from actcache.errors import CorruptShard, ManifestError
from actcache.verify import verify


@pytest.fixture
def copied(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache.path, tmp_path / "c")


def test_a_sound_cache_has_no_problems(tiny_cache):
    seen = []
    report = verify(tiny_cache.path, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == ()
    assert report.n_rows == tiny_cache.n_rows("train") + tiny_cache.n_rows("validation")
    assert seen[-1] == (report.n_chunks, report.n_chunks)


def flip(path, offset):
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 8
    path.write_bytes(damaged)


def test_every_damaged_chunk_is_listed(copied):
    shards = [copied / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c" / str(i) / "0" for i in (0, 3)]
    for shard in shards:
        flip(shard, 30)
    flip(copied / "acts.zarr" / "validation" / "tokens" / "position" / "c" / "0", 20)
    problems = verify(copied).problems
    assert len(problems) == 3
    assert all(any(str(shard) in problem and "rows" in problem for problem in problems) for shard in shards)


def test_missing_and_truncated_shards_are_refused_at_once(copied):
    path = copied / "acts.zarr" / "train" / HOOKS[1] / "acts" / "c" / "1" / "0"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptShard, match=str(path)):
        open_cache(copied)
    path.unlink()
    with pytest.raises(CorruptShard, match="is missing"):
        open_cache(copied)
    assert any("is missing" in problem for problem in verify(copied).problems)


def test_damaged_statistics_metadata_and_sequences_are_listed(copied):
    flip(copied / "stats" / "train" / f"{HOOKS[0]}.json", 50)
    metadata = copied / "acts.zarr" / "train" / HOOKS[0] / "acts" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"shape"', '"shape_"'))
    flip(copied / "acts.zarr" / "train" / "sequences" / "id" / "c" / "0" / "0", 25)
    problems = " ".join(verify(copied).problems)
    for part in ("stats", "metadata cannot be read", "sequences/id"):
        assert part in problems


def test_swapped_shards_of_two_caches_are_found(copied, tiny_cache):
    """Two shards of one array, each sound by itself, in each other's place."""
    a, b = (copied / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c" / i / "0" for i in "01")
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1]), b.write_bytes(contents[0])
    assert verify(copied).problems


def test_a_damaged_manifest_and_a_mixed_identity_are_refused(copied):
    metadata = copied / "acts.zarr" / "zarr.json"
    values = json.loads(metadata.read_text())
    values["attributes"]["actcache"]["seed"] = 99
    metadata.write_text(json.dumps(values))
    with pytest.raises(ManifestError, match="another identity"):
        open_cache(copied)
    flip(copied / "manifest" / "cache.json", 200)
    with pytest.raises(ManifestError, match="checksum does not match"):
        open_cache(copied)
    with pytest.raises(ManifestError, match="checksum does not match"):
        verify(copied)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="not a cache"):
        open_cache(tmp_path)
    with pytest.raises(ManifestError, match="not a cache"):
        open_cache(tmp_path / "none")
