"""One array in three shards, of every codec and dtype, written and read by ours."""

import numpy as np

from actcache.format.arrays import ArraySpec
from actcache.format.codecs import codec
from actcache.format.paths import shard_key
from actcache.store.kept import CacheFiles
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import chunk_slices, write_shard
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
    return ArrayReader(
        CacheFiles(root=store / "train"), array, codec(codec_name), records, n_rows=N_ROWS, shard_rows=SHARD_ROWS
    )
