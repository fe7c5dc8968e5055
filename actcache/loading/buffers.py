"""Buffers for decoded rows. A buffer holds the rows of one group of chunks of one hook; batches are parts of it.

The rows of a group lie in the order in which they are served: a thread decodes a chunk and scatters its rows over the
buffer. On a CPU a batch is a view of the buffer, and the memory is used again when no batch refers to it. On CUDA a
chunk is decoded into pinned memory, copied to the device and scattered there, on a stream of its own. There a batch is
a copy, because operations that read it may still be queued when the next group overwrites the buffer.
"""

from __future__ import annotations

import math
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
from actcache.machine.limits import cores, require_memory_for_array
from actcache.store.reader import HookReader

DECODE_THREADS = min(4, cores())
WILL_NEED_CHUNKS = 8
MAX_ARRAYS = 3  # one is filled, one is served, and a batch of the caller refers to one
STAGED_CHUNKS = 2 * DECODE_THREADS


def will_need(reader: HookReader, chunks: Sequence[int], number: int) -> None:
    """Before chunks[number] is decoded, let the disk read up to WILL_NEED_CHUNKS chunks ahead of it.

    The chunks are decoded in order, so each call asks for one more chunk, and the first call for all up to there.
    """
    first = number + WILL_NEED_CHUNKS if number else 0
    for chunk in chunks[first : number + WILL_NEED_CHUNKS + 1]:
        reader.will_need(chunk)


class BufferPool:
    """Lends arrays of up to `n_rows` rows. An array comes back when nothing refers to its memory any more.

    The pool keeps no more than MAX_ARRAYS arrays, those that are lent included; what comes back above that is freed.
    Threads may share a pool. It has no lock, because an array may come back in the middle of `acquire` in the same
    thread. Instead each step is one call that no thread can cut in two, and nothing is checked before it is done.
    """

    def __init__(self, n_rows: int, row_shape: Sequence[int], dtype: str):
        self._shape, self._dtype = (n_rows, *row_shape), dtype
        self._lent: set[int] = set()
        self._spare: list[np.ndarray] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._shape[0], self._shape[1:], self._dtype)  # without its memory

    def acquire(self, n_rows: int | None = None) -> Shaped[np.ndarray, "row ..."]:
        """An array of uninitialised rows. It stays lent while any array, tensor or view refers to its memory."""
        try:
            memory = self._spare.pop()
        except IndexError:
            n_bytes = math.prod(self._shape) * np.dtype(self._dtype).itemsize
            require_memory_for_array(n_bytes, f"a group of {self._shape[0]:,} rows")
            memory = np.empty(self._shape, dtype=self._dtype)
        self._lent.add(id(memory))
        # Every numpy view of this memory refers to `lent`, the first array over the memoryview. So when `lent` is
        # freed, no view is left.
        lent = np.asarray(memory.data)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return lent[:n_rows]

    def _take_back(self, memory: np.ndarray) -> None:
        self._lent.discard(id(memory))
        self._spare.append(memory)
        while len(self._lent) + len(self._spare) > MAX_ARRAYS:
            try:
                self._spare.pop()
            except IndexError:  # every array is lent, or another thread has freed it
                break


class GroupBuffer(ABC):
    """A buffer for the rows of one group of one hook. Any thread may call `decode_chunk`; one thread calls the rest."""

    @abstractmethod
    def expect(self, target_rows: Int64[np.ndarray, " stored"]) -> None:
        """Prepare for a new group; called before any of its chunks is decoded.

        target_rows: for each row of the group's chunks, one chunk after another, its row in the buffer. Rows that are
        not served go to the last row.
        """

    @abstractmethod
    def decode_chunk(self, number: int, chunk: int) -> None:
        """Decode a chunk and scatter its rows. number: of the chunk within the group. Raises CorruptShard."""

    @abstractmethod
    def finish(self) -> None:
        """Called when every chunk of the group was decoded, before `rows`."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Sequence[Any]:
        """Rows [start, stop) of the buffer, a part for each array of the hook. They stay valid after `release`."""

    @abstractmethod
    def release(self) -> None:
        """Called when no more rows of the group are asked for; `expect` may follow."""


class HookBuffers(ABC):
    """Makes the buffers of one hook."""

    @abstractmethod
    def new_group(self) -> GroupBuffer:
        """A new buffer for the rows of one group."""

    @abstractmethod
    def values(self, parts: Sequence[Sequence[Any]]) -> Float[Tensor, "row d_in"]:
        """The activations of the rows of several groups, one group after another.

        parts: what `GroupBuffer.rows` gave.
        """


class HostBuffers(HookBuffers):
    """Makes buffers in host memory. `values` copies activations to `device`."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int):
        self._reader, self._device = reader, device
        n_rows = group_chunks * reader.chunk_rows + 1  # the last row is never served
        arrays = [array.array for array in reader.arrays]
        self._pools = [BufferPool(n_rows, each.row_shape, each.storage_dtype) for each in arrays]
        self._chunk_buffers: SimpleQueue[tuple[np.ndarray, ...]] = SimpleQueue()
        for _ in range(DECODE_THREADS):
            self._chunk_buffers.put(reader.empty(1))

    def new_group(self) -> HostGroupBuffer:
        return HostGroupBuffer(self._reader, self._pools, self._chunk_buffers)

    def values(self, parts: Sequence[Sequence[np.ndarray]]) -> Float[Tensor, "row d_in"]:
        # numpy copies, because torch would wake OpenMP threads, which take the cores from the decoding threads
        by_array = zip(*(parts or [self._reader.empty(0)]), strict=True)
        stored = parts[0] if len(parts) == 1 else [np.concatenate(each) for each in by_array]
        return self._reader.values(self._reader.tensors(stored)).to(self._device)


