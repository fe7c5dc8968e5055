"""The one loop that runs a language model: packed sequences -> activations of every asked hook -> shards.

While the model runs shard i, other threads encode and write shard i - 1 from the other of two windows; a window that is
not free yet blocks the loop, so nothing is dropped and memory is bounded by two windows. A model whose threads take
every core has one window, and takes turns with the encoder threads: beside it, each of its threads would wait at every
operation for the one that has lost its core.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actcache.errors import CacheLocked, CacheMismatch, ConfigError
from actcache.flow import SPLITS, ActivationBatch
from actcache.format.codecs import codec
from actcache.format.manifest import HookSpec, Plan, ShardRecord, merge_records, token_arrays
from actcache.harvesting.encoder import ShardEncoder
from actcache.harvesting.estimate import (
    Estimate,
    encoder_threads,
    expected_bytes,
    favoured_codec,
    free_bytes,
    refuse_small_disk,
    spare_cores,
    tokens_per_second,
)
from actcache.harvesting.finalise import finalise
from actcache.harvesting.plan import (
    AUTO,
    HarvestConfig,
    count_sequences,
    identity_of,
    packed_sequences,
    read_plan,
    refuse_other_identity,
    settle_plan,
)
from actcache.harvesting.window import Shard, Window
from actcache.models.batch_size import largest_batch
from actcache.models.load import LanguageModel
from actcache.store.cache import CACHE_MANIFEST, ORIGIN, PLAN, Cache, open_cache
from actcache.store.journal import Journal, active_writers, read_journals, refuse_held, settling, was_begun
from actcache.store.zarr_metadata import remove_partials, write_atomically
from actcache.text.tokenise import DatasetSource, Source

Progress = Callable[[int, int], None]
Owed = tuple[str, int, tuple[HookSpec, ...], int]  # split, index, hooks to be written, attempt of a shard

logger = logging.getLogger("actcache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of several processes that share a cache: it takes the shards index, index + count, ... of those missing."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"harvest: worker i/n must have 0 <= i < n, got {self.index}/{self.count}")


@dataclass(slots=True)
class HarvestTimes:
    """Seconds of one call. pack: settling the plan. finalise: statistics and metadata. total: all of it.

    Of the stages: busy, and wait, the time that its threads had nothing to do or no room; encode is a sum over threads.
    """

    n_tokens: int = 0
    pack: float = 0.0
    model_busy: float = 0.0
    model_wait: float = 0.0
    copy_busy: float = 0.0
    copy_wait: float = 0.0
    encode_busy: float = 0.0
    encode_wait: float = 0.0
    write_busy: float = 0.0
    write_wait: float = 0.0
    finalise: float = 0.0
    total: float = 0.0

    def described(self) -> str:
        """A line for a person."""
        stages = ", ".join(
            f"{name} {getattr(self, f'{name}_busy'):.1f} s busy {getattr(self, f'{name}_wait'):.1f} s waiting"
            for name in ("model", "copy", "encode", "write")
        )
        rate = self.n_tokens / max(self.model_busy, 1e-9)
        return f"harvested {self.n_tokens} tokens in {self.total:.1f} s ({rate:,.0f} tokens/s in the model): {stages}"


def harvest(
    model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path, *, progress: Progress | None = None
) -> Cache:
    """Run the model once over the packed dataset and write every asked hook into the cache at `out`.

    The same call after a kill continues at the first unfinished shard; a finished cache that already holds what is
    asked is opened as it is; a hook that it lacks is added over the stored sequences; more tokens make it grow.

    Args:
        progress: called with (rows done, rows in all) after every forward batch.

    Raises:
        CacheMismatch: `out` holds something else; the message lists the differences.
        CacheLocked: another process is writing there.
        DiskTooSmall: the disk has less room than the shards will take.
        DatasetError, ModelError, NonFiniteActivations: see there; what is finished stays and is not redone.
    """
    cache = harvest_share(model, source, config, out, Worker(), progress=progress)
    assert cache is not None, "a single worker owes nothing to others"
    return cache


def harvest_share(
    model: LanguageModel,
    source: Source,
    config: HarvestConfig,
    out: str | Path,
    worker: Worker,
    *,
    progress: Progress | None = None,
) -> Cache | None:
    """`harvest` by one of several processes on one cache; whichever writes the last shard finalises.

    Returns None while other workers owe shards. CacheLocked: another process is the same worker, or one with more.
    """
    root = Path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    times, started = HarvestTimes(), time.perf_counter()
    journal, plan = joined(root, worker.index, partial(_begun, root, model, source, config, widths, worker))
    with journal:
        times.pack = time.perf_counter() - started
        hooks = _wanted_hooks(plan, widths)
        cache = finished_cache(root, plan, hooks)
        if cache is not None:
            leave(root, journal)
            return cache
        write_atomically(root / ORIGIN, [json.dumps(_origin(model, source)).encode()])
        done = merge_records(read_journals(root))
        share = [
            owed
            for owed in missing_shards(plan, done, hooks)
            if _number(plan, *owed[:2]) % worker.count == worker.index
        ]
        harvester = _Harvester(root, plan, model, share, done, config, journal.append, times, progress)
        harvester.warn_of_other_compute()
        harvester.run()
        cache = _finalised(root, hooks, times)
        times.total = time.perf_counter() - started
        _write_log(root, model, times)
        leave(root, journal)
    logger.info(times.described())
    return cache


def redo(
    root: Path,
    plan: Plan,
    model: LanguageModel,
    owed: Sequence[Owed],
    held: dict[tuple[str, int], ShardRecord],
    batch_size: int,
    written: Callable[[ShardRecord], None],
    *,
    progress: Progress | None = None,
) -> None:
    """Write arrays of recorded shards anew, from the same forward batches; token arrays in `held` are left alone.

    written: called, in a thread of its own, with the record of each shard whose files are there. For whoever holds a
    slot. Raises CorruptShard if the packed sequences of a shard are damaged.
    """
    hook_names = dict.fromkeys(hook.hook_name for _, _, hooks, _ in owed for hook in hooks)
    config = HarvestConfig(
        hook_names=tuple(hook_names), context_size=plan.identity["context_size"], batch_size=batch_size
    )
    _Harvester(root, plan, model, owed, held, config, written, HarvestTimes(), progress).run()


def compute_of(model: LanguageModel, batch_size: int) -> dict[str, Any]:
    """What decides the last bits of an activation beside the identity."""
    return {
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "backend": model.backend,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention_kernel,
        "compiled": model.compiled,
        "batch_size": batch_size,
    }


def other_compute(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What differs between two computations, in words, or None."""
    differing = [key for key, value in here.items() if there.get(key) != value]
    theirs = ", ".join(str(there.get(key)) for key in differing)
    ours = ", ".join(str(here[key]) for key in differing)
    return f"{', '.join(differing)} ({theirs}; now {ours})" if differing else None


