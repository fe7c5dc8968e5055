"""`ArrayReader` and `HookReader`: rows read from memory-mapped shard files.

Sizes and checksums are checked before bytes are used. Threads may share a reader, and so may forked processes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from actcache.errors import CorruptShard
from actcache.files import name_
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import Codec, values
from actcache.format.dtypes import tensor_view
from actcache.format.records import ArrayRecord, HookSpec
from actcache.machine.limits import require_memory_for_array
from actcache.store.kept import CacheFiles
from actcache.store.mapped_shards import MappedShards


class ArrayReader:
    """One sharded array of a split as a sequence of chunks. Chunk c begins with row c * chunk_rows of the split.

    It can be pickled; the process that gets it maps the files for itself.
    """

    def __init__(
        self,
        files: CacheFiles,
        array: ArraySpec,
        codec: Codec,
        records: Sequence[ArrayRecord],
        *,
        n_rows: int,
        shard_rows: int,
    ):
        """Nothing is opened before it is read.

        Args:
            files: those of the split, below acts.zarr.
            array: path, dtype, width and chunk size of the array.
            codec: the codec of the cache.
            records: the record of each shard file, in order.
            n_rows: rows of the array.
            shard_rows: rows of each shard but the last.
        """
        self.array, self.n_rows = array, n_rows
        self.n_chunks = -(-n_rows // array.chunk_rows)
        self.records = records
        self._files, self._codec, self._chunks_per_shard = files, codec, shard_rows // array.chunk_rows
        self._shards = MappedShards(files, array, records, self._chunks_per_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        shard_rows = self._chunks_per_shard * self.array.chunk_rows
        rebuilt = partial(ArrayReader, n_rows=self.n_rows, shard_rows=shard_rows)  # it maps the files anew
        return rebuilt, (self._files.absolute(), self.array, self._codec, self.records)

    def rows_of(self, chunk: int) -> int:
        """How many rows a chunk holds; only the last chunk may hold fewer than chunk_rows."""
        return min(self.array.chunk_rows, self.n_rows - chunk * self.array.chunk_rows)

    def empty(self, n_chunks: int) -> Shaped[np.ndarray, "row ..."]:
        """An uninitialised buffer for the stored elements of `n_chunks` whole chunks. Raises MemoryError."""
        shape, dtype = (n_chunks * self.array.chunk_rows, *self.array.row_shape), np.dtype(self.array.storage_dtype)
        require_memory_for_array(math.prod(shape) * dtype.itemsize, f"{shape[0]:,} rows of {self.array.path}")
        return np.empty(shape, dtype=dtype)

    def will_need(self, chunk: int) -> None:
        """Tell the kernel to read a chunk's bytes from disk soon; returns at once."""
        shard, number = divmod(chunk, self._chunks_per_shard)
        self._shards[shard].advise(number, mmap.MADV_WILLNEED)

    def decode_into(self, chunk: int, out: Shaped[np.ndarray, "chunk_rows ..."]) -> None:
        """Decode a chunk into `out`, which has chunk_rows rows.

        Raises CorruptShard, naming file, chunk and rows, or OSError if the file cannot be read.
        """
        with self.verified(chunk) as stored:
            self._codec.decode_into(stored, out)

    def scatter_into(
        self,
        chunk: int,
        target_rows: Int64[np.ndarray, " chunk_rows"],
        out: Shaped[np.ndarray, "row ..."],
        buffer: Shaped[np.ndarray, "chunk_rows ..."],
    ) -> None:
        """Decode a chunk and scatter its rows over `out`.

        Args:
            chunk: number of the chunk.
            target_rows: row j of the chunk is written to out[target_rows[j]].
            out: any number of rows.
            buffer: the chunk is decoded into it first; plain bytes are scattered straight from the file instead.

        Raises:
            CorruptShard: the chunk is damaged; the error names file, chunk and rows.
            OSError: the file cannot be read.
        """
        with self.verified(chunk) as stored:
            scatter(self._codec.decoded(stored, buffer), target_rows, out)

    @contextmanager
    def verified(self, chunk: int) -> Iterator[memoryview]:
        """The stored bytes of a chunk after their checksum was found to match.

        They are valid inside the `with` alone.
        """
        shard, number = divmod(chunk, self._chunks_per_shard)
        file = self._shards[shard]
        stored = file.chunk(number)
        if stored is None or not self._codec.is_sound(stored, self.records[shard].checksums[number]):
            raise self._damage(file.path, chunk, "does not match its checksum in the manifest")
        try:
            yield stored
        except CorruptShard as error:
            raise self._damage(file.path, chunk, error.what) from error
        except OSError as error:
            name_(error, file.path)
            raise
        del stored  # the view would keep the map from being closed
        file.advise(number, mmap.MADV_DONTNEED)

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row ..."]:
        """Rows [start, stop) as stored elements, in new memory. Raises ValueError for a wrong range, CorruptShard."""
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"read: need 0 <= start <= stop <= {self.n_rows}, got {start} to {stop}")
        chunk_rows = self.array.chunk_rows
        first, last = start // chunk_rows, -(-stop // chunk_rows)
        buffer = self.empty(last - first)
        for chunk in range(first, last):
            self.decode_into(chunk, buffer[(chunk - first) * chunk_rows : (chunk - first + 1) * chunk_rows])
        return buffer[start - first * chunk_rows : stop - first * chunk_rows]

    def _damage(self, path: Path, chunk: int, what: str) -> CorruptShard:
        """The error for a damaged chunk. Raises CacheMismatch if another cache has taken the place of this one."""
        self._files.refuse_another()
        start = chunk * self.array.chunk_rows
        return CorruptShard(
            what,
            path=path,
            chunk=chunk % self._chunks_per_shard,
            rows=(start, start + self.rows_of(chunk)),
            way_out="run `actcache verify` to see what else is damaged",
        )


