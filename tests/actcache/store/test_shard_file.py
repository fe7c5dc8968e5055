"""Our shards against zarr-python and tensorstore, in both directions."""

import json

import numpy as np
import pytest
import tensorstore
import zarr

from actcache.errors import CorruptShard
from actcache.files import remove_leftovers, write_atomically
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import CODECS, codec
from actcache.format.paths import shard_key
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import ShardFile, chunk_slices, write_shard
from actcache.store.zarr_metadata import write_metadata

N_ROWS, SHARD_ROWS = 600, 256  # two whole shards and a partial tail whose last chunk is short
ARRAYS = {
    "bfloat16": ArraySpec(path="blocks.0.hook_resid_post/acts", dtype="bfloat16", width=48, chunk_rows=32),
    "float16": ArraySpec(path="blocks.0.hook_resid_post/acts", dtype="float16", width=33, chunk_rows=64),
    "float32": ArraySpec(path="blocks.0.hook_resid_post/acts", dtype="float32", width=7, chunk_rows=256),
    "int32": ArraySpec(path="tokens/id", dtype="int32", width=None, chunk_rows=128),
}


def values(array: ArraySpec) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(N_ROWS, *array.row_shape)) * 100
    x[32:96] = 0  # whole chunks of zeros must be stored too
    return (
        x.astype(np.float32).view(np.uint32).astype(array.storage_dtype)
        if array.dtype == "bfloat16"
        else x.astype(array.storage_dtype)
    )


def write(store, array, codec_name, x):
    records = []
    for index in range(3):
        rows = x[index * SHARD_ROWS : (index + 1) * SHARD_ROWS]
        chunks = (rows[s] for s in chunk_slices(array, len(rows)))
        path = store / "train" / shard_key(array, index)
        records.append(write_shard(path, array, codec(codec_name), chunks, SHARD_ROWS))
    write_metadata(store, {}, {f"train/{array.path}": (array, N_ROWS, SHARD_ROWS)}, codec(codec_name))
    return records


def reader(store, array, codec_name, records):
    return ArrayReader(store / "train", array, codec(codec_name), records, n_rows=N_ROWS, shard_rows=SHARD_ROWS)


@pytest.fixture(params=[(name, dtype) for name in CODECS for dtype in ARRAYS], ids=str)
def written(request, tmp_path):
    codec_name, dtype = request.param
    array = ARRAYS[dtype]
    x = values(array)
    return tmp_path, array, codec_name, x, write(tmp_path, array, codec_name, x)


def test_zarr_and_tensorstore_read_what_we_write(written):
    store, array, _, x, _ = written
    assert np.array_equal(zarr.open_array(store / "train" / array.path, mode="r")[:], x)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "train" / array.path)}}
    assert np.array_equal(tensorstore.open(spec, read=True).result().read().result(), x)


def test_we_read_what_we_write(written):
    store, array, codec_name, x, records = written
    ours = reader(store, array, codec_name, records)
    assert np.array_equal(ours.read(0, N_ROWS), x)
    for start, stop in ((0, 1), (31, 33), (255, 257), (500, 600), (600, 600)):
        assert np.array_equal(ours.read(start, stop), x[start:stop])
    with pytest.raises(ValueError, match="got 0 to 601"):
        ours.read(0, N_ROWS + 1)


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


def test_metadata_never_touches_shards(written):
    store, array, codec_name, x, records = written
    write_metadata(store, {"again": 1}, {f"train/{array.path}": (array, N_ROWS, SHARD_ROWS)}, codec(codec_name))
    assert np.array_equal(reader(store, array, codec_name, records).read(0, N_ROWS), x)
    assert json.loads((store / "zarr.json").read_text())["attributes"] == {"again": 1}


@pytest.mark.parametrize("offset", [0, 5, 150, -1, -5, -20])
def test_a_flipped_bit_is_an_error_that_names_the_file(written, offset):
    store, array, codec_name, _x, records = written
    path = store / "train" / shard_key(array, 1)
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard, match=str(path)):
        reader(store, array, codec_name, records).read(0, N_ROWS)


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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def parts():
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, parts())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_partials_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".0.abc.partial").write_bytes(b"torn")
    (tmp_path / "a" / "0").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["0"]
