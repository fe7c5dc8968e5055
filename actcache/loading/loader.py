"""A stream of rows -> Batch: shuffled batches of one cache."""

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
    """Shuffled batches of one or several aligned hooks; a plain iterator.

    The order is arithmetic in (seed, epoch, step): every kept row exactly once per epoch at any batch size, the same
    on every machine, and `start_step` begins there without reading what came before.

    x is a view of the group of chunks that its rows were shuffled in (where it does not lie in two of them, and on a
    CPU): whoever holds a few rows of it holds that group. Clone what is to be kept for long.

    Memory, for each hook: three groups of `group_chunks` chunks, of group_chunks * chunk_rows * row_bytes (at most
    144 MiB unless `group_chunks` is raised), however large the cache is: one that decodes, one that is served, and one
    of which the caller may hold a batch; each further one of which he does; and a chunk for each thread that decodes.
    For each row of two groups, 16 bytes and 4 for each token field, and at most 64 bytes more while a group's order is
    made. With `max_norm_ratio`, one bit for every row of the split.

    Args:
        batch_tokens: rows of a batch over all ranks; only the very last batch may be shorter.
        limit: rows after which the stream ends, of all epochs together.
        exclude_special_tokens: drop rows whose token is BOS, EOS or another special token.
        positions: keep the rows at these positions of their sequence, as the slice would of a list of positions.
        max_norm_ratio: drop rows whose norm at any of the hooks is above this many times the median norm of the split
            without special tokens, as HookStatistics.norm_quantile tells it. The split is decoded once for this when
            the loader is made, chunk by chunk.
        token_fields: of "id", "document", "sequence" and "position", what Batch is to hold besides.
        group_chunks: chunks whose rows are shuffled together. It decides the order of the rows, and the memory.
        rank, world_size: rank r gets the r-th of `world_size` consecutive parts of every batch.
        device: where x lies; row and the token fields stay on the CPU.

    n_stored_rows: rows of the split. n_rows: those that pass the filters, served in every epoch. dropped: how many rows
    each filter drops, of "exclude_special_tokens", "positions" and "max_norm_ratio"; a row counts for the first of them
    that drops it, so that n_rows + sum(dropped.values()) == n_stored_rows. n_steps: batches of all epochs. step: number
    of the next batch.
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
        """Open the readers and count what each chunk keeps.

        Raises:
            ConfigError: an argument is out of range. CacheMismatch: the cache lacks a hook.
            CorruptShard: a chunk that must be read for the filters is damaged.
        """
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
        """How long batches have waited for rows to be decoded."""
        return self._stream.wait_seconds

    def __next__(self) -> Batch:
        """The batch of the current step. Raises CorruptShard for a damaged chunk, StopIteration after the last."""
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
        """Stop the threads and free the groups."""
        self._stream.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def rank_part(n_rows: int, rank: int, world_size: int) -> range:
    """The rows of a batch that a rank serves; ranks in order make the whole batch."""
    return range(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)


def check_batches(batch_tokens: int, start_step: int, limit: int | None, rank: int, world_size: int) -> None:
    """Raises ConfigError for a value that is out of range."""
    rules = {
        "batch_tokens must be at least 1": (batch_tokens >= 1, batch_tokens),
        "start_step must be at least 0": (start_step >= 0, start_step),
        "limit must be at least 0, or None": (limit is None or limit >= 0, limit),
        "rank must be in [0, world_size)": (0 <= rank < world_size, (rank, world_size)),
    }
    for rule, (kept, got) in rules.items():
        if not kept:
            raise ConfigError(f"loader: {rule}, got {got!r}")
