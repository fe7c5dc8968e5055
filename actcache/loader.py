"""order x reader -> Batch. Two groups of chunks are in memory: one is served, the next decodes in threads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from actcache.cache import Cache
from actcache.errors import ConfigError
from actcache.flow import SPLITS, Batch
from actcache.order import EpochOrder, GroupSlice
from actcache.reader import HookReader

GROUP_CHUNKS = 64
DECODE_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Group:
    """One decoded group: the joined rows of its chunks, and which of them is served j-th."""

    x: dict[str, Tensor]
    row: Int64[Tensor, " joined"]
    served: Int64[Tensor, " served"]


class Loader(Iterator[Batch]):
    """Shuffled batches of one or several aligned hooks; a plain iterator.

    The order is arithmetic in (seed, epoch, step): every kept row exactly once per epoch at any batch size, the same
    on every machine, and `start_step` begins there without reading what came before.
    """

    def __init__(
        self,
        cache: Cache,
        hook_names: str | Sequence[str],
        *,
        split: str = "train",
        batch_tokens: int = 4096,
        seed: int = 0,
        epochs: int = 1,
        start_step: int = 0,
        exclude_special_tokens: bool = True,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        """Open the readers and, if special tokens are dropped, count what each chunk keeps.

        Args:
            batch_tokens: rows of a batch over all ranks; only the very last batch may be shorter.
            exclude_special_tokens: drop rows whose token is BOS, EOS or another special token.
            rank, world_size: rank r gets the r-th of `world_size` consecutive parts of every batch.

        Raises:
            ConfigError: an argument is out of range. CacheMismatch: the cache lacks a hook.
        """
        self.hook_names = (hook_names,) if isinstance(hook_names, str) else tuple(hook_names)
        _check(cache, self.hook_names, split, batch_tokens, epochs, start_step, rank, world_size)
        self._readers = {name: cache.hook_reader(split, name) for name in self.hook_names}
        self._chunk_rows = cache.manifest.chunk_rows
        self._token_ids = cache.token_reader(split, "id") if exclude_special_tokens else None
        self._special = np.array(cache.special_token_ids, dtype=np.int32)
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self.n_stored_rows = cache.n_rows(split)
        self._order = EpochOrder(
            [int(self._kept(chunk).sum()) for chunk in range(-(-self.n_stored_rows // self._chunk_rows))],
            seed=seed,
            epochs=epochs,
            batch_tokens=batch_tokens,
            group_chunks=GROUP_CHUNKS,
        )
        self.n_rows, self.n_steps = self._order.n_rows, self._order.n_steps
        self.step = start_step
        self.wait_seconds = 0.0
        self._threads = ThreadPoolExecutor(DECODE_THREADS, "actcache-decode")
        self._groups: dict[tuple[int, int], Future[_Group]] = {}

    def __next__(self) -> Batch:
        """The batch of the current step. Raises CorruptShard for a damaged chunk, StopIteration after the last."""
        if self.step >= self.n_steps:
            self.close()
            raise StopIteration
        parts = [self._part(part) for part in self._rank_slices(self._order.slices(self.step))]
        self.step += 1
        return Batch(
            x={name: torch.cat([x[name] for x, _ in parts]).to(self._device) for name in self.hook_names},
            row=torch.cat([row for _, row in parts]),
            step=self.step - 1,
        )

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._groups.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _part(self, part: GroupSlice) -> tuple[dict[str, Tensor], Tensor]:
        group = self._group(part.epoch, part.group)
        joined = group.served[part.start : part.stop]
        x = {name: rows.index_select(0, joined) for name, rows in group.x.items()}
        return x, group.row.index_select(0, joined)

    def _rank_slices(self, slices: list[GroupSlice]) -> list[GroupSlice]:
        """The part of a batch that this rank serves; ranks in order make the whole batch."""
        n_rows = sum(part.stop - part.start for part in slices)
        start, stop = (n_rows * r // self._world_size for r in (self._rank, self._rank + 1))
        kept, offset = [], 0
        for part in slices:
            low = min(max(start - offset, 0), part.stop - part.start)
            high = min(max(stop - offset, 0), part.stop - part.start)
            offset += part.stop - part.start
            if low < high:
                kept.append(GroupSlice(part.epoch, part.group, part.start + low, part.start + high))
        return kept or [GroupSlice(slices[0].epoch, slices[0].group, 0, 0)]

    def _group(self, epoch: int, number: int) -> _Group:
        """The decoded group; the one after it starts to decode, the ones before it are let go."""
        started = time.perf_counter()
        for key in [key for key in self._groups if key < (epoch, number)]:
            del self._groups[key]
        future = self._ask(epoch, number)
        following = self._order.following(epoch, number)
        if following is not None:
            self._ask(*following)
        group = future.result()
        self.wait_seconds += time.perf_counter() - started
        return group

    def _ask(self, epoch: int, number: int) -> Future[_Group]:
        key = (epoch, number)
        if key not in self._groups:
            self._groups[key] = self._threads.submit(self._decode, epoch, number)
        return self._groups[key]

    def _decode(self, epoch: int, number: int) -> _Group:
        chunks = self._order.chunks(epoch, number).tolist()
        x = {
            name: reader.values(reader.tensors(self._joined(reader, chunks))) for name, reader in self._readers.items()
        }
        row = np.concatenate([np.arange(*self._bounds(chunk)) for chunk in chunks])
        kept = np.flatnonzero(np.concatenate([self._kept(chunk) for chunk in chunks]))
        served = kept[self._order.rows(epoch, number)]
        return _Group(x, torch.from_numpy(row), torch.from_numpy(served))

    def _joined(self, reader: HookReader, chunks: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The rows of the chunks, back to back; each is decoded straight into its place."""
        for chunk in chunks:
            reader.will_need(chunk)
        buffer = reader.empty(len(chunks))
        offset = 0
        for chunk in chunks:
            reader.decode_into(chunk, [part[offset : offset + self._chunk_rows] for part in buffer])
            offset += reader.rows_of(chunk)  # a short chunk's padding is overwritten by the next
        return tuple(part[:offset] for part in buffer)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self.n_stored_rows)

    def _kept(self, chunk: int) -> Bool[np.ndarray, " row"]:
        """Which rows of a chunk pass the filter."""
        start, stop = self._bounds(chunk)
        if self._token_ids is None:
            return np.ones(stop - start, dtype=bool)
        return ~np.isin(self._token_ids.read(start, stop), self._special)


def _check(
    cache: Cache,
    hook_names: tuple[str, ...],
    split: str,
    batch_tokens: int,
    epochs: int,
    start_step: int,
    rank: int,
    world_size: int,
) -> None:
    rules = {
        f"split must be one of {SPLITS}": (split in SPLITS, split),
        "hook_names must name at least one hook": (len(hook_names) > 0, hook_names),
        "batch_tokens must be at least 1": (batch_tokens >= 1, batch_tokens),
        "epochs must be at least 1": (epochs >= 1, epochs),
        "start_step must be at least 0": (start_step >= 0, start_step),
        "rank must be in [0, world_size)": (0 <= rank < world_size, (rank, world_size)),
    }
    for rule, (kept, got) in rules.items():
        if not kept:
            raise ConfigError(f"Loader: {rule}, got {got!r}")
    if split in SPLITS and cache.n_rows(split) == 0:
        raise ConfigError(f"Loader: {split} holds no rows; harvest with a larger holdout, or load the other split")
