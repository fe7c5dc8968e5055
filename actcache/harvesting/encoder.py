"""`ShardEncoder`: writes the shard files of a full window.

Threads copy chunks to the host, encode them and take their statistics; one thread writes them in order. On CUDA a chunk
is copied, on a stream of its own, into one of a few pinned buffers; the buffer is used again only after the chunk has
been written. On a CPU the window itself is read. Either way at most `threads + 2` chunks are in work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from actcache.errors import NonFiniteActivations
from actcache.files import write_atomically
from actcache.format.arrays import ArraySpec, hook_arrays, token_arrays
from actcache.format.codecs import codec, crc32c, float32_values
from actcache.format.dtypes import storage_view
from actcache.format.manifest import Plan
from actcache.format.paths import STORE, partials_key, shard_key
from actcache.format.records import ArrayRecord, HookSpec, ShardRecord
from actcache.format.stats import ROW_FILTERS, Moments, chunk_moments
from actcache.harvesting.window import Window
from actcache.machine.limits import thread_pool
from actcache.store.shard import Shard
from actcache.store.shard_file import EncodedChunk, chunk_slices, encode_chunk, write_encoded_shard, write_shard
from actcache.store.statistics import partials_payload

PART_ALIGNMENT = 16  # bytes; a view of any dtype may begin there


@dataclass(slots=True)
class StageSeconds:
    """Seconds that the stages after the model were busy.

    copy: from device to host. encode: statistics, compression and checksums, summed over the threads. write: writing
    and fsyncing files.
    """

    copy: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One encoded chunk of an array. moments: row filter -> moments of its rows; empty if they were not asked for."""

    encoded: EncodedChunk
    moments: dict[str, Moments]
    seconds: StageSeconds


