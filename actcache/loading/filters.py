"""`RowFilter`: which rows of a split are served. Special tokens, positions and outlying norms can be left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped, UInt8

from actcache.errors import ConfigError
from actcache.format.codecs import float32_values
from actcache.loading.buffers import DECODE_THREADS, will_need
from actcache.machine.limits import thread_pool
from actcache.store.cache import Cache

FILTERS = ("exclude_special_tokens", "positions", "max_norm_ratio")

_SPAN_ROWS = 1 << 16
_BLOCK_ELEMENTS = 1 << 16


class RowFilter:
    """Which rows of a split pass the filters; the same rows for every hook.

    Attributes:
        n_passing: how many rows of each chunk pass.
        n_rows: how many rows of the split pass.
        dropped: for each of FILTERS, how many rows it drops that no filter before it drops. So
            n_rows + sum(dropped.values()) is the number of rows that the split stores.
    """

    def __init__(
        self,
        cache: Cache,
        split: str,
        hook_names: Sequence[str],
        *,
        exclude_special_tokens: bool,
        positions: slice | None,
        max_norm_ratio: float | None,
    ):
        """Count the rows that pass. With `max_norm_ratio`, every chunk of the hooks is decoded once for this.

        Args:
            cache, split, hook_names: the rows, and the hooks that `max_norm_ratio` looks at.
            exclude_special_tokens, positions, max_norm_ratio: as for Loader.

        Raises:
            ConfigError: `positions` leaves no position, or the split has no row for a median norm.
            CorruptShard: a chunk is damaged.
        """
        self._cache, self._split = cache, split
        self._n_rows, self._chunk_rows = cache.n_rows(split), cache.manifest.chunk_rows
        self._special = np.array(cache.special_token_ids if exclude_special_tokens else (), dtype=np.int32)
        self._allowed = _allowed_positions(positions, cache.context_size)
        self.open_readers()
        self._largest_norms = _largest_norms(cache, split, hook_names, max_norm_ratio)
        self._hooks = [cache.hook_reader(split, hook_name) for hook_name in self._largest_norms]
        self._usual: dict[int, UInt8[np.ndarray, " byte"]] = {}  # chunk -> one bit a row: 1 if no norm is outlying
        counts = np.concatenate(self._counted())
        self.n_passing: Int64[np.ndarray, " chunk"] = counts[:, -1]
        self.n_rows = int(self.n_passing.sum())
        self.dropped: dict[str, int] = dict(zip(FILTERS, (-np.diff(counts.sum(axis=0))).tolist(), strict=True))

    def open_readers(self) -> None:
        """Open the token arrays.

        A forked child calls this again: a thread of its parent may have held a reader's lock.
        """
        self._token_ids = self._cache.token_reader(self._split, "id") if len(self._special) else None
        self._positions = None if self._allowed.all() else self._cache.token_reader(self._split, "position")

    def rows(self, chunk: int) -> Bool[np.ndarray, " row"]:
        """Which rows of a chunk pass all filters."""
        start, stop = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self._n_rows)
        not_special, in_position = self._token_filters(start, stop)
        if not self._hooks:
            return not_special & in_position
        return not_special & in_position & np.unpackbits(self._usual[chunk], count=stop - start).view(np.bool_)

    def _token_filters(self, start: int, stop: int) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """Which of rows [start, stop) the filter of special tokens lets pass, and which the filter of positions."""
        everything = np.ones(stop - start, dtype=np.bool_)
        return (
            everything if self._token_ids is None else ~np.isin(self._token_ids.read(start, stop), self._special),
            everything if self._positions is None else self._allowed[self._positions.read(start, stop)],
        )

    def _counted(self) -> list[Int64[np.ndarray, "chunk counts"]]:
        """For every chunk, how many rows pass the first 0, 1, 2 and 3 filters; one array for each span of chunks."""
        n_chunks = -(-self._n_rows // self._chunk_rows)
        per_span = max(1, _SPAN_ROWS // self._chunk_rows)  # so that a chunk of tokens, which is long, is decoded once
        spans = [range(first, min(first + per_span, n_chunks)) for first in range(0, n_chunks, per_span)]
        with thread_pool(DECODE_THREADS, "actcache-filter") as threads:
            return list(threads.map(self._count, spans))

    def _count(self, chunks: range) -> Int64[np.ndarray, "chunk counts"]:
        start, stop = chunks.start * self._chunk_rows, min(chunks.stop * self._chunk_rows, self._n_rows)
        edges = np.arange(0, stop - start, self._chunk_rows)
        passing = np.ones(stop - start, dtype=np.bool_)
        counts = [np.add.reduceat(passing, edges, dtype=np.int64)]
        for passed in (*self._token_filters(start, stop), self._usual_norms(chunks, stop - start)):
            passing = passing & passed
            counts.append(np.add.reduceat(passing, edges, dtype=np.int64))
        return np.stack(counts, axis=1)

    def _usual_norms(self, chunks: range, n_rows: int) -> Bool[np.ndarray, " row"]:
        """Which rows of consecutive chunks have no outlying norm at any hook. The answer is remembered for `rows`."""
        usual = np.ones(n_rows, dtype=np.bool_)
        parts = {chunk: usual[n * self._chunk_rows : (n + 1) * self._chunk_rows] for n, chunk in enumerate(chunks)}
        for reader in self._hooks:
            buffer = reader.empty(1)
            largest = self._largest_norms[reader.hook.hook_name]
            for chunk, is_usual in parts.items():
                will_need(reader, chunks, chunk - chunks.start)
                reader.decode_into(chunk, buffer)
                is_usual &= _norms([part[: len(is_usual)] for part in buffer], reader.hook.dtype) <= largest
        if self._hooks:
            self._usual |= {chunk: np.packbits(is_usual) for chunk, is_usual in parts.items()}
        return usual


def _allowed_positions(positions: slice | None, context_size: int) -> Bool[np.ndarray, " position"]:
    allowed = np.zeros(context_size, dtype=np.bool_)
    try:
        allowed[positions or slice(None)] = True
    except TypeError as error:  # a slice may hold anything
        raise ConfigError(f"loader: positions must be a slice of whole numbers, got {positions}") from error
    if not allowed.any():
        raise ConfigError(
            f"loader: positions must leave some of the {context_size} positions of a sequence, got {positions}"
        )
    return allowed


def _largest_norms(
    cache: Cache, split: str, hook_names: Sequence[str], max_norm_ratio: float | None
) -> dict[str, float]:
    """Hook -> the largest norm that passes; empty if `max_norm_ratio` is None."""
    if max_norm_ratio is None:
        return {}
    found = {}
    for hook_name in hook_names:
        statistics = cache.statistics(hook_name, split=split, row_filter="no_special_tokens")
        if statistics.n_rows == 0:
            raise ConfigError(f"max_norm_ratio: {split} holds only special tokens, which have no median norm; leave it")
        found[hook_name] = max_norm_ratio * statistics.norm_quantile(0.5)
    return found


def _norms(stored: Sequence[Shaped[np.ndarray, "row _"]], dtype: str) -> Float64[np.ndarray, " row"]:
    """||x|| of each row, computed in float64 so that the same rows pass on every machine."""
    norms = np.empty(len(stored[0]))
    block = max(1, _BLOCK_ELEMENTS // stored[0].shape[1])  # a block in float64 fits into the cache of a core
    for start in range(0, len(norms), block):
        x = float32_values([part[start : start + block] for part in stored], dtype).astype(np.float64)
        norms[start : start + block] = np.sqrt(np.einsum("rd,rd->r", x, x))
    return norms
