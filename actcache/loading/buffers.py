"""Buffers for decoded rows: the groups of chunks of one hook, of which batches are parts.

The rows of a group lie in the order in which they are served: each chunk is scattered over them as it is decoded, by
the threads that decode. On a CPU a batch is a view of them, and their memory serves again once no batch refers to it.
On CUDA a chunk is decoded into pinned memory, copied to the device and scattered there, on a stream of its own; a batch
is a copy, for what reads it may still be queued when the next group comes.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from actcache.format.dtypes import TORCH_DTYPE
from actcache.store.reader import HookReader

DECODE_THREADS = min(4, os.cpu_count() or 1)
WILL_NEED_CHUNKS = 8
KEPT = 3
STAGED_CHUNKS = 2 * DECODE_THREADS


def will_need(reader: HookReader, chunks: Sequence[int], place: int) -> None:
    """Before the place-th of `chunks` is decoded, in order: let the disk read up to WILL_NEED_CHUNKS ahead of it."""
    first = place + WILL_NEED_CHUNKS if place else 0
    for chunk in chunks[first : place + WILL_NEED_CHUNKS + 1]:
        reader.will_need(chunk)


class BufferPool:
    """Arrays of up to `n_rows` rows, each lent again once nothing refers to its memory any more.

    No more than KEPT are kept, those that are lent included: one is made, one is used, and one is still held.
    """

    def __init__(self, n_rows: int, row_shape: Sequence[int], dtype: str):
        self._shape, self._dtype = (n_rows, *row_shape), dtype
        self._lent: set[int] = set()
        self._spare: list[np.ndarray] = []

    def acquire(self, n_rows: int | None = None) -> Shaped[np.ndarray, "row ..."]:
        """An array of uninitialised rows. Tensors over it, and views of them, keep its memory from being lent again."""
        memory = self._spare.pop() if self._spare else np.empty(self._shape, dtype=self._dtype)
        self._lent.add(id(memory))
        # numpy's views refer to the first array over foreign memory: through the memoryview that is `lent`, whose end
        # is then the end of every view
        lent = np.asarray(memory.data)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return lent[:n_rows]

    def _take_back(self, memory: np.ndarray) -> None:
        self._lent.discard(id(memory))
        if len(self._lent) + len(self._spare) < KEPT:
            self._spare.append(memory)


class GroupBuffer(ABC):
    """A buffer for the rows of one group of one hook. Any thread may call `decode_chunk`, one at a time the rest."""

    @abstractmethod
    def expect(self, places: Int64[np.ndarray, " joined"]) -> None:
        """Before any chunk is decoded: row j of the joined chunks is to be row places[j]."""

    @abstractmethod
    def decode_chunk(self, number: int, chunk: int) -> None:
        """Decode a chunk, the number-th of the group, and scatter its rows. Raises CorruptShard."""

    @abstractmethod
    def finish(self) -> None:
        """Every chunk was decoded."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Sequence[Any]:
        """The rows served from start to stop, of every array of the hook; they are the caller's."""

    @abstractmethod
    def release(self) -> None:
        """No more rows are asked for before the next `finish`: another group may be expected."""


class HookBuffers(ABC):
    """The buffers of one hook."""

    @abstractmethod
    def new_group(self) -> GroupBuffer:
        """A new buffer for one group."""

    @abstractmethod
    def values(self, parts: Sequence[Sequence[Any]]) -> Float[Tensor, "row d_in"]:
        """The activations of rows of several groups, one after another. parts: as `GroupBuffer.rows` gave them."""