class HostGroupBuffer(GroupBuffer):
    """A buffer in host memory. `chunk_buffers` holds memory for one chunk for each thread that decodes."""

    def __init__(
        self, reader: HookReader, pools: Sequence[BufferPool], chunk_buffers: SimpleQueue[tuple[np.ndarray, ...]]
    ):
        self._reader, self._pools, self._chunk_buffers = reader, pools, chunk_buffers
        self._parts: tuple[np.ndarray, ...] = ()
        self._target_rows = np.empty(0, dtype=np.int64)

    def expect(self, target_rows: Int64[np.ndarray, " stored"]) -> None:
        self._parts = tuple(pool.acquire() for pool in self._pools)
        self._target_rows = target_rows

    def decode_chunk(self, number: int, chunk: int) -> None:
        rows = slice(number * self._reader.chunk_rows, (number + 1) * self._reader.chunk_rows)
        chunk_buffer = self._chunk_buffers.get()
        try:
            self._reader.scatter_into(chunk, self._target_rows[rows], self._parts, chunk_buffer)
        finally:
            self._chunk_buffers.put(chunk_buffer)

    def finish(self) -> None:
        pass

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(part[start:stop] for part in self._parts)

    def release(self) -> None:
        self._parts = ()


class DeviceBuffers(HookBuffers):
    """Makes buffers on a CUDA device. A few chunks at a time pass through pinned host memory."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int):
        self._reader, self._device, self._group_chunks = reader, device, group_chunks
        self._copies = torch.cuda.Stream(device)
        self._staged: SimpleQueue[_Staged] = SimpleQueue()
        for _ in range(STAGED_CHUNKS):
            self._staged.put(_Staged(reader))

    def new_group(self) -> DeviceGroupBuffer:
        parts = self._empty(self._group_chunks * self._reader.chunk_rows + 1)  # the last row is never served
        return DeviceGroupBuffer(self._reader, parts, self._staged, self._copies)

    def values(self, parts: Sequence[Sequence[Tensor]]) -> Float[Tensor, "row d_in"]:
        by_array = zip(*(parts or [self._empty(0)]), strict=True)
        stored = parts[0] if len(parts) == 1 else [torch.cat(each) for each in by_array]
        return self._reader.values(stored)

    def _empty(self, n_rows: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty((n_rows, *array.array.row_shape), dtype=TORCH_DTYPE[array.array.dtype], device=self._device)
            for array in self._reader.arrays
        )


class _Staged:
    """Pinned memory for one chunk, and the event after which it may be overwritten."""

    def __init__(self, reader: HookReader):
        pinned = [torch.from_numpy(part).pin_memory() for part in reader.empty(1)]
        self.stored = [part.numpy() for part in pinned]
        self.tensors = reader.tensors(self.stored)
        self.copied = torch.cuda.Event()


class DeviceGroupBuffer(GroupBuffer):
    """A buffer on a CUDA device. Events order the copies; a thread waits only if all pinned memory is in use."""

    def __init__(
        self, reader: HookReader, parts: Sequence[Tensor], staged: SimpleQueue[_Staged], copies: torch.cuda.Stream
    ):
        self._reader, self._parts, self._staged, self._copies = reader, parts, staged, copies
        self._copied: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._target_rows = torch.empty(0, dtype=torch.int64)
        self._arrived = torch.cuda.Event()
        copies.wait_stream(torch.cuda.current_stream(copies.device))  # this memory may still be in use
        for part in parts:
            part.record_stream(copies)

    def expect(self, target_rows: Int64[np.ndarray, " stored"]) -> None:
        with torch.cuda.stream(self._copies):
            self._target_rows = torch.from_numpy(target_rows).to(self._copies.device)

    def decode_chunk(self, number: int, chunk: int) -> None:
        rows = slice(number * self._reader.chunk_rows, (number + 1) * self._reader.chunk_rows)
        staged = self._staged.get()
        try:
            staged.copied.synchronize()
            self._reader.decode_into(chunk, staged.stored)
            with torch.cuda.stream(self._copies):
                for part, tensor in zip(self._parts, staged.tensors, strict=True):
                    part.index_copy_(0, self._target_rows[rows], tensor.to(self._copies.device, non_blocking=True))
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
