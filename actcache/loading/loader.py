"""`Loader`: shuffled batches of one cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actcache.arguments import device_of, names, typed
from actcache.flow import Batch
from actcache.loading.batches import Batches, check_batches, rank_part
from actcache.loading.stream import GROUP_CHUNKS, RowStream, StreamConfig
from actcache.store.cache import Cache

__all__ = ["GROUP_CHUNKS", "Loader"]


class Loader(Batches):
    """Shuffled batches of one or several hooks of a cache. Every hook has the same rows.

    The order depends on (seed, epoch, step) and the cache alone. Every row that passes the filters comes exactly once
    in an epoch. The order is the same at every batch size and on every machine.

    Each `iter(loader)`, and so each `for batch in loader`, is a fresh pass over all epochs from `start_step` on, also
    after a `break`. `loader.at(step)` is a pass from another batch on. The batches before it are not read. To go on
    after a `break`, keep the pass (`batches = iter(loader)`), or take `loader.at(batch.step + 1)`.

    Threads may share a loader, which has a lock: a pass that several threads share gives each batch to one of them.
    Passes that run at the same time give right batches, but they share the memory of one: each of them decodes its
    group anew whenever another one was served. Make a loader for each instead.

    A loader can be pickled, for a process that is spawned: there it opens the cache by its path, and raises
    CacheMismatch if it is another one by then. It is an IterableDataset of torch. The workers of a
    DataLoader(loader, batch_size=None) share its batches, which all come once and in order. A loader that is made in a
    worker with the worker's number as `rank` would divide them twice, and is refused. Each worker decodes every group,
    so one worker is as fast as many.

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
        start_step: number of the first batch of every pass, at most n_steps.
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
        wait_seconds: how many seconds batches have waited for rows to be decoded.

    Raises:
        ConfigError: an argument is out of range or of another type.
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
        typed("loader", "cache", cache, Cache)
        config = StreamConfig(
            hook_names=names("loader", "hook_names", hook_names),
            split=split,
            seed=seed,
            epochs=epochs,
            exclude_special_tokens=exclude_special_tokens,
            positions=positions,
            max_norm_ratio=max_norm_ratio,
            token_fields=names("loader", "token_fields", token_fields),
            group_chunks=group_chunks,
            device=device_of("loader", device),
        )
        check_batches(batch_tokens, limit, rank, world_size)
        row_filter = config.row_filter(cache)
        self.hook_names = config.hook_names
        self.n_stored_rows, self.n_rows, self.dropped = cache.n_rows(split), row_filter.n_rows, row_filter.dropped
        self._stream = RowStream(cache, config, row_filter, batch_rows=batch_tokens, limit=limit)
        self._rank, self._world_size = rank, world_size
        n_steps = self._stream.order.n_steps
        super().__init__([self._stream], n_steps=n_steps, batch_tokens=batch_tokens, start_step=start_step)

    def batch(self, step: int) -> Batch:
        start = step * self._batch_tokens
        n_rows = min(self._batch_tokens, self._stream.order.n_stream_rows - start)
        part = rank_part(n_rows, self._rank, self._world_size)
        return self._stream.rows(start + part.start, start + part.stop, step=step)
