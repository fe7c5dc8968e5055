"""`Batches` and `Pass`: what Loader and Mixture share. A pass serves batch after batch from one step on."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from actcache.arguments import whole_number
from actcache.errors import ConfigError
from actcache.flow import Batch
from actcache.loading.stream import RowStream

Source = TypeVar("Source", bound="Batches")


class Batches(Iterable[Batch], ABC):
    """Shuffled batches, of which any number of passes can be taken. Loader and Mixture are the kinds there are.

    Attributes:
        n_steps: batches of all epochs.
        start_step: number of the batch with which every pass begins.
    """

    def __init__(self, streams: Sequence[RowStream], *, n_steps: int, batch_tokens: int, start_step: int):
        """Check that the start lies in the stream.

        Args:
            streams: give the rows.
            n_steps, batch_tokens, start_step: as for Loader.

        Raises:
            ConfigError: start_step is above n_steps.
        """
        self.n_steps, self.start_step = n_steps, self._checked_step("start_step", start_step, n_steps)
        self._streams, self._batch_tokens = tuple(streams), batch_tokens
        self._locks: dict[int, AbstractContextManager[Any]] = {}  # of each process

    @property
    def wait_seconds(self) -> float:
        """How many seconds batches of all passes have waited for rows to be decoded."""
        return sum(stream.wait_seconds for stream in self._streams)

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step in [0, n_steps). The caller holds `lock`. Raises CorruptShard for a damaged chunk."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while a batch is made. A forked process has a lock of its own: a thread of its parent may hold that."""
        found = self._locks.get(os.getpid())
        return self._locks.setdefault(os.getpid(), threading.RLock()) if found is None else found

    def __iter__(self) -> Pass:
        """A fresh pass from `start_step` on."""
        return self.at(self.start_step)

    def at(self, step: int) -> Pass:
        """A pass that begins with batch `step`. Nothing that comes before it is read.

        In a worker process of a torch DataLoader it has every n-th batch, so that the n workers have all of them.

        Raises ConfigError if `step` is outside [0, n_steps].
        """
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return Pass(self, self._checked_step("step", step, self.n_steps) + first, stride)

    def close(self) -> None:
        """Stop the threads and free the memory of the groups. A later pass, or one that goes on, starts them again."""
        with self.lock:
            for stream in self._streams:
                stream.close()

    def __enter__(self: Source) -> Source:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_locks": {}}

    @staticmethod
    def _checked_step(name: str, step: int, n_steps: int) -> int:
        if whole_number("loader", name, step) > n_steps:
            raise ConfigError(f"loader: {name} must be at most {n_steps}, the number of batches, got {step}")
        return int(step)


IterableDataset.register(Batches)  # pyright: ignore[reportAttributeAccessIssue]: of ABCMeta; DataLoader asks for it


class Pass(Iterator[Batch]):
    """One pass over the batches of a Loader or Mixture; `iter(loader)` and `loader.at(step)` give it.

    Threads may share it: each batch goes to one of them.

    Attributes:
        step: number of the next batch.
    """

    def __init__(self, batches: Batches, step: int, stride: int):
        self.step = step
        self._batches, self._stride = batches, stride

    def __next__(self) -> Batch:
        """The next batch.

        Raises CorruptShard for a damaged chunk, StopIteration after the last batch.
        """
        with self._batches.lock:
            if self.step >= self._batches.n_steps:
                self._batches.close()
                raise StopIteration
            batch = self._batches.batch(self.step)
            self.step += self._stride
            return batch


def rank_part(n_rows: int, rank: int, world_size: int) -> range:
    """Which rows of a batch of `n_rows` rows a rank gets. The parts of all ranks, in order, are the whole batch."""
    return range(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)


def check_batches(batch_tokens: int, limit: int | None, rank: int, world_size: int) -> None:
    """Raise ConfigError for an argument of Loader or Mixture that is out of range, or divides what a pass divides.

    In a worker of a DataLoader nobody can tell whether `rank` is that of a training process. It is refused where it may
    be the worker's number, because half of the batches or more would never come.
    """
    whole_number("loader", "batch_tokens", batch_tokens, 1)
    if limit is not None:
        whole_number("loader", "limit", limit)
    whole_number("loader", "rank", rank, 0, whole_number("loader", "world_size", world_size, 1) - 1)
    worker = get_worker_info()
    n_workers = 1 if worker is None else worker.num_workers
    if worker is not None and n_workers > 1 and world_size % n_workers == 0 and rank % n_workers == worker.id:
        raise ConfigError(
            f"loader: the workers of a DataLoader share the batches by themselves, got rank {rank} of {world_size} in "
            f"worker {worker.id} of {n_workers}; leave rank and world_size out, or if they are those of training "
            "processes, make the loader before the DataLoader"
        )
