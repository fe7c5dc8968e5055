"""The one loop that runs a language model: packed sequences -> activations of every asked hook -> shards.

While the model runs shard i, a thread encodes and writes shard i - 1 from the other of two windows; a window that is
not free yet blocks the loop, so nothing is dropped and memory is bounded by two windows.
"""

from __future__ import annotations

import json
import logging
import platform
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from actcache.cache import CACHE_MANIFEST, ORIGIN, STORE, Cache, open_cache, sequence_reader
from actcache.codecs import TORCH_DTYPE, Codec, codec, crc32c, float32_values, storage_view, stored_tensors
from actcache.errors import CacheMismatch, NonFiniteActivations
from actcache.finalise import finalise, partials_key
from actcache.flow import SPLITS, ActivationBatch, TokenBatch
from actcache.journal import Journal
from actcache.manifest import (
    ArrayRecord,
    ArraySpec,
    HookSpec,
    Plan,
    ShardRecord,
    hook_arrays,
    merge_records,
    shard_key,
    token_arrays,
)
from actcache.models import LanguageModel
from actcache.order import shard_permutation
from actcache.plan import HarvestConfig, settle_plan
from actcache.stats import ROW_FILTERS, Moments, filtered_moments
from actcache.tokens import Source
from actcache.writer import chunk_slices, remove_partials, write_atomically, write_shard

JOURNAL = "manifest/writer-00.jsonl"
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
Progress = Callable[[int, int], None]

logger = logging.getLogger("actcache")


@dataclass(slots=True)
class HarvestTimes:
    """Seconds: in the forward pass, waiting for a free window, writing (beside the model), packing, in all."""

    model: float = 0.0
    wait: float = 0.0
    write: float = 0.0
    pack: float = 0.0
    total: float = 0.0
    n_tokens: int = 0


def harvest(
    model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path, *, progress: Progress | None = None
) -> Cache:
    """Run the model once over the packed dataset and write every asked hook into the cache at `out`.

    The same call after a kill continues at the first unfinished shard; a finished cache that already holds what is
    asked is opened as it is; a hook that it lacks is added over the stored sequences.

    Args:
        progress: called with (rows done, rows in all) after every forward batch.

    Raises:
        CacheMismatch: `out` holds something else; the message lists the differences.
        CacheLocked: another process is writing there.
        DatasetError, ModelError, NonFiniteActivations: see there; what is finished stays and is not redone.
    """
    root = Path(out)
    widths = model.hook_widths(config.hook_names)
    _refuse_foreign_folder(root)
    times = HarvestTimes()
    started = time.perf_counter()
    with Journal(root / JOURNAL) as journal:
        plan = settle_plan(root, model, source, config, max(widths.values()))
        times.pack = time.perf_counter() - started
        if _is_finished(root, config.hook_names):
            return open_cache(root)
        remove_partials(root)
        origin = {"model": model.source, "revision": model.identity["revision"]}
        write_atomically(root / ORIGIN, [json.dumps(origin).encode()])
        dtype = plan.identity["dtype"]
        specs = [HookSpec(hook_name=name, d_in=d_in, dtype=dtype) for name, d_in in widths.items()]
        _Harvester(root, plan, model, specs, journal, config.batch_size, times, progress).run()
        finalise(root, plan, journal.records)
        times.total = time.perf_counter() - started
        _write_log(root, model, times)
        logger.info(
            "harvested %d tokens in %.1f s: %.0f tokens/s in the model, %.1f s waiting for the writer",
            times.n_tokens,
            times.total,
            times.n_tokens / max(times.model, 1e-9),
            times.wait,
        )
    return open_cache(root)


def _refuse_foreign_folder(root: Path) -> None:
    if root.is_file():
        raise CacheMismatch(f"{root}: must be a folder for the cache, is a file; pass another --out")
    if root.exists() and not (root / JOURNAL).exists():
        held = sorted(path.name for path in root.iterdir())
        if held:
            raise CacheMismatch(f"{root}: must be empty or a cache, holds {', '.join(held[:5])}; pass another --out")


def _is_finished(root: Path, hook_names: Sequence[str]) -> bool:
    return (root / CACHE_MANIFEST).exists() and set(hook_names) <= set(open_cache(root).hook_names)


def _write_log(root: Path, model: LanguageModel, times: HarvestTimes) -> None:
    """What may differ between equal caches: when, where and how fast."""
    values = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": str(model.device),
        "seconds": asdict(times),
    }
    write_atomically(root / "log" / f"harvest-{time.time_ns()}.json", [json.dumps(values, indent=1).encode()])


