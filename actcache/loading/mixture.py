"""`Mixture`: shuffled batches of several caches, in which every cache has its share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from actcache.arguments import device_of, names, typed
from actcache.errors import ConfigError
from actcache.flow import Batch
from actcache.format.dtypes import STORAGE_DTYPE, storage_view, tensor_view
from actcache.format.records import HookSpec
from actcache.loading.batches import Batches, check_batches, rank_part
from actcache.loading.buffers import BufferPool
from actcache.loading.order import MixtureOrder
from actcache.loading.stream import GROUP_CHUNKS, RowStream, StreamConfig
from actcache.store.cache import Cache


class Mixture(Batches):
    """Shuffled batches of several caches that hold the same hooks.

    Passes, `at`, threads, pickling and the workers of a torch DataLoader are as for Loader.

    The rows of a cache come in the order in which a Loader gives them. After t batches of b rows, each cache has given
    its share of t * b rows, rounded down or up; together they have given exactly t * b. Within a batch the rows of each
    cache are spread evenly. `MixtureOrder` in actcache.loading.order defines this in exact fractions. Batch.cache is
    the number of the cache that a row comes from, and Batch.row the number of the row there.

    The mixture ends before the first row that its cache no longer has, or after `limit` rows. Each cache takes the
    memory of a Loader.

    Args:
        caches: each cache with its share, a number above zero. Shares are relative to their sum. The smallest share
            must be worth at least one row of a batch.
        hook_names: hooks that every cache holds, with one width and dtype.
        split and all others: as for Loader.

    Attributes:
        n_rows, dropped: for each cache what Loader calls by that name.
        n_steps: number of batches.
        wait_seconds: how many seconds batches have waited for rows to be decoded.

    Raises:
        ConfigError: an argument is out of range or of another type, or a hook is not alike in all caches.
        CacheMismatch: a cache lacks a hook.
        CorruptShard: a chunk that must be read for the filters is damaged.
    """

    def __init__(
        self,
        caches: Sequence[tuple[Cache, int | float | Fraction]],
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
        shares = _checked_shares(caches, batch_tokens)
        _check_hooks([cache for cache, _ in caches], config.hook_names)
        filters = [config.row_filter(cache) for cache, _ in caches]
        self.hook_names = config.hook_names
        self.n_rows, self.dropped = tuple(f.n_rows for f in filters), tuple(f.dropped for f in filters)
        self._order = MixtureOrder(shares, [epochs * n for n in self.n_rows], batch_tokens=batch_tokens, limit=limit)
        streams = [
            RowStream(cache, config, row_filter, batch_rows=batch_tokens, limit=given)
            for (cache, _), row_filter, given in zip(caches, filters, self._order.totals().tolist(), strict=True)
        ]
        self._mixer = _Mixer([caches[0][0].hook(hook_name) for hook_name in self.hook_names], batch_tokens)
        self._rank, self._world_size = rank, world_size
        super().__init__(streams, n_steps=self._order.n_steps, batch_tokens=batch_tokens, start_step=start_step)

    def batch(self, step: int) -> Batch:
        owners = self._order.owners(step)
        n_rows = min(len(owners), self._order.n_stream_rows - step * len(owners))
        part = rank_part(n_rows, self._rank, self._world_size)
        n_streams = len(self._streams)
        starts = self._order.given(step) + np.bincount(owners[: part.start], minlength=n_streams)
        owner = owners[part.start : part.stop]
        stops = starts + np.bincount(owner, minlength=n_streams)
        batches = [
            stream.rows(start, stop, step=step)
            for stream, start, stop in zip(self._streams, starts.tolist(), stops.tolist(), strict=True)
        ]
        return self._mixer.mixed(batches, owner)


class _Mixer:
    """Makes one batch out of the batches of several caches."""

    def __init__(self, hooks: Sequence[HookSpec], batch_rows: int):
        self._dtypes = {hook.hook_name: hook.dtype for hook in hooks}
        self._memory = {
            hook.hook_name: BufferPool(batch_rows, (hook.d_in,), STORAGE_DTYPE[hook.dtype]) for hook in hooks
        }

    def mixed(self, batches: Sequence[Batch], owner: Int64[np.ndarray, " batch"]) -> Batch:
        """One batch with the rows of all. owner: for each row, the number of the batch that gives its next row."""
        target_rows = [np.flatnonzero(owner == number) for number in range(len(batches))]
        order = torch.from_numpy(np.argsort(np.concatenate(target_rows)))  # the inverse: which row goes to each place
        return Batch(
            x={name: self._mixed_x(name, [batch.x[name] for batch in batches], target_rows) for name in self._dtypes},
            row=torch.cat([batch.row for batch in batches])[order],
            step=batches[0].step,
            token_id=_mixed_field([batch.token_id for batch in batches], order),
            document=_mixed_field([batch.document for batch in batches], order),
            sequence=_mixed_field([batch.sequence for batch in batches], order),
            position=_mixed_field([batch.position for batch in batches], order),
            cache=torch.from_numpy(owner),
        )

    def _mixed_x(
        self, hook_name: str, parts: Sequence[Float[Tensor, "_ d_in"]], target_rows: Sequence[Int64[np.ndarray, " _"]]
    ) -> Float[Tensor, "batch d_in"]:
        if parts[0].device.type != "cpu":
            order = torch.from_numpy(np.argsort(np.concatenate(target_rows))).to(parts[0].device)
            return torch.cat(list(parts)).index_select(0, order)
        mixed = self._memory[hook_name].acquire(sum(map(len, target_rows)))
        for part, rows in zip(parts, target_rows, strict=True):
            mixed[rows] = storage_view(part)
        return tensor_view(mixed, self._dtypes[hook_name])


def _mixed_field(parts: Sequence[Tensor | None], order: Int64[Tensor, " batch"]) -> Int32[Tensor, " batch"] | None:
    fields = [part for part in parts if part is not None]
    return torch.cat(fields)[order] if fields else None


def _checked_shares(caches: Sequence[tuple[Cache, int | float | Fraction]], batch_tokens: int) -> list[Fraction]:
    """The shares of the caches as exact fractions.

    Raises ConfigError if one is not above 0 or is worth less than a row of a batch.
    """
    shares = [share for cache, share in typed("mixture", "caches", caches, Sequence[tuple])]
    for cache, _ in caches:
        typed("mixture", "cache", cache, Cache)
    is_number = [isinstance(share, Real) and not isinstance(share, bool) for share in shares]
    if not shares or not all(is_number) or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ConfigError(f"mixture: needs caches, each with a finite share above 0, got shares {list(shares)}")
    exact = [Fraction(share) for share in shares]
    if min(exact) * batch_tokens < sum(exact):
        raise ConfigError(
            f"mixture: the smallest share must be worth a row of a batch of {batch_tokens}, got shares {list(shares)}; "
            "raise it, or batch_tokens"
        )
    return exact


def _check_hooks(caches: Sequence[Cache], hook_names: Sequence[str]) -> None:
    """Compare the caches hook by hook.

    Raises ConfigError if a hook has another width or dtype in another cache, CacheMismatch if a cache lacks it.
    """
    for hook_name in hook_names:
        specs = [cache.hook(hook_name) for cache in caches]
        for cache, spec in zip(caches, specs, strict=True):
            if (spec.d_in, spec.dtype) != (specs[0].d_in, specs[0].dtype):
                raise ConfigError(
                    f"mixture: {hook_name} must be alike in every cache, is {specs[0].d_in} wide in {specs[0].dtype} "
                    f"in {caches[0].path} and {spec.d_in} wide in {spec.dtype} in {cache.path}"
                )
