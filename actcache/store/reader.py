"""Memory-mapped shard -> rows. Sizes and checksums are checked before use; safe to share between threads."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from actcache.errors import CorruptShard
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import Codec, values
from actcache.format.dtypes import tensor_view
from actcache.format.paths import shard_key
from actcache.format.records import ArrayRecord, HookSpec
from actcache.store.shard_file import ShardFile

MAX_OPEN_SHARDS = 128


class ArrayReader:
    """One sharded array of a split as a sequence of chunks; chunk c holds the rows from c * chunk_rows on."""

    def __init__(
        self,
        folder: Path,
        array: ArraySpec,
        codec: Codec,
        records: Sequence[ArrayRecord],
        *,
        n_rows: int,
        shard_rows: int,
    ):
        """folder: the split's, below acts.zarr. records: what the manifest says of each shard, in order."""
        self.array, self.n_rows = array, n_rows
        self.n_chunks = -(-n_rows // array.chunk_rows)
        self.records = records
        self._folder, self._codec = folder, codec
        self._chunks_per_shard = shard_rows // array.chunk_rows
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def rows_of(self, chunk: int) -> int:
        """How many rows a chunk holds; fewer than chunk_rows in the last one only."""
        return min(self.array.chunk_rows, self.n_rows - chunk * self.array.chunk_rows)

    def empty(self, n_chunks: int) -> Shaped[np.ndarray, "row ..."]:
        """An uninitialised buffer for the stored elements of `n_chunks` whole chunks."""
        return np.empty((n_chunks * self.array.chunk_rows, *self.array.row_shape), dtype=self.array.storage_dtype)

    def will_need(self, chunk: int) -> None:
        """Start reading a chunk's bytes from disk, without waiting."""
        shard, number = divmod(chunk, self._chunks_per_shard)
        self._shard(shard).advise(number, mmap.MADV_WILLNEED)

    def decode_into(self, chunk: int, out: Shaped[np.ndarray, "chunk_rows ..."]) -> None:
        """Decode a chunk into `out`, room for chunk_rows rows. Raises CorruptShard, naming file, chunk and rows."""
        with self.verified(chunk) as stored:
            self._codec.decode_into(stored, out)

    def scatter_into(
        self,
        chunk: int,
        places: Int64[np.ndarray, " chunk_rows"],
        out: Shaped[np.ndarray, "row ..."],
        room: Shaped[np.ndarray, "chunk_rows ..."],
    ) -> None:
        """Decode a chunk and write its row j to out[places[j]]; plain bytes go there straight from the file.

        room: where other bytes are decoded. Raises CorruptShard, naming file, chunk and rows.
        """
        with self.verified(chunk) as stored:
            scatter(self._codec.decoded(stored, room), places, out)

    @contextmanager
    def verified(self, chunk: int) -> Iterator[memoryview]:
        """The stored bytes of a chunk, whose checksum was found to match, for as long as they are decoded."""
        shard, number = divmod(chunk, self._chunks_per_shard)
        file = self._shard(shard)
        stored = file.chunk(number)
        if stored is None or self._codec.checksum(stored) != self.records[shard].checksums[number]:
            start = chunk * self.array.chunk_rows
            raise CorruptShard(
                f"{file.path}: chunk {number} (rows {start} to {start + self.rows_of(chunk)}) does not match "
                "its checksum in the manifest; run `actcache verify` to see what else is damaged"
            )
        try:
            yield stored
        except CorruptShard as error:
            raise CorruptShard(f"{file.path}: chunk {number}: {error}") from error
        del stored  # the view would keep the map from being closed
        file.advise(number, mmap.MADV_DONTNEED)

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row ..."]:
        """Rows [start, stop) as stored elements, in a buffer of their own."""
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"read: need 0 <= start <= stop <= {self.n_rows}, got {start} to {stop}")
        rows = self.array.chunk_rows
        first, last = start // rows, -(-stop // rows)
        buffer = self.empty(last - first)
        for chunk in range(first, last):
            self.decode_into(chunk, buffer[(chunk - first) * rows : (chunk - first + 1) * rows])
        return buffer[start - first * rows : stop - first * rows]

    def _shard(self, index: int) -> ShardFile:
        if self._pid != os.getpid():  # a forked child maps the files anew; a thread of its parent may hold the lock
            self._open, self._lock, self._pid = OrderedDict(), threading.Lock(), os.getpid()
        with self._lock:
            file = self._open.pop(index, None)
            if file is None:
                path = self._folder / shard_key(self.array, index)
                file = ShardFile(path, self._chunks_per_shard, self.records[index].n_bytes)
            self._open[index] = file
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)  # unmapped once no thread holds a view of it
            return file


class HookReader:
    """The rows of one hook, whatever arrays hold them: `acts` alone, or `q8` and `scale`.

    A buffer is a tuple with one part for each array; rows are gathered from the parts first and made `values` then.
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
        """Start reading a chunk's bytes from disk, without waiting."""
        for array in self.arrays:
            array.will_need(chunk)

    def decode_into(self, chunk: int, parts: Sequence[Shaped[np.ndarray, "chunk_rows _"]]) -> None:
        """Decode a chunk into the parts, each with room for chunk_rows rows. Raises CorruptShard."""
        for array, part in zip(self.arrays, parts, strict=True):
            array.decode_into(chunk, part)

    def scatter_into(
        self,
        chunk: int,
        places: Int64[np.ndarray, " chunk_rows"],
        parts: Sequence[Shaped[np.ndarray, "row _"]],
        room: Sequence[Shaped[np.ndarray, "chunk_rows _"]],
    ) -> None:
        """Decode a chunk and write its row j to row places[j] of the parts, by way of `room`. Raises CorruptShard."""
        for array, part, space in zip(self.arrays, parts, room, strict=True):
            array.scatter_into(chunk, places, part, space)

    def tensors(self, parts: Sequence[Shaped[np.ndarray, "row _"]]) -> tuple[Tensor, ...]:
        """The parts as torch tensors that share their memory."""
        return tuple(tensor_view(part, array.array.dtype) for array, part in zip(self.arrays, parts, strict=True))

    def values(self, tensors: Sequence[Tensor]) -> Float[Tensor, "row d_in"]:
        """The activations in the hook's dtype, on the device of the parts' rows."""
        return values(tensors, self.hook.dtype)

    def read(self, start: int, stop: int) -> Float[Tensor, "row d_in"]:
        """Rows [start, stop) in the hook's dtype."""
        return self.values(self.tensors(self.read_stored(start, stop)))

    def read_stored(self, start: int, stop: int) -> tuple[Shaped[np.ndarray, "row _"], ...]:
        """Rows [start, stop) as stored elements, a part for each array."""
        return tuple(array.read(start, stop) for array in self.arrays)


def scatter(
    rows: Shaped[np.ndarray, "n ..."], places: Int64[np.ndarray, " n"], out: Shaped[np.ndarray, "m ..."]
) -> None:
    """out[places] = rows, for C-contiguous arrays; np.put of whole rows takes a third less time, and no lock."""
    row = np.dtype((np.void, rows.nbytes // len(rows)))
    np.put(out.reshape(len(out), -1).view(row), places, rows.reshape(len(rows), -1).view(row), mode="clip")