class _Window:
    """The rows of one shard, in stored order, while they come in; hook tensors lie on the model's device."""

    def __init__(self, hooks: Sequence[HookSpec], codec: Codec, rows: int, device: torch.device):
        self._hooks, self._codec = {hook.hook_name: hook for hook in hooks}, codec
        self.stored = {
            hook.hook_name: tuple(
                torch.empty(rows, *array.row_shape, dtype=TORCH_DTYPE[array.dtype], device=device)
                for array in hook_arrays(hook, codec, rows)
            )
            for hook in hooks
        }

    def add(self, batch: ActivationBatch, first_token: int, permutation: Int64[Tensor, " row"]) -> None:
        """Scatter the part of a batch that belongs to the shard starting at `first_token`."""
        for hook_name, x in batch.x.items():
            rows = x.flatten(0, 1)  # (sequence * position, d_in)
            skip = max(first_token - batch.first_token, 0)
            start = max(batch.first_token - first_token, 0)
            n_rows = min(len(rows) - skip, len(permutation) - start)
            places = permutation[start : start + n_rows]
            stored = stored_tensors(rows[skip : skip + n_rows], self._hooks[hook_name].dtype, self._codec)
            for window, part in zip(self.stored[hook_name], stored, strict=True):
                window[places] = part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """One shard to be written: where it lies and what its rows are, in stored order."""

    split: str
    index: int
    first_token: int
    permutation: Int64[np.ndarray, " row"]
    token_ids: Int32[np.ndarray, " row"]
    hooks: tuple[HookSpec, ...]

    @property
    def n_rows(self) -> int:
        return len(self.permutation)

    @property
    def flat_tokens(self) -> Int64[np.ndarray, " row"]:
        """Flat token number of each stored row."""
        tokens = np.empty(self.n_rows, dtype=np.int64)
        tokens[self.permutation] = np.arange(self.first_token, self.first_token + self.n_rows)
        return tokens


