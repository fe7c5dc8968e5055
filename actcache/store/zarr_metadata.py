"""Rows -> one Zarr v3 shard file; aside, fsync, rename. zarr-python writes only the metadata around it."""

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
    """Have zarr-python make the metadata of an array in memory: `made[path + "/zarr.json"]`, and its groups' beside it.

    native: bfloat16 is called that, with fill value 0.0, not uint16 with 0; every other dtype has one form.
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
    """Have zarr-python make every zarr.json of a store in memory, so that nothing of it can overwrite a shard.

    attributes: of the root group. arrays: path below the store -> (spec, rows, rows of a shard). Returns path below the
    store -> buffer. native: as for `make_array`.
    """
    made: dict[str, Any] = {}
    zarr.create_group(MemoryStore(made), attributes=attributes)
    for path, (array, n_rows, shard_rows) in arrays.items():
        make_array(made, path, array, codec, n_rows=n_rows, shard_rows=shard_rows, native=native)
    return made


def write_metadata(
    store: Path, attributes: dict[str, Any], arrays: Mapping[str, tuple[ArraySpec, int, int]], codec: Codec
) -> None:
    """Write every zarr.json of the store, as `make_store` makes them; only now do other Zarr readers see the arrays."""
    made = make_store(attributes, arrays, codec)
    for key in sorted(made, reverse=True):  # the root's zarr.json last
        write_atomically(store / key, [made[key].to_bytes()])
