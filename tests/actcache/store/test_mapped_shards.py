"""The maps of all arrays together stay below the limit of descriptors, whoever asks for them."""

import errno
import gc
import mmap
import os
import pickle
import resource
import threading

import numpy as np
import pytest
from support.stored_arrays import ARRAYS, N_ROWS, reader, values, write
from support.surroundings import descriptors, open_descriptors

from actcache.store.mapped_shards import MOST_MAPPED, mapped_shards_budget

N_ARRAYS, N_SHARDS = 30, 3
ARRAY = ARRAYS["int32"]


@pytest.fixture
def stored(tmp_path):
    """Thirty arrays of three shards each, and what they hold."""
    x = values(ARRAY)
    records = [write(tmp_path / str(number), ARRAY, "raw", x) for number in range(N_ARRAYS)]
    return [reader(tmp_path / str(number), ARRAY, "raw", found) for number, found in enumerate(records)], x


def test_the_budget_follows_the_limit_of_descriptors():
    for limit in (16, 65, 256):
        with descriptors(limit):
            assert mapped_shards_budget() == limit // 2
    with descriptors(1):
        assert mapped_shards_budget() == 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with descriptors(hard):
        assert mapped_shards_budget() == (hard // 2 if 0 < hard < 2 * MOST_MAPPED else MOST_MAPPED)


def test_many_arrays_share_one_budget(stored):
    readers, x = stored
    gc.collect()
    before = open_descriptors()
    with descriptors(64):
        for each in [*readers, *readers]:
            assert np.array_equal(each.read(0, N_ROWS), x)
            assert open_descriptors() <= before + 32
    del each
    readers.clear()
    gc.collect()
    assert open_descriptors() == before, "an array that nobody reads keeps no map"


def test_what_is_used_stays_mapped(stored, monkeypatch):
    """The least recently used shard of any array goes first."""
    readers, _ = stored
    mapped = []
    real = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda *a, **k: mapped.append(os.readlink(f"/proc/self/fd/{a[0]}")) or real(*a, **k)
    )
    with descriptors(64):
        for each in readers:
            each.read(0, N_ROWS)
            readers[0].read(0, N_ROWS)
    assert len(mapped) == len({*mapped}) == N_ARRAYS * N_SHARDS


def test_descriptors_that_others_hold_make_it_keep_less(stored):
    readers, x = stored
    with descriptors(200):
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(200 - open_descriptors() - 8)]
        try:
            for each in readers:
                assert np.array_equal(each.read(0, N_ROWS), x)
        finally:
            for descriptor in others:
                os.close(descriptor)


def test_without_any_descriptor_left_it_says_what_it_is(stored, tmp_path):
    """More shards are in use at once than there are descriptors."""
    readers, x = stored
    with descriptors(64):
        held = []
        with pytest.raises(OSError, match=rf"ulimit -n.*{tmp_path}/\d+/train/{ARRAY.path}/c/\d'") as raised:
            held.extend(each._shards[index] for each in readers for index in range(N_SHARDS))
        assert (raised.value.errno, type(raised.value)) == (errno.EMFILE, OSError)
        assert len(held) > 20
        held.clear()
        assert np.array_equal(readers[-1].read(0, N_ROWS), x)


def test_memory_for_maps_that_runs_out_is_found_again(stored, monkeypatch):
    """No more than ten maps fit at once, for a reason that no limit tells."""
    readers, x = stored
    real = mmap.mmap
    gc.collect()
    before = open_descriptors()

    def scarce(*arguments, **named):
        if open_descriptors() > before + 11:  # the open file is one
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*arguments, **named)

    monkeypatch.setattr(mmap, "mmap", scarce)
    for each in readers:
        assert np.array_equal(each.read(0, N_ROWS), x)


def test_threads_share_it(stored):
    readers, x = stored
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, N_ARRAYS, 200).tolist():
            start = int(rng.integers(0, N_ROWS - 1))
            if not np.array_equal(readers[number].read(start, start + 1), x[start : start + 1]):
                wrong.append(number)

    before = open_descriptors()
    with descriptors(before + 40):
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_child_that_was_forked_while_a_thread_mapped_goes_on(stored):
    """The thread of the parent holds the lock at the moment of the fork, as far as the child can ever know."""
    from actcache.store import mapped_shards

    readers, x = stored
    readers[0].read(0, N_ROWS)
    with mapped_shards._lock:
        child = os.fork()
        if child == 0:
            same = all(np.array_equal(each.read(0, N_ROWS), x) for each in readers[:3])
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(readers[0].read(0, N_ROWS), x)


def test_another_process_maps_the_files_anew(stored):
    readers, x = stored
    readers[0].read(0, N_ROWS)
    assert np.array_equal(pickle.loads(pickle.dumps(readers[0])).read(0, N_ROWS), x)


def test_files_that_were_replaced_are_read_anew_by_a_new_reader(tmp_path):
    x = values(ARRAY)
    first = reader(tmp_path, ARRAY, "raw", write(tmp_path, ARRAY, "raw", x))
    first.read(0, N_ROWS)
    second = reader(tmp_path, ARRAY, "raw", write(tmp_path, ARRAY, "raw", x + 1))
    assert np.array_equal(second.read(0, N_ROWS), x + 1)
    assert np.array_equal(first.read(0, N_ROWS), x)