class HostBuffers(HookBuffers):
    """Buffers in the memory of the host; the values go to `device`, if that is another."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int):
        self._reader, self._device = reader, device
        n_rows = group_chunks * reader.chunk_rows + 1  # the last is never served
        arrays = [array.array for array in reader.arrays]
        self._pools = [BufferPool(n_rows, each.row_shape, each.storage_dtype) for each in arrays]
        self._decoded: SimpleQueue[tuple[np.ndarray, ...]] = SimpleQueue()
        for _ in range(DECODE_THREADS):
            self._decoded.put(reader.empty(1))

    def new_group(self) -> HostGroupBuffer:
        return HostGroupBuffer(self._reader, self._pools, self._decoded)

    def values(self, parts: Sequence[Sequence[np.ndarray]]) -> Float[Tensor, "row d_in"]:
        # numpy, because torch's copies wake OpenMP threads, which take the cores from the decoding threads
        several = zip(*(parts or [self._reader.empty(0)]), strict=True)
        stored = parts[0] if len(parts) == 1 else [np.concatenate(each) for each in several]
        return self._reader.values(self._reader.tensors(stored)).to(self._device)


class HostGroupBuffer(GroupBuffer):
    """A group in the memory of the host; `decoded` has room for a chunk for each thread that decodes."""

    def __init__(self, reader: HookReader, pools: Sequence[BufferPool], decoded: SimpleQueue[tuple[np.ndarray, ...]]):
        self._reader, self._pools, self._decoded = reader, pools, decoded
        self._parts: tuple[np.ndarray, ...] = ()
        self._places = np.empty(0, dtype=np.int64)

    def expect(self, places: Int64[np.ndarray, " joined"]) -> None:
        self._parts = tuple(pool.acquire() for pool in self._pools)
        self._places = places

    def decode_chunk(self, number: int, chunk: int) -> None:
        rows = slice(number * self._reader.chunk_rows, (number + 1) * self._reader.chunk_rows)
        room = self._decoded.get()
        try:
            self._reader.scatter_into(chunk, self._places[rows], self._parts, room)
        finally:
            self._decoded.put(room)

    def finish(self) -> None:
        pass

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(part[start:stop] for part in self._parts)

    def release(self) -> None:
        self._parts = ()


class DeviceBuffers(HookBuffers):
    """Buffers on a CUDA device, with pinned memory on the host for a few chunks on their way."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int):
        self._reader, self._device, self._group_chunks = reader, device, group_chunks
        self._copies = torch.cuda.Stream(device)
        self._staged: SimpleQueue[_Staged] = SimpleQueue()
        for _ in range(STAGED_CHUNKS):
            self._staged.put(_Staged(reader))

    def new_group(self) -> DeviceGroupBuffer:
        parts = self._empty(self._group_chunks * self._reader.chunk_rows + 1)  # the last is never served
        return DeviceGroupBuffer(self._reader, parts, self._staged, self._copies)

    def values(self, parts: Sequence[Sequence[Tensor]]) -> Float[Tensor, "row d_in"]:
        several = zip(*(parts or [self._empty(0)]), strict=True)
        stored = parts[0] if len(parts) == 1 else [torch.cat(each) for each in several]
        return self._reader.values(stored)

    def _empty(self, n_rows: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty((n_rows, *array.array.row_shape), dtype=TORCH_DTYPE[array.array.dtype], device=self._device)
            for array in self._reader.arrays
        )


class _Staged:
    """Pinned memory for one chunk, and the event after which it may be written again."""

    def __init__(self, reader: HookReader):
        pinned = [torch.from_numpy(part).pin_memory() for part in reader.empty(1)]
        self.stored = [part.numpy() for part in pinned]
        self.tensors = reader.tensors(self.stored)
        self.copied = torch.cuda.Event()


class DeviceGroupBuffer(GroupBuffer):
    """A group on a CUDA device. Events order decode_chunk, finish and rows; only a full staging queue waits."""

    def __init__(
        self, reader: HookReader, parts: Sequence[Tensor], staged: SimpleQueue[_Staged], copies: torch.cuda.Stream
    ):
        self._reader, self._parts, self._staged, self._copies = reader, parts, staged, copies
        self._copied: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._places = torch.empty(0, dtype=torch.int64)
        self._arrived = torch.cuda.Event()
        copies.wait_stream(torch.cuda.current_stream(copies.device))  # whoever had this memory before is done with it
        for part in parts:
            part.record_stream(copies)

    def expect(self, places: Int64[np.ndarray, " joined"]) -> None:
        with torch.cuda.stream(self._copies):
            self._places = torch.from_numpy(places).to(self._copies.device)

    def decode_chunk(self, number: int, chunk: int) -> None:
        rows = slice(number * self._reader.chunk_rows, (number + 1) * self._reader.chunk_rows)
        staged = self._staged.get()
        try:
            staged.copied.synchronize()
            self._reader.decode_into(chunk, staged.stored)
            with torch.cuda.stream(self._copies):
                for part, tensor in zip(self._parts, staged.tensors, strict=True):
                    part.index_copy_(0, self._places[rows], tensor.to(self._copies.device, non_blocking=True))
                staged.copied.record(self._copies)
        finally:
            self._staged.put(staged)

    def finish(self) -> None:
        self._arrived.record(self._copies)

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(self._copies.device)
        stream.wait_event(self._arrived)
        rows = tuple(part[start:stop].clone() for part in self._parts)
        copied = torch.cuda.Event()
        copied.record(stream)
        self._copied[stream] = copied
        return rows

    def release(self) -> None:
        for event in self._copied.values():
            self._copies.wait_event(event)
        self._copied.clear()