def dry_run(model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path) -> Estimate:
    """What `harvest` has still to do there; runs two short forward passes and writes nothing.

    Without config.tokens the dataset is packed to count it. Raises CacheMismatch for another cache, as `harvest` does.
    """
    root = Path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    held = read_plan(root)
    config = _with_codec(root, held, model, config)
    if held is not None:
        refuse_other_identity(root, held, identity_of(model, source, config))
    hooks = _specs(widths, config.dtype)
    sequences = (
        count_sequences(model, source, config) if config.tokens is None else config.tokens // config.context_size
    )
    n_rows = sequences * config.context_size - _rows_done(root, held, hooks)
    rate = tokens_per_second(model, config.hook_names, config.context_size, config.batch_sequences)
    return Estimate(
        n_rows=n_rows,
        n_bytes=expected_bytes(n_rows, hooks, config.codec),
        free_bytes=free_bytes(root),
        seconds=n_rows / rate,
    )


def _rows_done(root: Path, held: Plan | None, hooks: Sequence[HookSpec]) -> int:
    if held is None:
        return 0
    lacking = {(split, index) for split, index, _, _ in missing_shards(held, merge_records(read_journals(root)), hooks)}
    return sum(
        held.rows_of(split, index)
        for split in SPLITS
        for index in range(held.n_shards(split))
        if (split, index) not in lacking
    )


