"""order x reader -> the rows of one cache, in order. Two groups of chunks are in memory: one is served, one decodes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64

from actcache.errors import ConfigError
from actcache.flow import SPLITS, Batch
from actcache.loading.buffers import DECODE_THREADS, DeviceBuffers, GroupBuffer, HookBuffers, HostBuffers, will_need
from actcache.loading.filters import RowFilter
from actcache.loading.order import EpochOrder
from actcache.store.cache import Cache, sequence_reader
from actcache.store.reader import HookReader

GROUP_CHUNKS = 64
TOKEN_FIELDS = ("id", "document", "sequence", "position")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What of a cache is served, and in which order; the arguments of the same names of Loader and Mixture."""

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
        """Raises ConfigError for a value that is out of range."""
        fields, ratio = self.token_fields, self.max_norm_ratio
        rules = {
            f"split must be one of {SPLITS}": (self.split in SPLITS, self.split),
            "hook_names must name at least one hook": (len(self.hook_names) > 0, self.hook_names),
            "seed must be at least 0": (self.seed >= 0, self.seed),
            "epochs must be at least 1": (self.epochs >= 1, self.epochs),
            "max_norm_ratio must be above 0, or None": (ratio is None or ratio > 0, ratio),
            f"token_fields must be some of {TOKEN_FIELDS}": (set(fields) <= set(TOKEN_FIELDS), fields),
            "group_chunks must be at least 1": (self.group_chunks >= 1, self.group_chunks),
        }
        for rule, (kept, got) in rules.items():
            if not kept:
                raise ConfigError(f"loader: {rule}, got {got!r}")

    def row_filter(self, cache: Cache) -> RowFilter:
        """Which rows of a cache pass. Raises CacheMismatch for a hook, ConfigError for rows that the cache lacks."""
        for hook_name in self.hook_names:
            cache.hook(hook_name)
        if cache.n_rows(self.split) == 0:
            raise ConfigError(
                f"loader: {self.split} holds no rows; harvest with a larger holdout, or load the other split"
            )
        return RowFilter(
            cache,
            self.split,
            self.hook_names,
            exclude_special_tokens=self.exclude_special_tokens,
            positions=self.positions,
            max_norm_ratio=self.max_norm_ratio,
        )


class RowStream:
    """The rows of one cache that pass a filter, epoch after epoch, as one line; made for positions that grow."""

    def __init__(
        self, cache: Cache, config: StreamConfig, row_filter: RowFilter, *, batch_rows: int, limit: int | None = None
    ):
        """batch_rows: the most rows that are asked at once. limit: where the line ends, if before its epochs do."""
        self.order = EpochOrder(
            row_filter.kept.tolist(),
            seed=config.seed,
            epochs=config.epochs,
            batch_tokens=batch_rows,
            group_chunks=config.group_chunks,
            limit=limit,
        )
        self.wait_seconds = 0.0
        self._cache, self._config, self._filter = cache, config, row_filter
        self._chunk_rows, self._n_stored_rows = cache.manifest.chunk_rows, cache.n_rows(config.split)
        self._served: _Served | None = None
        self._open()

    def rows(self, start: int, stop: int, *, step: int) -> Batch:
        """Rows [start, stop) of the line. Raises CorruptShard for a damaged chunk of their groups."""
        parts: dict[str, list[Sequence[Any]]] = {name: [] for name in self._rooms}
        row, fields = (
            [np.empty(0, dtype=np.int64)],
            {name: [np.empty(0, dtype=np.int32)] for name in self._fields.names},
        )
        for part in self.order.span(start, stop):
            served = self._group((part.epoch, part.group))
            for name, group in served.groups.items():
                parts[name].append(group.rows(part.start, part.stop))
            row.append(served.row[part.start : part.stop])
            for name, values in served.fields.items():
                fields[name].append(values[part.start : part.stop])
        tokens = {name: torch.from_numpy(np.concatenate(values)) for name, values in fields.items()}
        return Batch(
            x={name: room.values(parts[name]) for name, room in self._rooms.items()},
            row=torch.from_numpy(np.concatenate(row)),
            step=step,
            token_id=tokens.get("id"),
            document=tokens.get("document"),
            sequence=tokens.get("sequence"),
            position=tokens.get("position"),
        )

    def close(self) -> None:
        """Stop the threads and let the groups go."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._places.clear()
        self._loading.clear()
        self._vacant.clear()
        self._served = None

    def _open(self) -> None:
        """Readers, room and threads, of which a forked child can use none of its parent's."""
        config = self._config
        self._pid = os.getpid()
        self._filter.open_readers()
        self._fields = _TokenFields(self._cache, config.split, config.token_fields)
        self._readers = {name: self._cache.hook_reader(config.split, name) for name in config.hook_names}
        n_chunks = min(config.group_chunks, len(self._filter.kept))
        self._rooms = {name: _room(reader, config.device, n_chunks) for name, reader in self._readers.items()}
        self._threads = ThreadPoolExecutor(DECODE_THREADS, "actcache-decode")
        self._places: dict[tuple[int, int], Future[_Places]] = {}
        self._loading: dict[tuple[int, int], _Loading] = {}
        self._vacant: list[dict[str, GroupBuffer]] = []

    def _group(self, key: tuple[int, int]) -> _Served:
        """The decoded group; the one after it starts to decode, in the room of the one before."""
        if self._served is None or self._served.key != key:
            started = time.perf_counter()
            self._served = None
            if self._pid != os.getpid():
                self._open()
            for other in [other for other in self._loading if other != key]:
                self._vacant.append(self._loading.pop(other).stopped())
            self._load(key)
            following = self.order.following(*key)
            if following is not None:
                self._load(following)
            self._served = self._loading[key].result(key)
            self.wait_seconds += time.perf_counter() - started
        return self._served

    def _load(self, key: tuple[int, int]) -> None:
        if key in self._loading:
            return
        groups = self._vacant.pop() if self._vacant else {name: room.new_group() for name, room in self._rooms.items()}
        chunks, following = self.order.chunks(*key).tolist(), self.order.following(*key)
        keys = [key] if following is None else [key, following]  # or its chunks would have to wait for their places
        self._places = {each: self._places.get(each) or self._threads.submit(self._placed, each) for each in keys}
        places = self._places[key]
        expected = self._threads.submit(_expect, groups, places)
        puts = [
            self._threads.submit(_put, group, self._readers[name], chunks, number, expected)
            for number in range(len(chunks))
            for name, group in groups.items()
        ]
        self._loading[key] = _Loading(groups, places, expected, puts)

    def _placed(self, key: tuple[int, int]) -> _Places:
        chunks = self.order.chunks(*key).tolist()
        firsts = range(0, len(chunks) * self._chunk_rows, self._chunk_rows)
        kept = [first + np.flatnonzero(self._filter.rows(c)) for first, c in zip(firsts, chunks, strict=True)]
        served = np.concatenate(kept)[self.order.rows(*key)]
        joined = np.full(len(chunks) * self._chunk_rows, len(served))
        joined[served] = np.arange(len(served))
        row = np.add.outer(np.array(chunks) * self._chunk_rows, np.arange(self._chunk_rows)).ravel()[served]
        return _Places(joined, row, self._token_fields(chunks, served))

    def _token_fields(self, chunks: Sequence[int], served: Int64[np.ndarray, " served"]) -> dict[str, np.ndarray]:
        joined = {name: np.empty(len(chunks) * self._chunk_rows, dtype=np.int32) for name in self._fields.names}
        for number, chunk in enumerate(chunks if joined else ()):
            start, stop = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self._n_stored_rows)
            for name, values in self._fields.read(start, stop).items():
                joined[name][number * self._chunk_rows :][: stop - start] = values
        return {name: values[served] for name, values in joined.items()}


