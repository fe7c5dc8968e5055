"""Room for decoded rows: the groups of chunks of one hook, and the batches gathered from them.

On a CPU a chunk is decoded straight into its group, and a batch goes into memory that an earlier batch has left. On
CUDA a chunk is decoded into pinned memory and copied to its group, which lies on the device, on a stream of its own;
batches are gathered there.
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

from actcache.codecs import TORCH_DTYPE
from actcache.reader import HookReader

DECODE_THREADS = min(4, os.cpu_count() or 1)
WILL_NEED_CHUNKS = 8
SPARE_BATCHES = 2
STAGED_CHUNKS = 2 * DECODE_THREADS


def will_need(reader: HookReader, chunks: Sequence[int], place: int) -> None:
    """Before the place-th of `chunks` is decoded, in order: let the disk read up to WILL_NEED_CHUNKS ahead of it."""
    first = place + WILL_NEED_CHUNKS if place else 0
    for chunk in chunks[first : place + WILL_NEED_CHUNKS + 1]:
        reader.will_need(chunk)


class Recycler:
    """Arrays of up to `n_rows` rows, each lent again once nothing refers to its memory any more."""

    def __init__(self, n_rows: int, row_shape: Sequence[int], dtype: str):
        self._shape, self._dtype = (n_rows, *row_shape), dtype
        self._spare: list[np.ndarray] = []

    def lend(self, n_rows: int) -> Shaped[np.ndarray, "row ..."]:
        """An array of uninitialised rows. Tensors over it, and views of them, keep its memory from being lent again."""
        memory = self._spare.pop() if self._spare else np.empty(self._shape, dtype=self._dtype)
        # numpy's views refer to the first array over foreign memory: through the memoryview that is `lent`, whose end
        # is then the end of every view
        lent = np.asarray(memory.data)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return lent[:n_rows]

    def _take_back(self, memory: np.ndarray) -> None:
        if len(self._spare) < SPARE_BATCHES:
            self._spare.append(memory)


class Group(ABC):
    """Room for the chunks of one group of one hook. `put` is for any thread, the rest for the one that serves."""

    @abstractmethod
    def put(self, place: int, chunk: int) -> None:
        """Decode a chunk as the place-th of the group. Raises CorruptShard."""

    @abstractmethod
    def landed(self, served: Int64[np.ndarray, " served"]) -> None:
        """Every chunk was put; served[j] is the row of the group, by whole chunks, that is served j-th."""

    @abstractmethod
    def gather(self, start: int, stop: int, out: Sequence[Any]) -> None:
        """Write the rows served from start to stop into `out`, as lent by the room."""

    @abstractmethod
    def vacate(self) -> None:
        """Nothing more is gathered before the next `landed`: chunks of another group may be put."""


class Room(ABC):
    """Room of one hook: for its groups and its batches."""

    @abstractmethod
    def group(self) -> Group:
        """New room for one group."""

    @abstractmethod
    def lend(self, n_rows: int) -> tuple[Any, ...]:
        """Uninitialised rows of every array of the hook, for Group.gather; they can be sliced."""

    @abstractmethod
    def values(self, stored: Sequence[Any]) -> Float[Tensor, "row d_in"]:
        """The activations in lent rows, which belong to them from now on."""


class HostRoom(Room):
    """Room in the memory of the host; the values go to `device`, if that is another."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int, batch_rows: int):
        self._reader, self._device, self._group_chunks = reader, device, group_chunks
        arrays = [array.array for array in reader.arrays]
        self._recyclers = [Recycler(batch_rows, array.row_shape, array.storage_dtype) for array in arrays]

    def group(self) -> HostGroup:
        return HostGroup(self._reader, self._group_chunks)

    def lend(self, n_rows: int) -> tuple[np.ndarray, ...]:
        return tuple(recycler.lend(n_rows) for recycler in self._recyclers)

    def values(self, stored: Sequence[np.ndarray]) -> Float[Tensor, "row d_in"]:
        return self._reader.values(self._reader.tensors(stored)).to(self._device)


