"""`RowStream`: the rows of one cache, in the order of `EpochOrder`.

Two groups of chunks are in memory: one is served while the next one is decoded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64

from actcache.arguments import type_fields_
from actcache.errors import ConfigError
from actcache.flow import HOLD_OUT_MORE, Batch
from actcache.format.dtypes import TORCH_DTYPE
from actcache.loading.buffers import DECODE_THREADS, DeviceBuffers, GroupBuffer, HookBuffers, HostBuffers, will_need
from actcache.loading.filters import RowFilter
from actcache.loading.order import EpochOrder
from actcache.machine.limits import thread_pool
from actcache.store.cache import Cache
from actcache.store.reader import HookReader

GROUP_CHUNKS = 64
ORDER_BYTES = 80  # of a row in a group: its number, its place and its token fields
TOKEN_FIELDS = ("id", "document", "sequence", "position")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What of a cache is served, and in which order. Loader and Mixture have arguments of the same names."""

    hook_names: tuple[str, ...]
    split: str
    seed: int
    epochs: int
    exclude_special_tokens: bool
    positions: slice | None
    max_norm_ratio: float | None
    token_fields: tuple[str, ...]
    group_chunks: int
    device: torch.device

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is out of range or of another type."""
        type_fields_("loader", self)
        fields, ratio = self.token_fields, self.max_norm_ratio
        rules = {
            "hook_names must name at least one hook": (len(self.hook_names) > 0, self.hook_names),
            "seed must be at least 0": (self.seed >= 0, self.seed),
            "epochs must be at least 1": (self.epochs >= 1, self.epochs),
            "max_norm_ratio must be above 0, or None": (ratio is None or ratio > 0, ratio),
            f"token_fields must be some of {TOKEN_FIELDS}": (set(fields) <= set(TOKEN_FIELDS), fields),
            "group_chunks must be at least 1": (self.group_chunks >= 1, self.group_chunks),
        }
        for rule, (is_met, got) in rules.items():
            if not is_met:
                raise ConfigError(f"loader: {rule}, got {got!r}")

    def row_filter(self, cache: Cache) -> RowFilter:
        """Which rows of a cache pass.

        Raises:
            CacheMismatch: the cache lacks a hook.
            ConfigError: there is no such split, it has no rows, or the filters do not fit the cache.
            CorruptShard: a chunk that must be read for the filters is damaged.
        """
        for hook_name in self.hook_names:
            cache.hook(hook_name)
        if cache.n_rows(self.split) == 0:
            way_out = HOLD_OUT_MORE if self.split == "validation" else "harvest with a smaller --holdout"
            raise ConfigError(f"loader: {self.split} holds no rows; {way_out}, or load the other split")
        return RowFilter(
            cache,
            self.split,
            self.hook_names,
            exclude_special_tokens=self.exclude_special_tokens,
            positions=self.positions,
            max_norm_ratio=self.max_norm_ratio,
        )


def hook_bytes(cache: Cache, split: str, hook_name: str, *, batch_rows: int, group_chunks: int = GROUP_CHUNKS) -> int:
    """The most memory that a stream of these rows takes for one hook: its buffers and the order of their rows.

    Three groups of rows may be there at once, with the row numbers and fields of two. Beside them there are a chunk for
    each thread that decodes, and a batch that lies in two groups.
    """
    chunk_rows, hook = cache.manifest.chunk_rows, cache.hook(hook_name)
    group_rows = min(group_chunks, -(-cache.n_rows(split) // chunk_rows)) * chunk_rows
    row_bytes, loose_rows = hook.d_in * TORCH_DTYPE[hook.dtype].itemsize, DECODE_THREADS * chunk_rows + batch_rows
    return (3 * group_rows + loose_rows) * row_bytes + 2 * ORDER_BYTES * group_rows + cache.n_rows(split) // 8


class RowStream:
    """The rows of one cache that pass the filters, epoch after epoch, as one stream.

    It may be read from any position on; reading on from there costs the least. Arrays and threads are opened when rows
    are asked for, so that a stream can be closed and read again, forked, and pickled.
    """

    def __init__(
        self, cache: Cache, config: StreamConfig, row_filter: RowFilter, *, batch_rows: int, limit: int | None = None
    ):
        """Nothing is opened before it is read.

        Args:
            cache: the cache.
            config: what is served, and in which order.
            row_filter: which rows pass; `config.row_filter(cache)`.
            batch_rows: the most rows that are asked for at once.
            limit: rows after which the stream ends; None for the end of the last epoch.
        """
        self.order = EpochOrder(
            row_filter.n_passing.tolist(),
            seed=config.seed,
            epochs=config.epochs,
            batch_tokens=batch_rows,
            group_chunks=config.group_chunks,
            limit=limit,
        )
        self._cache, self._config, self._filter = cache, config, row_filter
        self._waited = 0.0
        self._decoder: GroupDecoder | None = None

    @property
    def wait_seconds(self) -> float:
        """How many seconds rows were waited for."""
        return self._waited + (0.0 if self._decoder is None else self._decoder.wait_seconds)

    def rows(self, start: int, stop: int, *, step: int) -> Batch:
        """Rows [start, stop) of the stream.

        Raises CorruptShard for a damaged chunk of their groups. step: Batch.step.
        """
        decoder = self.opened()
        parts: dict[str, list[Sequence[Any]]] = {name: [] for name in decoder.buffers}
        row, fields = (
            [np.empty(0, dtype=np.int64)],
            {name: [np.empty(0, dtype=np.int32)] for name in self._config.token_fields},
        )
        for part in self.order.span(start, stop):
            decoded = decoder.group((part.epoch, part.group))
            for name, group in decoded.buffers.items():
                parts[name].append(group.rows(part.start, part.stop))
            row.append(decoded.row[part.start : part.stop])
            for name, values in decoded.fields.items():
                fields[name].append(values[part.start : part.stop])
        tokens = {name: torch.from_numpy(np.concatenate(values)) for name, values in fields.items()}
        return Batch(
            x={name: buffers.values(parts[name]) for name, buffers in decoder.buffers.items()},
            row=torch.from_numpy(np.concatenate(row)),
            step=step,
            token_id=tokens.get("id"),
            document=tokens.get("document"),
            sequence=tokens.get("sequence"),
            position=tokens.get("position"),
        )

    def opened(self) -> GroupDecoder:
        """The decoder of this process. A forked child makes one, because it cannot use that of its parent."""
        if self._decoder is None or self._decoder.pid != os.getpid():
            self._decoder = GroupDecoder(self._cache, self._config, self._filter, self.order)
        return self._decoder

    def close(self) -> None:
        """Stop the threads and free the memory of the groups."""
        self._waited = self.wait_seconds
        decoder, self._decoder = self._decoder, None
        if decoder is not None and decoder.pid == os.getpid():
            decoder.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}


class GroupDecoder:
    """Decodes the groups of a stream with threads: the one that is asked for, and the one after it.

    Attributes:
        pid: the process that made it.
        buffers: hook name -> what makes the buffers of its rows.
        wait_seconds: how many seconds groups were waited for.
    """

    def __init__(self, cache: Cache, config: StreamConfig, row_filter: RowFilter, order: EpochOrder):
        """Open the arrays. The arguments are those of RowStream, and its order."""
        self.pid, self.wait_seconds = os.getpid(), 0.0
        self._order, self._filter = order, row_filter
        self._chunk_rows, self._n_stored_rows = cache.manifest.chunk_rows, cache.n_rows(config.split)
        row_filter.open_readers()
        self._fields = _TokenFields(cache, config.split, config.token_fields)
        self._readers = {name: cache.hook_reader(config.split, name) for name in config.hook_names}
        n_chunks = min(config.group_chunks, len(row_filter.n_passing))
        buffers = DeviceBuffers if config.device.type == "cuda" else HostBuffers
        self.buffers: dict[str, HookBuffers] = {
            name: buffers(reader, config.device, group_chunks=n_chunks) for name, reader in self._readers.items()
        }
        self._threads = thread_pool(DECODE_THREADS, "actcache-decode")
        self._layouts: dict[tuple[int, int], Future[_GroupLayout]] = {}
        self._decoding: dict[tuple[int, int], _DecodingGroup] = {}
        self._free_groups: list[dict[str, GroupBuffer]] = []
        self._current: _DecodedGroup | None = None

    def group(self, key: tuple[int, int]) -> _DecodedGroup:
        """The decoded group. The group after it begins to decode, in the buffers of the group before."""
        if self._current is None or self._current.key != key:
            started = time.perf_counter()
            self._current = None
            for other in [other for other in self._decoding if other != key]:
                self._free_groups.append(self._decoding.pop(other).stopped())
            self._start(key)
            following = self._order.following(*key)
            if following is not None:
                self._start(following)
            self._current = self._decoding[key].result(key)
            self.wait_seconds += time.perf_counter() - started
        return self._current

    def wait_until_idle(self) -> None:
        """Wait for what is decoded ahead."""
        wait(self._layouts.values())
        wait([decode for decoding in self._decoding.values() for decode in decoding.decodes])

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: tuple[int, int]) -> None:
        """Let the threads decode a group, unless they do already. The layout of the group after it is made as well."""
        if key in self._decoding:
            return
        groups = self._free_groups.pop() if self._free_groups else {n: b.new_group() for n, b in self.buffers.items()}
        chunks, following = self._order.chunks(*key).tolist(), self._order.following(*key)
        keys = [key] if following is None else [key, following]  # so that no chunk waits for the layout of its group
        self._layouts = {each: self._layouts.get(each) or self._threads.submit(self._layout, each) for each in keys}
        layout = self._layouts[key]
        expected = self._threads.submit(_expect, groups, layout)
        decodes = [
            self._threads.submit(_decode, group, self._readers[name], chunks, number, expected)
            for number in range(len(chunks))
            for name, group in groups.items()
        ]
        self._decoding[key] = _DecodingGroup(groups, layout, expected, decodes)

    def _layout(self, key: tuple[int, int]) -> _GroupLayout:
        chunks = self._order.chunks(*key).tolist()
        firsts = range(0, len(chunks) * self._chunk_rows, self._chunk_rows)
        passing = [first + np.flatnonzero(self._filter.rows(c)) for first, c in zip(firsts, chunks, strict=True)]
        rows_in_order = np.concatenate(passing)[self._order.rows(*key)]
        target_rows = np.full(len(chunks) * self._chunk_rows, len(rows_in_order))
        target_rows[rows_in_order] = np.arange(len(rows_in_order))
        row = np.add.outer(np.array(chunks) * self._chunk_rows, np.arange(self._chunk_rows)).ravel()[rows_in_order]
        return _GroupLayout(target_rows, row, self._token_fields(chunks, rows_in_order))

    def _token_fields(
        self, chunks: Sequence[int], rows_in_order: Int64[np.ndarray, " served"]
    ) -> dict[str, Int32[np.ndarray, " served"]]:
        """The token fields of the rows of a group, in the order in which these are served."""
        stored = {name: np.empty(len(chunks) * self._chunk_rows, dtype=np.int32) for name in self._fields.names}
        for number, chunk in enumerate(chunks if stored else ()):
            start, stop = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self._n_stored_rows)
            for name, values in self._fields.read(start, stop).items():
                stored[name][number * self._chunk_rows :][: stop - start] = values
        return {name: values[rows_in_order] for name, values in stored.items()}


@dataclass(frozen=True, slots=True)
class _GroupLayout:
    """Everything about the rows of a group except their activations.

    target_rows: as for `GroupBuffer.expect`; rows that are not served have the number after the last served row.
    row, fields: row numbers and token fields, in the order in which the rows are served.
    """

    target_rows: Int64[np.ndarray, " stored"]
    row: Int64[np.ndarray, " served"]
    fields: dict[str, Int32[np.ndarray, " served"]]


@dataclass(frozen=True, slots=True)
class _DecodedGroup:
    """A group whose rows can be served. key: (epoch, group). buffers: by hook name."""

    key: tuple[int, int]
    buffers: dict[str, GroupBuffer]
    row: Int64[np.ndarray, " served"]
    fields: dict[str, Int32[np.ndarray, " served"]]


@dataclass(frozen=True, slots=True)
class _DecodingGroup:
    """A group that the threads decode: its buffers by hook name, and the work that the threads were given."""

    buffers: dict[str, GroupBuffer]
    layout: Future[_GroupLayout]
    expected: Future[None]
    decodes: list[Future[None]]

    def result(self, key: tuple[int, int]) -> _DecodedGroup:
        """Wait until the group is decoded. Raises CorruptShard."""
        layout = self.layout.result()
        for future in (self.expected, *self.decodes):
            future.result()
        for group in self.buffers.values():
            group.finish()
        return _DecodedGroup(key, self.buffers, layout.row, layout.fields)

    def stopped(self) -> dict[str, GroupBuffer]:
        """Cancel what the threads have not begun and wait for the rest. Returns the buffers, for another group."""
        futures: list[Future[Any]] = [self.expected, *self.decodes]
        wait([future for future in futures if not future.cancel()])
        for group in self.buffers.values():
            group.release()
        return self.buffers


class _TokenFields:
    """Reads the token fields that are asked for, which are some of TOKEN_FIELDS."""

    def __init__(self, cache: Cache, split: str, names: tuple[str, ...]):
        self.names = names
        stored = {"sequence", "position"} if "document" in names else set()
        self._stored = {name: cache.token_reader(split, name) for name in (stored | set(names)) - {"document"}}
        self._documents = cache.sequence_reader(split, "document")

    def read(self, start: int, stop: int) -> dict[str, Int32[np.ndarray, " row"]]:
        """The token fields of rows [start, stop). Documents are read for the sequences of these rows alone."""
        found = {name: reader.read(start, stop) for name, reader in self._stored.items()}
        if "document" in self.names:
            sequence = found["sequence"]
            first = int(sequence.min())
            documents = self._documents.read(first, int(sequence.max()) + 1)
            found["document"] = documents[sequence - first, found["position"]]
        return {name: found[name] for name in self.names}


def _expect(groups: dict[str, GroupBuffer], layout: Future[_GroupLayout]) -> None:
    for group in groups.values():
        group.expect(layout.result().target_rows)


def _decode(group: GroupBuffer, reader: HookReader, chunks: Sequence[int], number: int, expected: Future[None]) -> None:
    will_need(reader, chunks, number)
    expected.result()
    group.decode_chunk(number, chunks[number])
