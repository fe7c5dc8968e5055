"""Rows -> one Zarr v3 shard file; aside, fsync, rename. zarr-python writes only the metadata around it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.storage import MemoryStore

from actcache.format.bfloat16 import BFloat16
from actcache.format.codecs import Codec, crc32c
from actcache.format.manifest import ArrayRecord, ArraySpec

EncodedChunk = tuple[bytes | memoryview, int]  # what is stored of a chunk, and its checksum

PARTIAL_SUFFIX = ".partial"
ABSENT = np.iinfo(np.uint64).max  # offset and size of a chunk that a shard lacks (zarr v3, "binary shard format")


def sync_folder(folder: Path) -> None:
    """Make renames within the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, durably."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the file's name, which write and fsync leave out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts aside, fsync, rename over `path`, fsync its folder; returns the bytes written.

    Whoever looks sees the old file or the whole new one. A failing write or fsync (OSError) leaves the old one.
    """
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with naming(path), open(aside, "wb") as file:
            n_bytes = sum(file.write(part) for part in parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return n_bytes


def remove_partials(root: Path) -> None:
    """Delete what killed writers left aside below `root`; only the holder of the lock may."""
    for path in root.rglob(f".*{PARTIAL_SUFFIX}"):
        path.unlink()


def chunk_slices(array: ArraySpec, n_rows: int) -> Iterator[slice]:
    """The rows of each inner chunk of a shard of `n_rows` rows, in order."""
    return (slice(start, min(start + array.chunk_rows, n_rows)) for start in range(0, n_rows, array.chunk_rows))


def encode_chunk(chunk: Shaped[np.ndarray, "row ..."], array: ArraySpec, codec: Codec) -> EncodedChunk:
    """(stored bytes, checksum) of one chunk of a shard; a short last one is padded with zeros."""
    return codec.encode(_padded(chunk, array.chunk_rows))


def write_shard(
    path: Path, array: ArraySpec, codec: Codec, chunks: Iterable[Shaped[np.ndarray, "row ..."]], shard_rows: int
) -> ArrayRecord:
    """Encode the chunks of a shard of `shard_rows` rows, given in order, and write it."""
    return write_encoded_shard(path, array, (encode_chunk(chunk, array, codec) for chunk in chunks), shard_rows)


def write_encoded_shard(path: Path, array: ArraySpec, chunks: Iterable[EncodedChunk], shard_rows: int) -> ArrayRecord:
    """Write one shard of `shard_rows` rows from its encoded chunks, given in order.

    Layout (zarr v3 sharding codec, index at the end): the encoded chunks back to back, then (offset, size) of every
    chunk as little-endian uint64, then the CRC-32C of that index.
    """
    checksums: list[int] = []
    index = np.full((shard_rows // array.chunk_rows, 2), ABSENT, dtype="<u8")

    def parts() -> Iterator[bytes | memoryview]:
        offset = 0
        for number, (stored, checksum) in enumerate(chunks):
            index[number] = offset, len(stored)
            offset += len(stored)
            checksums.append(checksum)
            yield stored
        yield index.tobytes()
        yield crc32c(index.tobytes()).to_bytes(4, "little")

    n_bytes = write_atomically(path, parts())
    return ArrayRecord(n_bytes=n_bytes, checksums=tuple(checksums))


def _padded(chunk: np.ndarray, chunk_rows: int) -> np.ndarray:
    if len(chunk) == chunk_rows:
        return np.ascontiguousarray(chunk)
    whole = np.zeros((chunk_rows, *chunk.shape[1:]), dtype=chunk.dtype)
    whole[: len(chunk)] = chunk
    return whole


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
