"""The zarr.json files of a store, by which other Zarr readers find the arrays. zarr-python makes them in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from actcache.files import write_atomically
from actcache.format.arrays import ArraySpec
from actcache.format.bfloat16 import BFloat16
from actcache.format.codecs import Codec


def make_array(
    made: dict[str, Any],
    path: str,
    array: ArraySpec,
    codec: Codec,
    *,
    n_rows: int,
    shard_rows: int,
    native: bool = False,
) -> zarr.Array:
    """Have zarr-python make the metadata of one array, and of the groups above it, in memory.

    Args:
        made: path below the store -> buffer; `path + "/zarr.json"` is added to it.
        path: of the array, below the store.
        array: dtype, width and chunk size of the array.
        codec: the codec of its chunks.
        n_rows: rows of the array.
        shard_rows: rows of a whole shard.
        native: whether a bfloat16 array has data type "bfloat16" and fill value 0.0, or "uint16" and 0. The data type
            of every other array is the same either way.
    """
    as_bfloat16 = native and array.dtype == "bfloat16"
    return zarr.create_array(
        MemoryStore(made),
        name=path,
        shape=(n_rows, *array.row_shape),
        chunks=(array.chunk_rows, *array.row_shape),
        shards=(shard_rows, *array.row_shape),
        dtype=BFloat16() if as_bfloat16 else array.storage_dtype,
        filters=None,
        compressors=codec.zarr_compressors(np.dtype(array.storage_dtype).itemsize),
        fill_value=0.0 if as_bfloat16 else 0,
        attributes={"actcache": {"dtype": array.dtype}},
    )


def make_store(
    attributes: dict[str, Any], arrays: Mapping[str, tuple[ArraySpec, int, int]], codec: Codec, *, native: bool = False
) -> dict[str, Any]:
    """Have zarr-python make every zarr.json of a store in memory, where it cannot overwrite a shard.

    Args:
        attributes: attributes of the root group.
        arrays: path below the store -> (array, rows, rows of a shard).
        codec: the codec of every array.
        native: as for `make_array`.

    Returns:
        path below the store -> buffer.
    """
    made: dict[str, Any] = {}
    zarr.create_group(MemoryStore(made), attributes=attributes)
    for path, (array, n_rows, shard_rows) in arrays.items():
        make_array(made, path, array, codec, n_rows=n_rows, shard_rows=shard_rows, native=native)
    return made


def write_metadata(
    store: Path, attributes: dict[str, Any], arrays: Mapping[str, tuple[ArraySpec, int, int]], codec: Codec
) -> None:
    """Write every zarr.json that `make_store` makes. Other Zarr readers see the arrays from then on."""
    made = make_store(attributes, arrays, codec)
    for key in sorted(made, reverse=True):  # the root's zarr.json last
        write_atomically(store / key, [made[key].to_bytes()])
