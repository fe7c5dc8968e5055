"""Our shards against zarr-python and tensorstore, in both directions."""

import errno
import mmap
import os
import re

import numpy as np
import pytest
import tensorstore
import zarr
from support.stored_arrays import ARRAYS, N_ROWS, SHARD_ROWS, values, write
from support.surroundings import ERRNOS, FailingCalls, outcome

from actcache.errors import CorruptShard
from actcache.format.codecs import codec
from actcache.format.paths import shard_key
from actcache.store.shard_file import ShardFile, chunk_slices
from actcache.store.zarr_metadata import write_metadata


def test_zarr_and_tensorstore_read_what_we_write(written):
    store, array, _, x, _ = written
    assert np.array_equal(zarr.open_array(store / "train" / array.path, mode="r")[:], x)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "train" / array.path)}}
    assert np.array_equal(tensorstore.open(spec, read=True).result().read().result(), x)


def test_we_read_what_zarr_writes_in_our_layout(written, tmp_path_factory):
    """zarr-python orders chunks its own way and leaves chunks of zeros out unless told not to."""
    _ours, array, codec_name, x, _records = written
    theirs = tmp_path_factory.mktemp("zarr")
    write_metadata(theirs, {}, {f"train/{array.path}": (array, N_ROWS, SHARD_ROWS)}, codec(codec_name))
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(theirs / "train" / array.path, mode="r+")[:] = x
    for index in range(3):
        n_chunks = SHARD_ROWS // array.chunk_rows
        shard = ShardFile(theirs / "train" / shard_key(array, index), n_chunks)
        buffer = np.empty((array.chunk_rows, *array.row_shape), dtype=array.storage_dtype)
        for number, rows in enumerate(chunk_slices(array, min(SHARD_ROWS, N_ROWS - index * SHARD_ROWS))):
            stored = shard.chunk(number)
            codec(codec_name).decode_into(stored, buffer)
            first = index * SHARD_ROWS + rows.start
            assert np.array_equal(buffer[: rows.stop - rows.start], x[first : first + rows.stop - rows.start])


def test_raw_shards_are_the_plain_array(tmp_path):
    array = ARRAYS["bfloat16"]
    x = values(array)
    write(tmp_path, array, "raw", x)
    mapped = np.memmap(tmp_path / "train" / shard_key(array, 0), dtype=np.uint16, mode="r", shape=(SHARD_ROWS, 48))
    assert np.array_equal(mapped, x[:SHARD_ROWS])


@pytest.fixture
def shard(tmp_path):
    """The path of a shard of eight chunks, and the bytes of its first chunk."""
    x = values(ARRAYS["bfloat16"])
    write(tmp_path, ARRAYS["bfloat16"], "raw", x)
    return tmp_path / "train" / shard_key(ARRAYS["bfloat16"], 0), x[:32].tobytes()


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_what_the_surroundings_refuse_is_no_damage(shard, number):
    """Every call that opens, maps and reads a shard fails once; only advice may fail unheard."""
    path, first = shard
    read = lambda: bytes(ShardFile(path, 8).chunk(0))  # noqa: E731
    with FailingCalls(path)() as calls:
        assert read() == first
    told = []
    for call in range(calls.n_calls):
        with FailingCalls(path, call, number)() as calls:
            got = outcome(read)
        if calls.failed.startswith("madvise"):
            assert got == first
            continue
        assert (type(got), got.errno) == (type(OSError(number, "")), number), calls.failed
        assert re.fullmatch(rf"\[Errno {number}\] {os.strerror(number)}; [^:]+: '{path}'", str(got)), calls.failed
        told.append(calls.failed.split()[0])
    assert {"open", "fstat", "mmap", "size"} <= {*told}


def test_a_shard_that_is_cut_before_it_is_mapped_is_told(shard, monkeypatch):
    path, _ = shard
    real = mmap.mmap

    def cut_first(*arguments, **named):
        os.truncate(path, 0)
        return real(*arguments, **named)

    monkeypatch.setattr(mmap, "mmap", cut_first)
    with pytest.raises(CorruptShard, match=f"{path}: became shorter while it was opened"):
        ShardFile(path, 8)


def test_a_pipe_in_the_place_of_a_shard_does_not_wait(shard):
    path, _ = shard
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptShard, match="is missing, or no file") as raised:
        ShardFile(path, 8)
    assert (raised.value.path, raised.value.what) == (path, "is missing, or no file")


def test_damage_is_told_in_facts(shard):
    path, _ = shard
    with pytest.raises(CorruptShard) as raised:
        ShardFile(path, 8, n_bytes=7)
    facts = raised.value
    assert (facts.path, facts.chunk, facts.rows) == (path, None, None)
    assert facts.what == f"must be 7 bytes long, is {path.stat().st_size}"
    assert str(facts) == f"{path}: {facts.what}; {facts.way_out}"
