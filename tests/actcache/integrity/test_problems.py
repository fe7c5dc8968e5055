import shutil

import pytest
import zarr
from support.tiny_caches import HOOKS

from actcache.integrity.problems import Problem, stored_arrays
from actcache.store.cache import open_cache

ACTS = f"{HOOKS[0]}/acts"


@pytest.fixture
def cache(tiny_cache, tmp_path):
    return open_cache(shutil.copytree(tiny_cache.path, tmp_path / "c"))


def of(cache, split, array):
    (found,) = [stored for stored in stored_arrays(cache) if (stored.split, stored.array.path) == (split, array)]
    return found


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ({}, "f: is gone"),
        ({"shard": 3}, "f: shard 3: is gone"),
        ({"shard": 3, "chunk": 1, "rows": (96, 128)}, "f: shard 3, chunk 1, rows 96 to 128: is gone"),
    ],
    ids=str,
)
def test_a_problem_is_one_line(where, line):
    assert str(Problem(path="f", message="is gone", **where)) == line


def test_every_array_and_file_of_the_store_is_looked_at(cache):
    """Against what zarr-python finds there, and the files on disk."""
    group = zarr.open_group(cache.path / "acts.zarr", mode="r")
    arrays = {path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    stored = stored_arrays(cache)
    assert {f"{each.split}/{each.array.path}" for each in stored} == arrays
    files = {path for path in (cache.path / "acts.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"}
    assert {each.path(shard) for each in stored for shard in range(each.n_shards)} == files
    for each in stored:
        covered = [row for shard in range(each.n_shards) for row in range(*each.rows(shard))]
        assert covered == list(range(group[f"{each.split}/{each.array.path}"].shape[0]))
        assert not any(problem for shard in range(each.n_shards) for problem in each.problems(shard))


def test_a_damaged_chunk_is_told_with_its_rows(cache):
    stored = of(cache, "train", ACTS)
    path = stored.path(1)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    problem, *others = stored.problems(1)
    assert (problem.path, problem.split, problem.array, problem.shard, problem.chunk) == (
        str(path),
        "train",
        ACTS,
        1,
        0,
    )
    chunk_rows = cache.manifest.chunk_rows
    assert problem.rows == (cache.manifest.shard_rows, cache.manifest.shard_rows + chunk_rows)
    assert "checksum" in problem.message
    assert not any(others)


def test_a_file_that_is_gone_is_one_problem_of_all_its_rows(cache):
    stored = of(cache, "validation", ACTS)
    n_chunks = len(list(stored.problems(0)))
    stored.path(0).unlink()
    problem, *others = of(cache, "validation", ACTS).problems(0)
    assert (problem.message, problem.rows, problem.chunk) == ("is missing, or no file", stored.rows(0), None)
    assert others == [None] * (n_chunks - 1), "as many as there are chunks, for whoever counts"


def test_what_is_said_is_whole(cache):
    """A path may hold what stands between the parts of a message."""
    root = cache.path.rename(cache.path.with_name("a: b; c"))
    stored = of(open_cache(root), "train", ACTS)
    path = stored.path(1)
    path.write_bytes(path.read_bytes()[:-1])
    problem = next(iter(stored.problems(1)))
    assert problem.message == f"must be {path.stat().st_size + 1} bytes long, is {path.stat().st_size}"
    assert problem.path == str(path)
