"""`Loader`: shuffled batches of one cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from actcache.errors import ConfigError
from actcache.flow import Batch
from actcache.loading.stream import GROUP_CHUNKS, RowStream, StreamConfig
from actcache.store.cache import Cache

__all__ = ["GROUP_CHUNKS", "Loader", "check_batches", "rank_part"]


class Loader(Iterator[Batch]):
    """Shuffled batches of one or several hooks of a cache; a plain iterator. Every hook has the same rows.

    The order depends on (seed, epoch, step) and the cache alone. Every row that passes the filters comes exactly once
    in an epoch. The order is the same at every batch size and on every machine. `start_step` begins at that batch
    without reading the batches before it.

    On a CPU, x is a view of the group of chunks that its rows were shuffled in, unless it has rows of two groups. So a
    few rows of x keep the memory of a whole group. Clone rows that you keep for long.

    Memory, for each hook: three groups of `group_chunks` chunks, each of group_chunks * chunk_rows * row_bytes (at most
    144 MiB unless `group_chunks` is raised), however large the cache is. One group is decoded, one is served, and the
    caller may hold a batch of the third. Each further group of which the caller holds a batch comes on top, and a chunk
    for each thread that decodes. Each row of two groups takes 16 bytes, 4 bytes for each token field, and at most 64
    bytes more while the order of a group is made. `max_norm_ratio` takes one bit for every row of the split.

    Args:
        cache: the opened cache.
        hook_names: one hook or several.
        split: "train" or "validation".
        batch_tokens: rows of a batch over all ranks; only the last batch may be shorter.
        seed: keys the shuffle.
        epochs: how often every row comes.
        start_step: number of the first batch.
        limit: rows after which the stream ends, counted over all epochs; None for the end of the last epoch.
        exclude_special_tokens: drop rows whose token is BOS, EOS or another special token.
        positions: keep only rows at these positions of their sequence, a slice of range(context_size).
        max_norm_ratio: drop rows whose norm at any of the hooks is above this multiple of the median norm. The median
            is that of the split without special tokens, from HookStatistics.norm_quantile. The split is decoded once,
            chunk by chunk, when the loader is made.
        token_fields: which of "id", "document", "sequence" and "position" every Batch holds.
        group_chunks: chunks whose rows are shuffled together. It decides the order of the rows, and the memory.
        rank, world_size: rank r gets the r-th of `world_size` consecutive parts of every batch.
        device: the device of x; row and the token fields stay on the CPU.

    Attributes:
        n_stored_rows: rows of the split.
        n_rows: rows that pass the filters; each comes once in an epoch.
        dropped: for each filter, "exclude_special_tokens", "positions" and "max_norm_ratio" in this order, how many
            rows it drops that no filter before it drops. So n_rows + sum(dropped.values()) == n_stored_rows.
        n_steps: batches of all epochs.
        step: number of the next batch.

    Raises:
        ConfigError: an argument is out of range.
        CacheMismatch: the cache lacks a hook.
        CorruptShard: a chunk that must be read for the filters is damaged.
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
        limit: int | None = None,
        exclude_special_tokens: bool = True,
        positions: slice | None = None,
        max_norm_ratio: float | None = None,
        token_fields: Sequence[str] = (),
        group_chunks: int = GROUP_CHUNKS,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        config = StreamConfig(
            hook_names=(hook_names,) if isinstance(hook_names, str) else tuple(hook_names),
            split=split,
            seed=seed,
            epochs=epochs,
            exclude_special_tokens=exclude_special_tokens,
            positions=positions,
            max_norm_ratio=max_norm_ratio,
            token_fields=tuple(token_fields),
            group_chunks=group_chunks,
            device=torch.device(device),
        )
        check_batches(batch_tokens, start_step, limit, rank, world_size)
        row_filter = config.row_filter(cache)
        self.hook_names = config.hook_names
        self.n_stored_rows, self.n_rows, self.dropped = cache.n_rows(split), row_filter.n_rows, row_filter.dropped
        self.step = start_step
        self._stream = RowStream(cache, config, row_filter, batch_rows=batch_tokens, limit=limit)
        self.n_steps = self._stream.order.n_steps
        self._batch_tokens, self._rank, self._world_size = batch_tokens, rank, world_size

    @property
    def wait_seconds(self) -> float:
        """How many seconds batches have waited for rows to be decoded."""
        return self._stream.wait_seconds

    def __next__(self) -> Batch:
        """The batch of the current step.

        Raises CorruptShard for a damaged chunk, StopIteration after the last batch.
        """
        if self.step >= self.n_steps:
            self.close()
            raise StopIteration
        start = self.step * self._batch_tokens
        n_rows = min(self._batch_tokens, self._stream.order.n_stream_rows - start)
        part = rank_part(n_rows, self._rank, self._world_size)
        batch = self._stream.rows(start + part.start, start + part.stop, step=self.step)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop the threads and free the memory of the groups."""
        self._stream.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def rank_part(n_rows: int, rank: int, world_size: int) -> range:
    """Which rows of a batch of `n_rows` rows a rank gets. The parts of all ranks, in order, are the whole batch."""
    return range(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)


def check_batches(batch_tokens: int, start_step: int, limit: int | None, rank: int, world_size: int) -> None:
    """Raise ConfigError for an argument of Loader or Mixture that is out of range."""
    rules = {
        "batch_tokens must be at least 1": (batch_tokens >= 1, batch_tokens),
        "start_step must be at least 0": (start_step >= 0, start_step),
        "limit must be at least 0, or None": (limit is None or limit >= 0, limit),
        "rank must be in [0, world_size)": (0 <= rank < world_size, (rank, world_size)),
    }
    for rule, (is_met, got) in rules.items():
        if not is_met:
            raise ConfigError(f"loader: {rule}, got {got!r}")