def joined(root: Path, slot: int, begun: Callable[[], Plan]) -> tuple[Journal, Plan]:
    """Take a writer's slot and settle the plan, by `begun`, while nobody else does; who waits for that holds no slot.

    If no plan comes of it, what was made for the journal is removed again.
    """
    refuse_held(root, slot)
    with settling(root):
        journal = Journal(root, slot)
        try:
            return journal, begun()
        except BaseException:
            if not (root / PLAN).exists():
                journal.discard()
            journal.close()
            raise


def _begun(
    root: Path, model: LanguageModel, source: Source, config: HarvestConfig, widths: dict[str, int], worker: Worker
) -> Plan:
    """Settle the plan; what killed writers left goes, if nobody writes."""
    others = active_writers(root) - {worker.index}
    if any(slot >= worker.count for slot in others):
        raise CacheLocked(f"{root}: {len(others)} workers write this cache; wait for them, or join with --worker i/n")
    held = read_plan(root)
    config = _with_codec(root, held, model, config)
    if held is None and config.tokens is not None:
        refuse_small_disk(root, expected_bytes(config.tokens, _specs(widths, config.dtype), config.codec))
    sequences = packed_sequences(model, source, config)
    plan = settle_plan(root, identity_of(model, source, config), sequences, config, max(widths.values()))
    if not others:
        remove_partials(root)
    return plan