class _Harvester:
    def __init__(
        self,
        root: Path,
        plan: Plan,
        model: LanguageModel,
        hooks: Sequence[HookSpec],
        journal: Journal,
        batch_size: int | None,
        times: HarvestTimes,
        progress: Progress | None,
    ):
        self._root, self._plan, self._model, self._journal, self._times = root, plan, model, journal, times
        self._context_size = plan.identity["context_size"]
        self._chunk_rows = plan.identity["chunk_rows"]
        self._batch_size = batch_size or max(1, BATCH_TOKENS[model.device.type] // self._context_size)
        self._codec = codec(plan.identity["codec"])
        self._special = np.array(plan.identity["special_token_ids"], dtype=np.int32)
        self._compute = _compute(model, self._batch_size)
        # On CUDA, windows are copied out on a stream of their own, beside the next forward pass; None means no stream.
        self._copy_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._done = merge_records(journal.records)
        self._todo = list(self._missing(hooks))
        self._progress = progress
        self._rows_done = sum(plan.n_rows(s) for s in SPLITS) - sum(self._shard_rows(s, i) for s, i, _ in self._todo)

    def run(self) -> None:
        """Harvest every missing shard; on an error or Ctrl-C the shard being written is still finished."""
        self._warn_of_other_compute()
        if not self._todo:
            return
        windows: queue.Queue[_Window] = queue.Queue()
        rows = max(self._shard_rows(split, index) for split, index, _ in self._todo)
        hooks = list(dict.fromkeys(hook for _, _, hooks in self._todo for hook in hooks))
        for _ in range(min(2, len(self._todo))):
            windows.put(_Window(hooks, self._codec, rows, self._model.device))
        with ThreadPoolExecutor(1, "actcache-write") as writer:
            pending: list[Future[None]] = []
            for split, index, hooks in self._todo:
                window = self._free_window(windows, pending)
                shard = self._shard(split, index, hooks)
                self._fill(window, shard)
                ready = _recorded_event(self._model.device)
                pending.append(writer.submit(self._write, shard, window, windows, ready))
            for future in pending:
                future.result()

    def _missing(self, hooks: Sequence[HookSpec]) -> Iterator[tuple[str, int, tuple[HookSpec, ...]]]:
        """(split, index, hooks without a finished array) of every shard that lacks something."""
        for split in SPLITS:
            for index in range(self._plan.n_shards(split)):
                record = self._done.get((split, index))
                stored = set(record.hooks) if record else set()
                lacking = tuple(hook for hook in hooks if hook not in stored)
                if lacking:
                    yield split, index, lacking

    def _shard_rows(self, split: str, index: int) -> int:
        rows = self._plan.identity["shard_rows"]
        return min(rows, self._plan.n_rows(split) - index * rows)

    def _shard(self, split: str, index: int, hooks: tuple[HookSpec, ...]) -> _Shard:
        first_token = index * self._plan.identity["shard_rows"]
        n_rows = self._shard_rows(split, index)
        permutation = shard_permutation(n_rows, seed=self._plan.identity["seed"], split=split, index=index)
        first, last = self._sequence_range(first_token, n_rows)
        flat = sequence_reader(self._root, self._plan, split, "id").read(first, last).reshape(-1)
        token_ids = np.empty(n_rows, dtype=np.int32)
        offset = first_token - first * self._context_size
        token_ids[permutation] = flat[offset : offset + n_rows]
        return _Shard(
            split=split,
            index=index,
            first_token=first_token,
            permutation=permutation,
            token_ids=token_ids,
            hooks=hooks,
        )

    def _sequence_range(self, first_token: int, n_rows: int) -> tuple[int, int]:
        return first_token // self._context_size, -(-(first_token + n_rows) // self._context_size)

    def _token_batches(self, shard: _Shard) -> Iterator[TokenBatch]:
        """Forward batches restart at each shard, so that a shard never depends on where a run was cut."""
        reader = sequence_reader(self._root, self._plan, shard.split, "id")
        first, last = self._sequence_range(shard.first_token, shard.n_rows)
        token_ids = reader.read(first, last)
        for start in range(0, last - first, self._batch_size):
            yield TokenBatch(token_ids=token_ids[start : start + self._batch_size], first_sequence=first + start)

    def _fill(self, window: _Window, shard: _Shard) -> None:
        permutation = torch.from_numpy(shard.permutation).to(self._model.device)
        hook_names = [hook.hook_name for hook in shard.hooks]
        started = time.perf_counter()
        for tokens in self._token_batches(shard):
            x = self._model.activations(torch.from_numpy(tokens.token_ids), hook_names)
            batch = ActivationBatch(x=x, first_token=tokens.first_sequence * self._context_size)
            window.add(batch, shard.first_token, permutation)
            if self._progress:
                last_token = batch.first_token + tokens.token_ids.size - shard.first_token
                self._progress(self._rows_done + min(last_token, shard.n_rows), self._n_rows)
        self._rows_done += shard.n_rows
        self._times.n_tokens += shard.n_rows
        self._times.model += time.perf_counter() - started

    @property
    def _n_rows(self) -> int:
        return sum(self._plan.n_rows(split) for split in SPLITS)

    def _free_window(self, windows: queue.Queue[_Window], pending: list[Future[None]]) -> _Window:
        """The next window that is not being written; a failed writer raises here instead of blocking for ever."""
        started = time.perf_counter()
        while windows.empty() and pending:
            pending.pop(0).result()
        for future in [future for future in pending if future.done()]:
            future.result()
        self._times.wait += time.perf_counter() - started
        return windows.get_nowait()

    # --- in the writer's thread ---

    def _write(
        self, shard: _Shard, window: _Window, windows: queue.Queue[_Window], ready: torch.cuda.Event | None
    ) -> None:
        started = time.perf_counter()
        if ready is not None:
            ready.synchronize()
        with torch.cuda.stream(self._copy_stream):
            record = self._written(shard, window)
        self._journal.append(asdict(record))
        self._journal.records.append(record)
        self._times.write += time.perf_counter() - started
        windows.put(window)

    def _written(self, shard: _Shard, window: _Window) -> ShardRecord:
        """Write every array of a shard; returns the line that says so."""
        arrays: dict[str, ArrayRecord] = {}
        partials: dict[str, int] = {}
        if not self._has_tokens(shard):
            arrays |= self._write_tokens(shard)
        for hook in shard.hooks:
            found, moments = self._write_hook(shard, hook, window.stored[hook.hook_name])
            arrays |= found
            partials |= self._write_partials(shard, hook, moments)
        return ShardRecord(
            split=shard.split,
            index=shard.index,
            first_token=shard.first_token,
            n_rows=shard.n_rows,
            hooks=shard.hooks,
            arrays=arrays,
            partials=partials,
            compute=self._compute,
        )

    def _has_tokens(self, shard: _Shard) -> bool:
        record = self._done.get((shard.split, shard.index))
        return record is not None and all(a.path in record.arrays for a in self._token_arrays)

    @property
    def _token_arrays(self) -> list[ArraySpec]:
        return token_arrays(self._plan.identity["shard_rows"])

    def _write_tokens(self, shard: _Shard) -> dict[str, ArrayRecord]:
        flat = shard.flat_tokens
        columns = (
            shard.token_ids,
            (flat // self._context_size).astype(np.int32),
            (flat % self._context_size).astype(np.int32),
        )
        return {
            array.path: self._write_array(shard, array, (column[rows] for rows in chunk_slices(array, shard.n_rows)))
            for array, column in zip(self._token_arrays, columns, strict=True)
        }

    def _write_hook(
        self, shard: _Shard, hook: HookSpec, window: Sequence[Tensor]
    ) -> tuple[dict[str, ArrayRecord], dict[str, Moments]]:
        """Encode a hook's window chunk by chunk, taking its statistics on the way."""
        special = np.isin(shard.token_ids, self._special)
        moments = {name: Moments.empty(hook.d_in) for name in ROW_FILTERS}
        arrays = hook_arrays(hook, self._codec, self._chunk_rows)
        parts = [storage_view(part.cpu()) for part in window]
        for rows in chunk_slices(arrays[0], shard.n_rows):
            self._add_moments(shard, hook, [part[rows] for part in parts], special[rows], rows, moments)
        return {
            array.path: self._write_array(shard, array, (part[rows] for rows in chunk_slices(array, shard.n_rows)))
            for array, part in zip(arrays, parts, strict=True)
        }, moments

    def _add_moments(
        self,
        shard: _Shard,
        hook: HookSpec,
        stored: Sequence[np.ndarray],
        special: Bool[np.ndarray, " row"],
        rows: slice,
        moments: dict[str, Moments],
    ) -> None:
        x = float32_values(stored, hook.dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found and named just below
            found = filtered_moments(x, special)
        if not np.isfinite(found["all"].square_norm_sum):
            raise _non_finite(shard, hook, x, rows)
        for name in ROW_FILTERS:
            moments[name] = moments[name].merge(found[name])

    def _write_array(self, shard: _Shard, array: ArraySpec, chunks: Iterator[np.ndarray]) -> ArrayRecord:
        path = self._root / STORE / shard.split / shard_key(array, shard.index)
        return write_shard(path, array, self._codec, chunks, self._plan.identity["shard_rows"])

    def _write_partials(self, shard: _Shard, hook: HookSpec, moments: dict[str, Moments]) -> dict[str, int]:
        arrays = {f"{row_filter}.{key}": v for row_filter, m in moments.items() for key, v in m.to_arrays().items()}
        payload = safetensors.numpy.save(arrays)
        key = partials_key(shard.split, shard.index, hook.hook_name)
        write_atomically(self._root / key, [payload])
        return {key: crc32c(payload)}

    def _warn_of_other_compute(self) -> None:
        for record in self._done.values():
            differing = [key for key, value in self._compute.items() if record.compute.get(key) != value]
            if differing:
                logger.warning(
                    "%s: finished shards were computed with another %s (%s; now %s); bytes may differ in the last bit",
                    self._root,
                    ", ".join(differing),
                    ", ".join(str(record.compute.get(key)) for key in differing),
                    ", ".join(str(self._compute[key]) for key in differing),
                )
                return


def _compute(model: LanguageModel, batch_size: int) -> dict[str, Any]:
    """What decides the last bits of an activation beside the identity."""
    return {
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "backend": model.backend,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention_kernel,
        "batch_size": batch_size,
    }


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """On CUDA, an event after the last scatter into a window: the writer's thread waits for it, not the model."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _non_finite(shard: _Shard, hook: HookSpec, x: np.ndarray, rows: slice) -> NonFiniteActivations:
    tokens = shard.flat_tokens[rows][~np.isfinite(x).all(axis=1)]
    return NonFiniteActivations(
        f"harvest: {hook.hook_name} is NaN or infinite as {hook.dtype} for {len(tokens)} tokens between "
        f"{tokens.min()} and {tokens.max()} of {shard.split}; store another --dtype (bfloat16 reaches 3e38, "
        "float16 65504) or check the model"
    )