@dataclass(frozen=True, slots=True)
class _Places:
    """What is known of a group's rows beside their activations.

    joined: as which row each row of the joined chunks is served; those that are not have the number behind the last.
    row, fields: row number and token fields, in the order in which the rows are served.
    """

    joined: Int64[np.ndarray, " joined"]
    row: Int64[np.ndarray, " served"]
    fields: dict[str, Int32[np.ndarray, " served"]]


@dataclass(frozen=True, slots=True)
class _Served:
    """A group that is there."""

    key: tuple[int, int]
    groups: dict[str, GroupBuffer]
    row: Int64[np.ndarray, " served"]
    fields: dict[str, Int32[np.ndarray, " served"]]


@dataclass(frozen=True, slots=True)
class _Loading:
    """A group on its way: its room by hook, and what the threads do for it."""

    groups: dict[str, GroupBuffer]
    places: Future[_Places]
    expected: Future[None]
    puts: list[Future[None]]

    def result(self, key: tuple[int, int]) -> _Served:
        """Wait for it."""
        places = self.places.result()
        for done in (self.expected, *self.puts):
            done.result()
        for group in self.groups.values():
            group.finish()
        return _Served(key, self.groups, places.row, places.fields)

    def stopped(self) -> dict[str, GroupBuffer]:
        """Its room, in which nothing is written any more."""
        futures: list[Future[Any]] = [self.expected, *self.puts]
        wait([future for future in futures if not future.cancel()])
        for group in self.groups.values():
            group.release()
        return self.groups


class _TokenFields:
    """Reads what is asked of TOKEN_FIELDS."""

    def __init__(self, cache: Cache, split: str, names: tuple[str, ...]):
        self.names = names
        stored = {"sequence", "position"} if "document" in names else set()
        self._stored = {name: cache.token_reader(split, name) for name in (stored | set(names)) - {"document"}}
        self._documents = sequence_reader(cache.path, cache.manifest.plan, split, "document")

    def read(self, start: int, stop: int) -> dict[str, Int32[np.ndarray, " row"]]:
        """The fields of rows [start, stop); of the documents, those of the sequences that are met."""
        found = {name: reader.read(start, stop) for name, reader in self._stored.items()}
        if "document" in self.names:
            sequence = found["sequence"]
            first = int(sequence.min())
            documents = self._documents.read(first, int(sequence.max()) + 1)
            found["document"] = documents[sequence - first, found["position"]]
        return {name: found[name] for name in self.names}


def _room(reader: HookReader, device: torch.device, group_chunks: int) -> HookBuffers:
    room = DeviceBuffers if device.type == "cuda" else HostBuffers
    return room(reader, device, group_chunks=group_chunks)


def _expect(groups: dict[str, GroupBuffer], places: Future[_Places]) -> None:
    joined = places.result().joined
    for group in groups.values():
        group.expect(joined)


def _put(group: GroupBuffer, reader: HookReader, chunks: Sequence[int], number: int, expected: Future[None]) -> None:
    will_need(reader, chunks, number)
    expected.result()
    group.decode_chunk(number, chunks[number])
