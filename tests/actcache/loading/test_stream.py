"""Two groups of chunks in memory: what is read when, into which memory, and by whose threads."""

import itertools
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from support.tiny_caches import HOOKS

from actcache.errors import CorruptShard
from actcache.loading.buffers import BufferPool, HostBuffers
from actcache.loading.loader import Loader
from actcache.store.cache import open_cache
from actcache.store.reader import ArrayReader


def rows(batches) -> list[int]:
    return [row for batch in batches for row in batch.row.tolist()]


def chunk_reads(monkeypatch) -> list[tuple[str, int]]:
    """A list that grows by (array, chunk) for every chunk that is decoded."""
    seen: list[tuple[str, int]] = []
    verified = ArrayReader.verified

    def noted(self, chunk):
        seen.append((self.array.path, chunk))
        return verified(self, chunk)

    monkeypatch.setattr(ArrayReader, "verified", noted)
    return seen


def test_every_chunk_is_decoded_once_an_epoch(tiny_cache, monkeypatch):
    seen = chunk_reads(monkeypatch)
    rows(Loader(tiny_cache, HOOKS[:2], batch_tokens=100, group_chunks=5))
    reader = tiny_cache.hook_reader("train", HOOKS[0])
    expected = [(f"{hook}/acts", chunk) for hook in HOOKS[:2] for chunk in range(reader.n_chunks)]
    assert sorted(read for read in seen if read[0].endswith("acts")) == sorted(expected)


def test_a_resumed_loader_reads_nothing_of_what_came_before(tiny_cache, monkeypatch):
    settings = {"batch_tokens": 100, "group_chunks": 5, "epochs": 3}
    n_steps = Loader(tiny_cache, HOOKS[0], **settings).n_steps
    seen = chunk_reads(monkeypatch)
    rows(Loader(tiny_cache, HOOKS[0], start_step=n_steps - 1, **settings))
    assert sum(path.endswith("acts") for path, _ in seen) <= 2 * 5


def test_a_limit_is_not_read_past(tiny_cache, monkeypatch):
    seen = chunk_reads(monkeypatch)
    rows(Loader(tiny_cache, HOOKS[0], batch_tokens=100, group_chunks=2, limit=100))
    assert sum(path.endswith("acts") for path, _ in seen) == 2


@pytest.mark.parametrize("profile", ["lossless", "raw", "float32"])
def test_a_batch_is_a_part_of_its_group_whose_memory_serves_again(caches, profile, monkeypatch):
    """Three groups take turns: one decodes, one is served, and of one the caller still has the last batch."""
    made, acquire = set(), BufferPool.acquire
    whole: dict[int, range] = {}

    def noted(pool, n_rows=None):
        rows = acquire(pool, n_rows)
        made.add(rows.ctypes.data)
        whole[rows.ctypes.data] = range(rows.ctypes.data, rows.ctypes.data + rows.nbytes)
        return rows

    monkeypatch.setattr(BufferPool, "acquire", noted)
    inside = 0
    with Loader(caches[profile], HOOKS[0], batch_tokens=16, group_chunks=2, epochs=3) as loader:
        for batch in loader:
            inside += any(batch.x[HOOKS[0]].data_ptr() in memory for memory in whole.values())
    assert len(made) == 3
    assert inside > 0.7 * loader.n_steps


def test_the_next_group_decodes_while_one_is_served(tiny_cache, monkeypatch):
    seen = chunk_reads(monkeypatch)
    with Loader(tiny_cache, HOOKS[0], batch_tokens=100, group_chunks=2) as loader:
        next(iter(loader))
        deadline = time.monotonic() + 60
        while sum(path.endswith("acts") for path, _ in seen) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_groups_are_all_that_is_ever_made(tiny_cache, monkeypatch):
    made = []
    new_group = HostBuffers.new_group
    monkeypatch.setattr(HostBuffers, "new_group", lambda buffers: made.append(buffers) or new_group(buffers))
    rows(Loader(tiny_cache, HOOKS[:2], batch_tokens=100, group_chunks=2, epochs=2))
    assert len(made) == 2 * 2
    rows(Loader(tiny_cache, HOOKS[0], batch_tokens=100))
    assert len(made) == 2 * 2 + 1, "one group is the whole cache"


def test_a_forked_child_goes_on_with_threads_of_its_own(tiny_cache):
    settings = {"batch_tokens": 500, "group_chunks": 5}
    expected = rows(Loader(tiny_cache, HOOKS[0], **settings))
    loader = iter(Loader(tiny_cache, HOOKS[0], **settings))
    first = rows(itertools.islice(loader, 2))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no exception may leave this block
        served = b"failed"
        signal.alarm(60)  # rather than for ever
        try:
            served = np.array(rows(loader)).tobytes()
        finally:
            os.write(writing, len(served).to_bytes(8, "little") + served)
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        served = pipe.read()[8:]
    os.waitpid(child, 0)
    assert first + np.frombuffer(served, dtype=np.int64).tolist() == expected
    assert first + rows(loader) == expected, "the parent goes on too"


def test_damage_is_an_error_at_the_batch_that_needs_it_again_and_again(tiny_cache, tmp_path):
    cache = open_cache(shutil.copytree(tiny_cache.path, tmp_path / "c"))
    path = tmp_path / "c" / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c" / "2" / "0"
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    with Loader(cache, HOOKS[0], batch_tokens=256, group_chunks=1) as loader:
        batches = iter(loader)
        for _ in range(2):
            with pytest.raises(CorruptShard, match=r"chunk 0 \(rows 1024 to 1536\)"):
                rows(batches)
        assert batches.step < loader.n_steps - 1
    with pytest.raises(CorruptShard, match="rows 1024 to 1536"):
        Loader(cache, HOOKS[0], max_norm_ratio=2.0)


def test_closing_early_stops_the_threads(tiny_cache):
    before = set(threading.enumerate())
    with Loader(tiny_cache, HOOKS[0], batch_tokens=10) as loader:
        next(iter(loader))
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
