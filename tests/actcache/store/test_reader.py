import errno
import mmap
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from support.stored_arrays import N_ROWS, reader, values, write
from support.surroundings import address_space

from actcache.errors import CorruptShard
from actcache.format.arrays import ArraySpec
from actcache.format.paths import shard_key
from actcache.store.shard_file import ShardFile

WIDE = ArraySpec(path="blocks.0.hook_resid_post/acts", dtype="float32", width=2048, chunk_rows=256)  # 2 MB a chunk


def test_we_read_what_we_write(written):
    store, array, codec_name, x, records = written
    ours = reader(store, array, codec_name, records)
    assert np.array_equal(ours.read(0, N_ROWS), x)
    for start, stop in ((0, 1), (31, 33), (255, 257), (500, 600), (600, 600)):
        assert np.array_equal(ours.read(start, stop), x[start:stop])
    with pytest.raises(ValueError, match="got 0 to 601"):
        ours.read(0, N_ROWS + 1)


def test_rows_that_do_not_fit_are_refused_before_their_memory_is_taken(tmp_path):
    ours = reader(tmp_path, WIDE, "raw", write(tmp_path, WIDE, "raw", values(WIDE)))
    with address_space(250 << 20), pytest.raises(MemoryError, match=r"^25,600 rows of .*/acts may take 0\.28 GB$"):
        ours.empty(100)


@pytest.mark.parametrize("offset", [0, 5, 150, -1, -5, -20])
def test_a_flipped_bit_is_an_error_that_names_the_file(written, offset):
    store, array, codec_name, _x, records = written
    path = store / "train" / shard_key(array, 1)
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard, match=str(path)) as raised:
        reader(store, array, codec_name, records).read(0, N_ROWS)
    assert raised.value.path == path


def test_a_damaged_chunk_is_told_in_facts(written):
    store, array, codec_name, _x, records = written
    path = store / "train" / shard_key(array, 1)
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard) as raised:
        reader(store, array, codec_name, records).read(0, N_ROWS)
    facts, rows = raised.value, (256, 256 + array.chunk_rows)
    assert (facts.path, facts.chunk, facts.rows) == (path, 0, rows)
    assert facts.what == "does not match its checksum in the manifest"
    assert str(facts) == f"{path}: chunk 0 (rows {rows[0]} to {rows[1]}): {facts.what}; {facts.way_out}"
    assert str(pickle.loads(pickle.dumps(facts))) == str(facts)
    assert vars(pickle.loads(pickle.dumps(facts))) == vars(facts)


@pytest.mark.parametrize("byte", [-1, -4])
def test_every_byte_of_a_chunk_counts_also_those_that_only_other_readers_read(written, byte):
    """The last four bytes of a compressed chunk are its CRC-32C, which zarr-python holds against the others."""
    store, array, codec_name, _x, records = written
    path = store / "train" / shard_key(array, 0)
    stored = ShardFile(path, 256 // array.chunk_rows).chunk(0)
    damaged = bytearray(path.read_bytes())
    damaged[len(stored) + byte] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard, match=r"chunk 0 \(rows 0 to \d+\): does not match"):
        reader(store, array, codec_name, records).read(0, 1)


def test_missing_and_truncated_shards_are_errors(written):
    store, array, codec_name, _, records = written
    path = store / "train" / shard_key(array, 2)
    whole = path.read_bytes()
    for content, message in ((whole[:-1], f"must be {len(whole)} bytes long"), (b"", "bytes long"), (None, "missing")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CorruptShard, match=message):
            reader(store, array, codec_name, records).read(512, 513)


def read_without_memory(ours, x):
    """In a forked child with a full address space: what reading gives, and whether it is right when there is room."""
    buffer, room = ours.empty(1), []
    ours.decode_into(0, buffer)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (n_pages * mmap.PAGESIZE, resource.RLIM_INFINITY))
    for n_bytes in (1 << 20, 1 << 16, 1 << 12):
        try:
            while True:
                room.append(bytearray(n_bytes))
        except MemoryError:
            pass
    try:
        ours.decode_into(0, buffer)
        said = "was read"
    except (OSError, CorruptShard) as error:
        said = error
    room.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said, np.array_equal(ours.read(0, N_ROWS), x)


def test_memory_that_blosc_does_not_get_is_no_damage(tmp_path):
    x = values(WIDE)
    ours = reader(tmp_path, WIDE, "lossless", write(tmp_path, WIDE, "lossless", x))
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        said, same = read_without_memory(ours, x)
        os.write(tell, f"{type(said).__name__} {getattr(said, 'errno', '')} {same} {said}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with open(told, "rb") as pipe:
        found = pipe.read().decode()
    assert found.startswith(f"OSError {errno.ENOMEM} True [Errno {errno.ENOMEM}] no "), found
    assert "`ulimit -v`" in found
    assert found.endswith(f": '{tmp_path / 'train' / shard_key(WIDE, 0)}'")