class HookReader:
    """The rows of one hook, stored in one array, `acts`, or in two, `q8` and `scale`.

    A buffer for rows is a tuple of parts, one for each array. `values` turns the parts of some rows into activations.
    """

    def __init__(self, hook: HookSpec, arrays: Sequence[ArrayReader]):
        self.hook, self.arrays = hook, tuple(arrays)
        first = self.arrays[0]
        self.n_rows, self.n_chunks, self.chunk_rows = first.n_rows, first.n_chunks, first.array.chunk_rows
        self.rows_of = first.rows_of

    def empty(self, n_chunks: int) -> tuple[Shaped[np.ndarray, "row _"], ...]:
        """An uninitialised buffer for `n_chunks` whole chunks."""
        return tuple(array.empty(n_chunks) for array in self.arrays)

    def will_need(self, chunk: int) -> None:
        """Tell the kernel to read a chunk's bytes from disk soon; returns at once."""
        for array in self.arrays:
            array.will_need(chunk)

    def decode_into(self, chunk: int, parts: Sequence[Shaped[np.ndarray, "chunk_rows _"]]) -> None:
        """Decode a chunk into the parts, each of which has chunk_rows rows. Raises CorruptShard."""
        for array, part in zip(self.arrays, parts, strict=True):
            array.decode_into(chunk, part)

    def scatter_into(
        self,
        chunk: int,
        target_rows: Int64[np.ndarray, " chunk_rows"],
        parts: Sequence[Shaped[np.ndarray, "row _"]],
        buffers: Sequence[Shaped[np.ndarray, "chunk_rows _"]],
    ) -> None:
        """Decode a chunk and write its row j to row target_rows[j] of every part.

        Args:
            chunk: number of the chunk.
            target_rows: a row of the parts for each row of the chunk.
            parts: one array of rows for each array of the hook.
            buffers: one array for each array of the hook, in which the chunk is decoded first.

        Raises:
            CorruptShard: the chunk is damaged.
        """
        for array, part, buffer in zip(self.arrays, parts, buffers, strict=True):
            array.scatter_into(chunk, target_rows, part, buffer)

    def tensors(self, parts: Sequence[Shaped[np.ndarray, "row _"]]) -> tuple[Tensor, ...]:
        """The parts as torch tensors of their logical dtypes; they share the memory of the parts."""
        return tuple(tensor_view(part, array.array.dtype) for array, part in zip(self.arrays, parts, strict=True))

    def values(self, tensors: Sequence[Tensor]) -> Float[Tensor, "row d_in"]:
        """The activations in the hook's dtype, on the device of the tensors."""
        return values(tensors, self.hook.dtype)

    def read(self, start: int, stop: int) -> Float[Tensor, "row d_in"]:
        """The activations of rows [start, stop) in the hook's dtype.

        Raises ValueError for a wrong range, CorruptShard.
        """
        return self.values(self.tensors(self.read_stored(start, stop)))

    def read_stored(self, start: int, stop: int) -> tuple[Shaped[np.ndarray, "row _"], ...]:
        """Rows [start, stop) as stored elements, a part for each array.

        Raises ValueError for a wrong range, CorruptShard.
        """
        return tuple(array.read(start, stop) for array in self.arrays)


def scatter(
    rows: Shaped[np.ndarray, "n ..."], target_rows: Int64[np.ndarray, " n"], out: Shaped[np.ndarray, "m ..."]
) -> None:
    """Do out[target_rows] = rows, for C-contiguous arrays.

    np.put of whole rows takes a third less time than the assignment, and other threads run meanwhile.
    """
    row = np.dtype((np.void, rows.nbytes // len(rows)))
    np.put(out.reshape(len(out), -1).view(row), target_rows, rows.reshape(len(rows), -1).view(row), mode="clip")
