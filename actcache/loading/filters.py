"""Which rows of a split are served: special tokens, positions and outlying norms are left out, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped, UInt8

from actcache.errors import ConfigError
from actcache.format.codecs import float32_values
from actcache.loading.buffers import DECODE_THREADS, will_need
from actcache.store.cache import Cache

FILTERS = ("exclude_special_tokens", "positions", "max_norm_ratio")

_SPAN_ROWS = 1 << 16
_BLOCK_ELEMENTS = 1 << 16


class RowFilter:
    """Which rows pass, chunk by chunk; the same for every hook that is asked.

    kept: how many rows of each chunk pass; n_rows: of all of them. dropped: for each of FILTERS, in this order, how
    many rows it is the first to drop, so that n_rows + sum(dropped.values()) is what the split stores.
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
        """Count; for max_norm_ratio every chunk of the hooks is decoded once, and a bit of every row is kept.

        Raises:
            ConfigError: `positions` leaves none, or there is no row to take the median norm of.
            CorruptShard: a chunk is damaged.
        """
        self._cache, self._split = cache, split
        self._n_rows, self._chunk_rows = cache.n_rows(split), cache.manifest.chunk_rows
        self._special = np.array(cache.special_token_ids if exclude_special_tokens else (), dtype=np.int32)
        self._allowed = _allowed_positions(positions, cache.context_size)
        self.open_readers()
        self._largest_norms = _largest_norms(cache, split, hook_names, max_norm_ratio)
        self._hooks = [cache.hook_reader(split, hook_name) for hook_name in self._largest_norms]
        self._usual: dict[int, UInt8[np.ndarray, " byte"]] = {}  # chunk -> a bit a row: no norm of it is outlying
        counts = np.concatenate(self._counted())
        self.kept: Int64[np.ndarray, " chunk"] = counts[:, -1]
        self.n_rows = int(self.kept.sum())
        self.dropped: dict[str, int] = dict(zip(FILTERS, (-np.diff(counts.sum(axis=0))).tolist(), strict=True))

    def open_readers(self) -> None:
        """Open the token arrays; anew in a forked child, where a thread that is gone may hold a reader's lock."""
        self._token_ids = self._cache.token_reader(self._split, "id") if len(self._special) else None
        self._positions = None if self._allowed.all() else self._cache.token_reader(self._split, "position")

    def rows(self, chunk: int) -> Bool[np.ndarray, " row"]:
        """Which rows of a chunk pass."""
        start, stop = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self._n_rows)
        not_special, in_position = self._token_filters(start, stop)
        if not self._hooks:
            return not_special & in_position
        return not_special & in_position & np.unpackbits(self._usual[chunk], count=stop - start).view(np.bool_)

    def _token_filters(self, start: int, stop: int) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """What each of the first two filters lets pass."""
        everything = np.ones(stop - start, dtype=np.bool_)
        return (
            everything if self._token_ids is None else ~np.isin(self._token_ids.read(start, stop), self._special),
            everything if self._positions is None else self._allowed[self._positions.read(start, stop)],
        )

    def _counted(self) -> list[Int64[np.ndarray, "chunk counts"]]:
        """Of every chunk, how many rows the first 0, 1, 2 and 3 filters let pass."""
        n_chunks = -(-self._n_rows // self._chunk_rows)
        per_span = max(1, _SPAN_ROWS // self._chunk_rows)  # a token chunk is long: not once for each chunk within it
        spans = [range(first, min(first + per_span, n_chunks)) for first in range(0, n_chunks, per_span)]
        with ThreadPoolExecutor(DECODE_THREADS, "actcache-filter") as threads:
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
        """Which rows of the chunks have no outlying norm at any hook; their bits are kept."""
        usual = np.ones(n_rows, dtype=np.bool_)
        places = {chunk: usual[n * self._chunk_rows : (n + 1) * self._chunk_rows] for n, chunk in enumerate(chunks)}
        for reader in self._hooks:
            buffer = reader.empty(1)
            largest = self._largest_norms[reader.hook.hook_name]
            for chunk, rows in places.items():
                will_need(reader, chunks, chunk - chunks.start)
                reader.decode_into(chunk, buffer)
                rows &= _norms([part[: len(rows)] for part in buffer], reader.hook.dtype) <= largest
        if self._hooks:
            self._usual |= {chunk: np.packbits(rows) for chunk, rows in places.items()}
        return usual


def _allowed_positions(positions: slice | None, context_size: int) -> Bool[np.ndarray, " position"]:
    allowed = np.zeros(context_size, dtype=np.bool_)
    allowed[positions or slice(None)] = True
    if not allowed.any():
        raise ConfigError(f"positions: must leave some of the {context_size} positions of a sequence, got {positions}")
    return allowed


def _largest_norms(
    cache: Cache, split: str, hook_names: Sequence[str], max_norm_ratio: float | None
) -> dict[str, float]:
    """Hook -> the largest norm that passes; no hook if there is no limit."""
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
    """||x|| of each row in float64, so that every machine lets the same rows pass."""
    norms = np.empty(len(stored[0]))
    block = max(1, _BLOCK_ELEMENTS // stored[0].shape[1])  # in float64 they stay within the cache of a core
    for start in range(0, len(norms), block):
        x = float32_values([part[start : start + block] for part in stored], dtype).astype(np.float64)
        norms[start : start + block] = np.sqrt(np.einsum("rd,rd->r", x, x))
    return norms
