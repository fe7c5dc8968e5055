"""One shard file: the encoded chunks of one array in one shard, then an index.

`ShardFile` reads it, others write it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from actcache.errors import CorruptShard
from actcache.files import NoFile, name_, opened, write_atomically
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import CHECKSUM_BYTES, Codec, crc32c
from actcache.format.records import ArrayRecord

INDEX_ENTRY_BYTES = 16
EncodedChunk = tuple[bytes | memoryview, int]  # the stored bytes of a chunk, and their CRC-32C
ABSENT = np.iinfo(np.uint64).max  # offset and size of a chunk that a shard lacks (zarr v3, "binary shard format")


class ShardFile:
    """One shard file, mapped into memory. The index at its end says where each chunk lies (zarr v3 sharding codec).

    A disk that fails under a map (EIO) kills the process by a signal, SIGBUS, which Python cannot catch.
    """

    def __init__(self, path: Path, n_chunks: int, n_bytes: int | None = None):
        """Map the file and check its index.

        Args:
            path: the file.
            n_chunks: chunks of a whole shard, including those that this shard lacks.
            n_bytes: the size of the file; None if it is not known.

        Raises:
            CorruptShard: the file is missing or not `n_bytes` long, or its index does not match its checksum.
            OSError: it cannot be opened or mapped, which says nothing about its bytes.
        """
        self.path = path
        index_bytes = n_chunks * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
        try:
            with opened(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < index_bytes or (n_bytes is not None and size != n_bytes):
                    wanted = f"{n_bytes} bytes" if n_bytes is not None else f"at least {index_bytes} bytes"
                    raise CorruptShard(f"must be {wanted} long, is {size}", path=path, way_out="run `actcache verify`")
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except NoFile:
            way_out = "restore it, or run `actcache repair`"
            raise CorruptShard("is missing, or no file", path=path, way_out=way_out) from None
        except ValueError as error:  # from mmap
            raise CorruptShard("became shorter while it was opened", path=path, way_out="restore it") from error
        self._advise(mmap.MADV_RANDOM)  # with readahead the kernel reads three times as much as the chunks hold
        self._bytes = memoryview(self._map)
        index = self._bytes[size - index_bytes : size - CHECKSUM_BYTES]
        if crc32c(index) != int.from_bytes(self._bytes[size - CHECKSUM_BYTES :], "little"):
            what, way_out = "the checksum of the shard index does not match", "run `actcache repair`"
            raise CorruptShard(what, path=path, way_out=way_out)
        self._index = np.frombuffer(index, dtype="<u8").reshape(n_chunks, 2).copy()
        self._payload_bytes = size - index_bytes

    def chunk(self, number: int) -> memoryview | None:
        """The stored bytes of a chunk; None if the shard lacks it, which Zarr reads as the fill value.

        Raises CorruptShard if the chunk lies outside of the file, or if the file's size has changed since it was
        mapped; OSError if the size cannot be told.
        """
        try:
            n_bytes = self._map.size()
        except OSError as error:
            name_(error, self.path)
            raise
        if n_bytes != len(self._map):  # reading beyond the end of a shortened file kills the process (SIGBUS)
            what = f"was {len(self._map)} bytes long, is {n_bytes}"
            raise CorruptShard(what, path=self.path, way_out="restore it, or run `actcache repair`")
        offset, size = self._index[number].tolist()
        if offset == ABSENT and size == ABSENT:
            return None
        if offset + size > self._payload_bytes:
            what, way_out = "lies outside of the file", "run `actcache repair`"
            raise CorruptShard(what, path=self.path, chunk=number, way_out=way_out)
        return self._bytes[offset : offset + size]

    def advise(self, number: int, advice: int) -> None:
        """Advise the kernel about the pages of a chunk: MADV_WILLNEED before it is used, MADV_DONTNEED afterwards."""
        offset, size = self._index[number].tolist()
        if offset + size <= self._payload_bytes:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._advise(advice, start, offset + size - start)

    def _advise(self, advice: int, *span: int) -> None:
        try:  # noqa: SIM105, as this is done for every chunk
            self._map.madvise(advice, *span)
        except OSError:
            pass  # no byte depends on advice; memory that is locked cannot take it, for one


def chunk_slices(array: ArraySpec, n_rows: int) -> Iterator[slice]:
    """Which rows of a shard of `n_rows` rows each of its chunks holds, in order."""
    return (slice(start, min(start + array.chunk_rows, n_rows)) for start in range(0, n_rows, array.chunk_rows))


def encode_chunk(chunk: Shaped[np.ndarray, "row ..."], array: ArraySpec, codec: Codec) -> EncodedChunk:
    """(stored bytes, CRC-32C) of one chunk of a shard. A last chunk with too few rows is padded with zeros."""
    return codec.encode(_padded(chunk, array.chunk_rows))


def write_shard(
    path: Path, array: ArraySpec, codec: Codec, chunks: Iterable[Shaped[np.ndarray, "row ..."]], shard_rows: int
) -> ArrayRecord:
    """Encode the chunks of one shard and write its file.

    Args:
        path: the file to write.
        array: the array that the shard belongs to.
        codec: encodes the chunks.
        chunks: the rows of each chunk, in order.
        shard_rows: rows of a whole shard.

    Returns:
        size and checksums of the file.
    """
    return write_encoded_shard(path, array, (encode_chunk(chunk, array, codec) for chunk in chunks), shard_rows)


def write_encoded_shard(path: Path, array: ArraySpec, chunks: Iterable[EncodedChunk], shard_rows: int) -> ArrayRecord:
    """Write the file of one shard from its encoded chunks.

    The file holds the encoded chunks one after another, then (offset, size) of every chunk as little-endian uint64,
    then the CRC-32C of that index (zarr v3 sharding codec, index at the end).

    Args:
        path: the file to write.
        array: the array that the shard belongs to.
        chunks: (stored bytes, CRC-32C) of each chunk, in order.
        shard_rows: rows of a whole shard; the index has an entry for each of its chunks.

    Returns:
        size and checksums of the file.
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