class HostGroup(Group):
    """A group in the memory of the host."""

    def __init__(self, reader: HookReader, n_chunks: int):
        self._reader, self._parts = reader, reader.empty(n_chunks)
        self._served = np.empty(0, dtype=np.int64)

    def put(self, place: int, chunk: int) -> None:
        rows = slice(place * self._reader.chunk_rows, (place + 1) * self._reader.chunk_rows)
        self._reader.decode_into(chunk, [part[rows] for part in self._parts])

    def landed(self, served: Int64[np.ndarray, " served"]) -> None:
        self._served = served

    def gather(self, start: int, stop: int, out: Sequence[np.ndarray]) -> None:
        # numpy, because torch's index_select wakes OpenMP threads, which take the cores from the decoding threads
        for part, rows in zip(self._parts, out, strict=True):
            np.take(part, self._served[start:stop], axis=0, out=rows, mode="clip")  # "raise" copies `out` first

    def vacate(self) -> None:
        pass


class DeviceRoom(Room):
    """Room on a CUDA device, with pinned memory on the host for a few chunks on their way."""

    def __init__(self, reader: HookReader, device: torch.device, *, group_chunks: int):
        self._reader, self._device, self._group_chunks = reader, device, group_chunks
        self._copies = torch.cuda.Stream(device)
        self._staged: SimpleQueue[_Staged] = SimpleQueue()
        for _ in range(STAGED_CHUNKS):
            self._staged.put(_Staged(reader))

    def group(self) -> DeviceGroup:
        parts = self._empty(self._group_chunks * self._reader.chunk_rows)
        return DeviceGroup(self._reader, parts, self._staged, self._copies)

    def lend(self, n_rows: int) -> tuple[Tensor, ...]:
        return self._empty(n_rows)  # torch's allocator recycles

    def values(self, stored: Sequence[Tensor]) -> Float[Tensor, "row d_in"]:
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


class DeviceGroup(Group):
    """A group on a CUDA device; put, landed and gather are ordered by events, and only a full staging queue waits."""

    def __init__(
        self, reader: HookReader, parts: Sequence[Tensor], staged: SimpleQueue[_Staged], copies: torch.cuda.Stream
    ):
        self._reader, self._parts, self._staged, self._copies = reader, parts, staged, copies
        self._gathered: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._served = torch.empty(0, dtype=torch.int64)
        self._arrived = torch.cuda.Event()
        copies.wait_stream(torch.cuda.current_stream(copies.device))  # whoever had this memory before is done with it
        for part in parts:
            part.record_stream(copies)

    def put(self, place: int, chunk: int) -> None:
        rows = slice(place * self._reader.chunk_rows, (place + 1) * self._reader.chunk_rows)
        staged = self._staged.get()
        try:
            staged.copied.synchronize()
            self._reader.decode_into(chunk, staged.stored)
            with torch.cuda.stream(self._copies):
                for part, tensor in zip(self._parts, staged.tensors, strict=True):
                    part[rows].copy_(tensor, non_blocking=True)
                staged.copied.record(self._copies)
        finally:
            self._staged.put(staged)

    def landed(self, served: Int64[np.ndarray, " served"]) -> None:
        with torch.cuda.stream(self._copies):
            self._served = torch.from_numpy(served).to(self._copies.device)
        self._arrived.record(self._copies)

    def gather(self, start: int, stop: int, out: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self._copies.device)
        stream.wait_event(self._arrived)
        self._served.record_stream(stream)
        for part, rows in zip(self._parts, out, strict=True):
            torch.index_select(part, 0, self._served[start:stop], out=rows)
        gathered = torch.cuda.Event()
        gathered.record(stream)
        self._gathered[stream] = gathered

    def vacate(self) -> None:
        for event in self._gathered.values():
            self._copies.wait_event(event)
        self._gathered.clear()
