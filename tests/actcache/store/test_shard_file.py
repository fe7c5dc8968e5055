"""Our shards against zarr-python and tensorstore, in both directions."""

import numpy as np
import tensorstore
import zarr
from support.stored_arrays import ARRAYS, N_ROWS, SHARD_ROWS, values, write

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