def _with_codec(root: Path, held: Plan | None, model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The config with its codec settled: the one that is there, else measured."""
    if config.codec != AUTO:
        return config
    if held is not None:
        return replace(config, codec=held.identity["codec"])
    name, why = favoured_codec(
        model, config.hook_names, config.context_size, config.batch_sequences, config.dtype, root
    )
    logger.info("codec %s: %s", name, why)
    return replace(config, codec=name)


def _specs(widths: dict[str, int], dtype: str) -> list[HookSpec]:
    return [HookSpec(hook_name=name, d_in=d_in, dtype=dtype) for name, d_in in widths.items()]


def _wanted_hooks(plan: Plan, widths: dict[str, int]) -> list[HookSpec]:
    """The asked hooks, and those that grow with the cache."""
    return list(dict.fromkeys([*_specs(widths, plan.identity["dtype"]), *plan.hooks]))


def refuse_foreign_folder(root: Path) -> None:
    """Raise CacheMismatch unless the folder is absent, empty or a cache, finished or not."""
    if root.is_file():
        raise CacheMismatch(f"{root}: must be a folder for the cache, is a file; pass another --out")
    if root.exists() and not was_begun(root):
        held = sorted(path.name for path in root.iterdir())
        if held:
            raise CacheMismatch(f"{root}: must be empty or a cache, holds {', '.join(held[:5])}; pass another --out")


def finished_cache(root: Path, plan: Plan, hooks: Sequence[HookSpec]) -> Cache | None:
    """The cache, if it is finished, of this plan, and holds the hooks."""
    if not (root / CACHE_MANIFEST).exists():
        return None
    cache = open_cache(root)
    grown = cache.manifest.plan.sequences != plan.sequences
    return None if grown or not set(hooks) <= set(cache.manifest.hooks) else cache


def _finalised(root: Path, hooks: Sequence[HookSpec], times: HarvestTimes) -> Cache | None:
    """The finished cache, unless other workers owe shards; one process at a time."""
    started = time.perf_counter()
    with settling(root):
        plan, records = read_plan(root), read_journals(root)
        assert plan is not None, "settled before the first shard"
        owed = len(list(missing_shards(plan, merge_records(records), hooks)))
        if owed:
            logger.info("%s: this worker is done; other workers owe %d shards, the last of them finalises", root, owed)
            return None
        if finished_cache(root, plan, hooks) is None:
            finalise(root, plan, records)
    times.finalise = time.perf_counter() - started
    return open_cache(root)


def leave(root: Path, journal: Journal) -> None:
    """Give up the slot; the last writer to do so deletes what killed ones have left aside."""
    with settling(root):
        if len(active_writers(root)) == 1:  # this one
            remove_partials(root)
        journal.close()


def missing_shards(plan: Plan, done: dict[tuple[str, int], ShardRecord], hooks: Sequence[HookSpec]) -> Iterator[Owed]:
    """Every shard that lacks something, with the hooks that have no finished array."""
    for split in SPLITS:
        for index in range(plan.n_shards(split)):
            record = done.get((split, index))
            if record is not None and record.n_rows != plan.rows_of(split, index):
                yield split, index, tuple(hooks), record.attempt + 1
                continue
            stored = set(record.hooks) if record else set()
            lacking = tuple(hook for hook in hooks if hook not in stored)
            if lacking:
                yield split, index, lacking, record.attempt if record else 0


def _number(plan: Plan, split: str, index: int) -> int:
    """Number of a shard among those of both splits: what workers share out."""
    return index if split == SPLITS[0] else plan.n_shards(SPLITS[0]) + index


def _origin(model: LanguageModel, source: Source) -> dict[str, Any]:
    """Where model and dataset can be loaded from again; the dataset is None if it was in memory."""
    dataset = None
    if isinstance(source, DatasetSource):
        path = os.path.abspath(source.path) if os.path.exists(source.path) else source.path
        dataset = asdict(replace(source, path=path))
    return {"model": model.source, "revision": model.identity["revision"], "dataset": dataset}


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


class _Harvester:
    """Runs the model over the owed shards, while threads write those before."""

    def __init__(
        self,
        root: Path,
        plan: Plan,
        model: LanguageModel,
        todo: Sequence[Owed],
        done: dict[tuple[str, int], ShardRecord],
        config: HarvestConfig,
        written: Callable[[ShardRecord], None],
        times: HarvestTimes,
        progress: Progress | None,
    ):
        """done: what is recorded. written: called with the record of each shard whose files are there."""
        self._root, self._plan, self._model, self._written, self._times = root, plan, model, written, times
        self._todo, self._done = todo, done
        self._context_size = plan.identity["context_size"]
        self._windows = self._made_windows()  # before the batch size is measured by what fits beside them
        self._batch_size = config.batch_size or self._settled_batch_size(config)
        self._compute = compute_of(model, self._batch_size)
        self._progress = progress
        self._n_rows = sum(plan.n_rows(split) for split in SPLITS)
        self._rows_done = self._n_rows - self._rows(todo)

    def run(self) -> None:
        """Harvest every owed shard; on an error or Ctrl-C the shard being written is still finished."""
        if not self._todo:
            return
        self._announce()
        started = time.perf_counter()
        n_threads = encoder_threads(self._model.device)
        encoder = ShardEncoder(self._root, self._plan, self._model.device, self._compute, n_threads)
        with closing(encoder), ThreadPoolExecutor(1, "actcache-write") as writer:
            pending: list[Future[None]] = []
            for split, index, hooks, attempt in self._todo:
                window = self._free_window(pending)
                shard = Shard.of(self._root, self._plan, split, index, hooks, attempt)
                self._fill(window, shard)
                ready = _recorded_event(self._model.device)
                pending.append(writer.submit(self._write, encoder, shard, window, ready))
            for future in pending:
                future.result()
        self._add_stages(encoder, time.perf_counter() - started, n_threads)

    def warn_of_other_compute(self) -> None:
        """Say, once, what finished shards were computed with if it is something else."""
        others = (other_compute(record.compute, self._compute) for record in self._done.values())
        if other := next(filter(None, others), None):
            logger.warning(
                "%s: finished shards were computed with another %s; bytes may differ in the last bit", self._root, other
            )

    def _rows(self, entries: Sequence[Owed]) -> int:
        return sum(self._plan.rows_of(split, index) for split, index, _, _ in entries)

    def _settled_batch_size(self, config: HarvestConfig) -> int:
        """As finished shards were computed, so that bytes are equal; else by device: measured on CUDA."""
        for record in self._done.values():
            return record.compute["batch_size"]
        if self._model.device.type == "cuda":
            return largest_batch(self._model, self._context_size, config.hook_names)
        return config.batch_sequences

    def _announce(self) -> None:
        """Refuse a disk that is too small for what is owed, else say how much that is."""
        n_bytes = sum(
            expected_bytes(self._plan.rows_of(split, index), hooks, self._plan.identity["codec"])
            for split, index, hooks, _ in self._todo
        )
        refuse_small_disk(self._root, n_bytes)
        free = free_bytes(self._root)
        logger.info(
            "%d shards, %d rows, at most about %.3g GB (%.3g GB free)",
            len(self._todo),
            self._rows(self._todo),
            n_bytes / 1e9,
            free / 1e9,
        )

    def _made_windows(self) -> queue.Queue[Window]:
        windows: queue.Queue[Window] = queue.Queue()
        rows = max((self._plan.rows_of(split, index) for split, index, _, _ in self._todo), default=0)
        hooks = list(dict.fromkeys(hook for _, _, hooks, _ in self._todo for hook in hooks))
        n_windows = 2 if spare_cores(self._model.device) else 1
        for _ in range(min(n_windows, len(self._todo))):
            windows.put(Window(hooks, codec(self._plan.identity["codec"]), rows, self._model.device))
        return windows

    def _fill(self, window: Window, shard: Shard) -> None:
        permutation = torch.from_numpy(shard.permutation).to(self._model.device)
        hook_names = [hook.hook_name for hook in shard.hooks]
        started = time.perf_counter()
        for tokens in shard.token_batches(self._batch_size):
            first_token = tokens.first_sequence * self._context_size
            made = partial(ActivationBatch, first_token=first_token)
            self._model.show(
                torch.from_numpy(tokens.token_ids),
                hook_names,
                lambda name, x, made=made: window.add(made(hook_name=name, x=x), shard.first_token, permutation),
            )
            if self._progress:
                last_token = first_token + tokens.token_ids.size - shard.first_token
                self._progress(self._rows_done + min(last_token, shard.n_rows), self._n_rows)
        self._rows_done += shard.n_rows
        self._times.n_tokens += shard.n_rows
        self._times.model_busy += time.perf_counter() - started

    def _free_window(self, pending: list[Future[None]]) -> Window:
        """The next window that is not being written; a failed writer raises here instead of blocking for ever."""
        started = time.perf_counter()
        while self._windows.empty() and pending:
            pending.pop(0).result()
        for future in [future for future in pending if future.done()]:
            future.result()
        self._times.model_wait += time.perf_counter() - started
        return self._windows.get_nowait()

    # --- in the writer's thread ---

    def _write(self, encoder: ShardEncoder, shard: Shard, window: Window, ready: torch.cuda.Event | None) -> None:
        with_tokens = not self._has_tokens(shard)
        record = encoder.write(shard, window, with_tokens=with_tokens, ready=ready)
        self._written(record)
        self._windows.put(window)
        if (shard.split, shard.index) == self._todo[0][:2]:
            self._say_first(record)

    def _has_tokens(self, shard: Shard) -> bool:
        """Whether the shard's token arrays are there, of the rows that it has now."""
        record = self._done.get((shard.split, shard.index))
        arrays = token_arrays(self._plan.identity["shard_rows"])
        return record is not None and record.n_rows == shard.n_rows and all(a.path in record.arrays for a in arrays)

    def _say_first(self, record: ShardRecord) -> None:
        """After the first shard: what the rest will take."""
        rest = self._rows(self._todo) - record.n_rows
        if rest:
            rate = self._times.n_tokens / self._times.model_busy
            row_bytes = sum(array.n_bytes for array in record.arrays.values()) / record.n_rows
            logger.info(
                "first shard: %.0f tokens/s, %.0f bytes a row; about %.0f s and %.3g GB to go",
                rate,
                row_bytes,
                rest / rate,
                rest * row_bytes / 1e9,
            )

    def _add_stages(self, encoder: ShardEncoder, elapsed: float, n_threads: int) -> None:
        times, found = self._times, encoder.seconds
        times.copy_busy, times.encode_busy, times.write_busy = found.copy, found.encode, found.write
        times.copy_wait = elapsed - found.copy
        times.encode_wait = n_threads * elapsed - found.encode
        times.write_wait = elapsed - found.write


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """On CUDA, an event after the last scatter into a window: the writer's thread waits for it, not the model."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