class ShardEncoder:
    """Writes one window after another. It has encoder threads of its own; one thread at a time may call `write`."""

    def __init__(self, root: Path, plan: Plan, device: torch.device, compute: dict[str, Any], n_threads: int):
        """Start the threads.

        Args:
            root: the folder of the cache.
            plan: its plan.
            device: where the windows are.
            compute: how the activations are computed, for the records.
            n_threads: threads that encode.
        """
        self._root, self._identity, self._compute = root, plan.identity, compute
        self._codec = codec(plan.identity["codec"])
        self._special = np.array(plan.identity["special_token_ids"], dtype=np.int32)
        self._threads, self._ahead = thread_pool(n_threads, "actcache-encode"), n_threads + 1
        self._ring = _PinnedRing(self._ahead + 1, device) if device.type == "cuda" else None
        self._waited = 0.0
        self.seconds = StageSeconds()

    def write(self, shard: Shard, window: Window, *, with_tokens: bool, ready: torch.cuda.Event | None) -> ShardRecord:
        """Write the arrays and the partial statistics of a shard.

        Args:
            shard: which shard.
            window: its rows, in stored order.
            with_tokens: whether the token arrays are written too.
            ready: on CUDA, an event after the last scatter into the window; None on a CPU.

        Returns:
            the record for the journal.

        Raises:
            NonFiniteActivations: a value is NaN or infinite; the message names the tokens. The file of that hook is not
                made.
        """
        started, waited = time.perf_counter(), self._waited
        if self._ring is not None:
            self._ring.wait_for(ready)
        columns = shard.token_columns
        special = np.isin(columns[0], self._special)
        arrays: dict[str, ArrayRecord] = self._write_tokens(shard, columns) if with_tokens else {}
        partials: dict[str, int] = {}
        for hook in shard.hooks:
            found, moments = self._write_hook(shard, hook, window.stored[hook.hook_name], special)
            arrays |= found
            partials |= self._write_partials(shard, hook, moments)
        self.seconds.write += time.perf_counter() - started - (self._waited - waited)
        return ShardRecord(
            split=shard.split,
            index=shard.index,
            first_token=shard.first_token,
            n_rows=shard.n_rows,
            hooks=shard.hooks,
            arrays=arrays,
            partials=partials,
            compute=self._compute,
            revision=shard.revision,
        )

    def close(self) -> None:
        """Stop the encoder threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _write_tokens(self, shard: Shard, columns: Sequence[np.ndarray]) -> dict[str, ArrayRecord]:
        arrays = token_arrays(self._identity["shard_rows"])
        return {
            array.path: write_shard(
                self._path(shard, array),
                array,
                self._codec,
                (column[rows] for rows in chunk_slices(array, shard.n_rows)),
                self._identity["shard_rows"],
            )
            for array, column in zip(arrays, columns, strict=True)
        }

    def _write_hook(
        self, shard: Shard, hook: HookSpec, window: Sequence[Tensor], special: Bool[np.ndarray, " row"]
    ) -> tuple[dict[str, ArrayRecord], dict[str, Moments]]:
        """Write the arrays of a hook. Its moments are taken with the first array, from the elements of all arrays."""
        moments = {row_filter: Moments.empty(hook.d_in) for row_filter in ROW_FILTERS}
        records: dict[str, ArrayRecord] = {}
        for number, array in enumerate(hook_arrays(hook, self._codec, self._identity["chunk_rows"])):
            parts = window if number == 0 else window[number : number + 1]
            chunks = self._in_order(
                partial(self._submit, shard, hook, array, parts, rows, special[rows] if number == 0 else None)
                for rows in chunk_slices(array, shard.n_rows)
            )
            payloads = self._merging(chunks, moments)
            records[array.path] = write_encoded_shard(
                self._path(shard, array), array, payloads, self._identity["shard_rows"]
            )
        return records, moments

    def _submit(
        self,
        shard: Shard,
        hook: HookSpec,
        array: ArraySpec,
        window: Sequence[Tensor],
        rows: slice,
        special: Bool[np.ndarray, " row"] | None,
    ) -> Future[_Chunk]:
        """Start to copy and encode `rows` of window[0]. With `special`, their moments are taken too, from all parts."""
        parts = [part[rows] for part in window]
        copied = self._ring.copied(parts) if self._ring is not None else _OnHost(parts)
        return self._threads.submit(self._encoded, shard, hook, array, copied, rows, special)

    def _encoded(
        self,
        shard: Shard,
        hook: HookSpec,
        array: ArraySpec,
        copied: _OnHost,
        rows: slice,
        special: Bool[np.ndarray, " row"] | None,
    ) -> _Chunk:
        copy_seconds = copied.finished()
        started = time.perf_counter()
        stored = [storage_view(part) for part in copied.parts]
        moments = {} if special is None else _finite_moments(shard, hook, stored, rows, special)
        encoded = encode_chunk(stored[0], array, self._codec)
        return _Chunk(encoded, moments, StageSeconds(copy=copy_seconds, encode=time.perf_counter() - started))

    def _in_order(self, submits: Iterable[Callable[[], Future[_Chunk]]]) -> Iterator[_Chunk]:
        """The chunks in order. At most `self._ahead` later chunks are in work.

        A chunk is written before the next one is started, because it may still lie in a pinned buffer.
        """
        pending: deque[Future[_Chunk]] = deque()
        for submit in submits:
            pending.append(submit())
            if len(pending) > self._ahead:
                yield self._awaited(pending.popleft())
        while pending:
            yield self._awaited(pending.popleft())

    def _awaited(self, future: Future[_Chunk]) -> _Chunk:
        started = time.perf_counter()
        chunk = future.result()
        self._waited += time.perf_counter() - started
        return chunk

    def _merging(self, chunks: Iterable[_Chunk], moments: dict[str, Moments]) -> Iterator[EncodedChunk]:
        """The encoded chunks. Moments merge in the order of the chunks, so that equal shards give equal bits."""
        for chunk in chunks:
            for row_filter, found in chunk.moments.items():
                moments[row_filter] = moments[row_filter].merge(found)
            self.seconds.copy += chunk.seconds.copy
            self.seconds.encode += chunk.seconds.encode
            yield chunk.encoded

    def _path(self, shard: Shard, array: ArraySpec) -> Path:
        return self._root / STORE / shard.split / shard_key(array, shard.index)

    def _write_partials(self, shard: Shard, hook: HookSpec, moments: dict[str, Moments]) -> dict[str, int]:
        payload = partials_payload(moments)
        key = partials_key(shard.split, shard.index, hook.hook_name)
        write_atomically(self._root / key, [payload])
        return {key: crc32c(payload)}


@dataclass(frozen=True, slots=True)
class _OnHost:
    """Parts of a chunk in host memory. copy: on CUDA, events at the beginning and the end of the copy."""

    parts: Sequence[Tensor]
    copy: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def finished(self) -> float:
        """Wait for the copy; returns the seconds that it took on the device."""
        if self.copy is None:
            return 0.0
        begun, ended = self.copy
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3


class _PinnedRing:
    """Pinned buffers that are used in turn. Chunks are copied into them on a stream of their own, beside the model."""

    def __init__(self, n_slots: int, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._slots = [torch.empty(0, dtype=torch.uint8)] * n_slots
        self._turn = 0

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Let all later copies begin after this event."""
        if event is not None:
            self._stream.wait_event(event)

    def copied(self, parts: Sequence[Tensor]) -> _OnHost:
        """Start to copy the parts into the next buffer. The chunk that was there before must have been written."""
        slot = self._turn = (self._turn + 1) % len(self._slots)
        sizes = [-(-part.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT for part in parts]
        if self._slots[slot].numel() < sum(sizes):
            self._slots[slot] = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        host = [
            self._slots[slot][end - size : end - size + part.nbytes].view(part.dtype).view(part.shape)
            for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True)
        ]
        with torch.cuda.stream(self._stream):
            begun.record()
            for target, part in zip(host, parts, strict=True):
                target.copy_(part, non_blocking=True)
            ended.record()
        return _OnHost(host, (begun, ended))


def _finite_moments(
    shard: Shard, hook: HookSpec, stored: Sequence[np.ndarray], rows: slice, special: Bool[np.ndarray, " row"]
) -> dict[str, Moments]:
    """Row filter -> moments of a chunk.

    Raises NonFiniteActivations, naming the tokens of the rows that are not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite are named just below
        found = chunk_moments(stored, hook.dtype, special)
    if not np.isfinite(found["all"].square_norm_sum):
        finite = np.isfinite(float32_values(stored, hook.dtype)).all(axis=1)
        tokens = shard.flat_tokens[rows][~finite]
        raise NonFiniteActivations(
            f"harvest: {hook.hook_name} is NaN or infinite as {hook.dtype} for {len(tokens)} tokens between "
            f"{tokens.min()} and {tokens.max()} of {shard.split}; store another --dtype (bfloat16 reaches 3e38, "
            "float16 65504) or check the model"
        )
    return found
