"""The zarr.json files of a store, by which other Zarr readers find the arrays. zarr-python makes them in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from actcache.files import contents, write_atomically
from actcache.format.arrays import ArraySpec
from actcache.format.bfloat16 import BFloat16
from actcache.format.codecs import Codec
from actcache.format.seal import MALFORMED
from actcache.machine.limits import threads_that_fit

Arrays = Mapping[str, tuple[ArraySpec, int, int]]  # path below the store -> (array, rows, rows of a shard)


def memory_store(files: dict[str, Any]) -> MemoryStore:
    """Files in memory, path -> buffer, for zarr-python. Raises MemoryError if there is no room for zarr's thread."""
    threads_that_fit(1)
    return MemoryStore(files)


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
        memory_store(made),
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
    attributes: dict[str, Any], arrays: Arrays, codec: Codec, *, native: Collection[str] = ()
) -> dict[str, Any]:
    """Have zarr-python make every zarr.json of a store in memory, where it cannot overwrite a shard.

    Args:
        attributes: attributes of the root group.
        arrays: every array of the store.
        codec: the codec of every array.
        native: paths of the arrays that are native, as for `make_array`.

    Returns:
        path below the store -> buffer.
    """
    made: dict[str, Any] = {}
    zarr.create_group(memory_store(made), attributes=attributes)
    for path, (array, n_rows, shard_rows) in arrays.items():
        make_array(made, path, array, codec, n_rows=n_rows, shard_rows=shard_rows, native=path in native)
    return made


def native_arrays(store: Path, arrays: Arrays) -> frozenset[str]:
    """Paths of the bfloat16 arrays that are native, as `relabel` has left them.

    An array without a readable zarr.json, such as that of a new hook, is native if every other bfloat16 array is.

    Args:
        store: the folder of the store, which may be missing.
        arrays: every array that the store is to have.
    """
    said = {path: _data_type(store / path) for path, (array, _, _) in arrays.items() if array.dtype == "bfloat16"}
    of_others = "bfloat16" if {*said.values()} - {None} == {"bfloat16"} else "uint16"
    return frozenset(path for path, data_type in said.items() if (data_type or of_others) == "bfloat16")


def write_metadata(store: Path, attributes: dict[str, Any], arrays: Arrays, codec: Codec) -> None:
    """Write every zarr.json that `make_store` makes. Other Zarr readers see the arrays from then on."""
    made = make_store(attributes, arrays, codec, native=native_arrays(store, arrays))
    for key in sorted(made, reverse=True):  # the root's zarr.json last
        write_atomically(store / key, [made[key].to_bytes()])


def _data_type(node: Path) -> str | None:
    """The data type that the zarr.json of an array gives; None if there is no such file or it cannot be understood."""
    try:
        said = json.loads(contents(node / "zarr.json"))["data_type"]
    except (FileNotFoundError, *MALFORMED):
        return None
    return said if said in ("bfloat16", "uint16") else None
