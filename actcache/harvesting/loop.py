"""The loop of a harvest: it runs the model over the pending shards, and threads write the activations.

While the model runs shard i, other threads encode and write shard i - 1 from the other of two windows. The loop waits
until a window is free, so that memory is bounded by two windows. If the threads of the model take every core, there is
one window, and model and encoder threads take turns: with both at once, each of torch's threads would wait, at every
operation, for the one whose core was taken away.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from actcache.flow import SPLITS, ActivationBatch
from actcache.format.arrays import token_arrays
from actcache.format.codecs import codec
from actcache.format.manifest import Plan
from actcache.format.records import ShardRecord
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.encoder import ShardEncoder
from actcache.harvesting.estimate import encoder_threads, expected_bytes, free_bytes, refuse_small_disk, spare_cores
from actcache.harvesting.provenance import compute_of, other_compute
from actcache.harvesting.tasks import ShardTask
from actcache.harvesting.window import Window, window_bytes, windows_that_fit
from actcache.machine.limits import thread_pool
from actcache.models.batch_size import largest_batch
from actcache.models.language_model import LanguageModel
from actcache.store.kept import CacheFiles
from actcache.store.shard import Shard

Progress = Callable[[int, int], None]
logger = logging.getLogger("actcache")


@dataclass(slots=True)
class HarvestTimes:
    """Seconds of one harvest. pack: settling the plan. finalise: statistics and metadata. total: everything.

    Each stage is busy, or it waits because its threads have nothing to do or no free window. encode is summed over
    threads.
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
        """The times as a line for a person."""
        stages = ", ".join(
            f"{name} {getattr(self, f'{name}_busy'):.1f} s busy {getattr(self, f'{name}_wait'):.1f} s waiting"
            for name in ("model", "copy", "encode", "write")
        )
        rate = self.n_tokens / max(self.model_busy, 1e-9)
        return f"harvested {self.n_tokens} tokens in {self.total:.1f} s ({rate:,.0f} tokens/s in the model): {stages}"


def redo(
    root: Path,
    plan: Plan,
    model: LanguageModel,
    pending: Sequence[ShardTask],
    held: dict[tuple[str, int], ShardRecord],
    batch_size: int,
    written: Callable[[ShardRecord], None],
    *,
    progress: Progress | None = None,
) -> None:
    """Write arrays of recorded shards again, from the same forward batches. The caller holds a writer's slot.

    Args:
        root: the folder of the cache.
        plan: its plan.
        model: the model that the activations were computed with.
        pending: the shards, and the hooks that are written again.
        held: (split, index) -> the record of a shard; token arrays that it names are not written again.
        batch_size: sequences of a forward pass.
        written: called, in another thread, with the record of each shard after its files were written.
        progress: called with (rows done, rows in all) after every forward batch.

    Raises:
        CorruptShard: the packed sequences of a shard are damaged.
    """
    hook_names = dict.fromkeys(hook.hook_name for _, _, hooks, _ in pending for hook in hooks)
    config = HarvestConfig(
        hook_names=tuple(hook_names), context_size=plan.identity["context_size"], batch_size=batch_size
    )
    Harvester(root, plan, model, pending, held, config, written, HarvestTimes(), progress).run()


class Harvester:
    """Runs the model over the pending shards, while threads write those before."""

    def __init__(
        self,
        root: Path,
        plan: Plan,
        model: LanguageModel,
        pending: Sequence[ShardTask],
        finished: dict[tuple[str, int], ShardRecord],
        config: HarvestConfig,
        written: Callable[[ShardRecord], None],
        times: HarvestTimes,
        progress: Progress | None,
    ):
        """Make the windows, and choose the batch size.

        Args:
            root: the folder of the cache.
            plan: its plan.
            model: the model.
            pending: the shards and hooks to be written.
            finished: (split, index) -> what is recorded of a shard.
            config: the settings of the harvest.
            written: called, in another thread, with the record of each shard after its files were written.
            times: is filled in by `run`.
            progress: called with (rows done, rows in all) after every forward batch.

        Raises:
            ModelError: not even one sequence fits into the memory of a CUDA device.
        """
        self._root, self._plan, self._model, self._written, self._times = root, plan, model, written, times
        self._pending, self._finished = pending, finished
        self._context_size = plan.identity["context_size"]
        self._windows = self._made_windows()  # before the batch size is measured, because they take memory
        self._batch_size = config.batch_size or self._settled_batch_size(config)
        self._compute = compute_of(model, self._batch_size)
        self._progress = progress
        self._n_rows = sum(plan.n_rows(split) for split in SPLITS)
        self._rows_done = self._n_rows - self._count_rows(pending)

    def run(self) -> None:
        """Harvest every pending shard. After an error or Ctrl-C the shard that is being written is still finished."""
        if not self._pending:
            return
        self._announce()
        started = time.perf_counter()
        n_threads = encoder_threads(self._model.device)
        encoder = ShardEncoder(self._root, self._plan, self._model.device, self._compute, n_threads)
        with closing(encoder), thread_pool(1, "actcache-write") as writer:
            writes: list[Future[None]] = []
            for split, index, hooks, revision in self._pending:
                window = self._free_window(writes)
                shard = Shard.of(CacheFiles(root=self._root), self._plan, split, index, hooks, revision)
                self._fill(window, shard)
                ready = _recorded_event(self._model.device)
                writes.append(writer.submit(self._write, encoder, shard, window, ready))
            for future in writes:
                future.result()
        self._add_stages(encoder, time.perf_counter() - started, n_threads)

    def warn_of_other_compute(self) -> None:
        """Log one warning if finished shards were computed in another way."""
        others = (other_compute(record.compute, self._compute) for record in self._finished.values())
        if other := next(filter(None, others), None):
            logger.warning(
                "%s: finished shards were computed with another %s; bytes may differ in the last bit", self._root, other
            )

    def _count_rows(self, tasks: Sequence[ShardTask]) -> int:
        return sum(self._plan.rows_of(split, index) for split, index, _, _ in tasks)

    def _settled_batch_size(self, config: HarvestConfig) -> int:
        """The batch size of finished shards, so that bytes are equal; else measured on CUDA, the default on a CPU."""
        for record in self._finished.values():
            return record.compute["batch_size"]
        if self._model.device.type == "cuda":
            return largest_batch(self._model, self._context_size, config.hook_names)
        return config.batch_sequences

    def _announce(self) -> None:
        """Log how much the pending shards will take. Raises DiskTooSmall if the disk has less room."""
        n_bytes = sum(
            expected_bytes(self._plan.rows_of(split, index), hooks, self._plan.identity["codec"])
            for split, index, hooks, _ in self._pending
        )
        refuse_small_disk(self._root, n_bytes)
        free = free_bytes(self._root)
        logger.info(
            "%d shards, %d rows, at most about %.3g GB (%.3g GB free)",
            len(self._pending),
            self._count_rows(self._pending),
            n_bytes / 1e9,
            free / 1e9,
        )

    def _made_windows(self) -> queue.Queue[Window]:
        windows: queue.Queue[Window] = queue.Queue()
        n_rows = max((self._plan.rows_of(split, index) for split, index, _, _ in self._pending), default=0)
        hooks = list(dict.fromkeys(hook for _, _, hooks, _ in self._pending for hook in hooks))
        profile = codec(self._plan.identity["codec"])
        n_windows = min(2 if spare_cores(self._model.device) else 1, len(self._pending))
        if self._model.device.type == "cpu":
            n_windows = windows_that_fit(n_windows, window_bytes(hooks, profile, n_rows))
        for _ in range(n_windows):
            windows.put(Window(hooks, profile, n_rows, self._model.device))
        return windows

    def _fill(self, window: Window, shard: Shard) -> None:
        """Run the model over the sequences of a shard and gather their activations in the window."""
        permutation = torch.from_numpy(shard.permutation).to(self._model.device)
        hook_names = [hook.hook_name for hook in shard.hooks]
        started = time.perf_counter()
        for tokens in shard.token_batches(self._batch_size):
            first_token = tokens.first_sequence * self._context_size
            new_batch = partial(ActivationBatch, first_token=first_token)
            self._model.run_until(
                torch.from_numpy(tokens.token_ids),
                hook_names,
                lambda name, x, new=new_batch: window.add(new(hook_name=name, x=x), shard.first_token, permutation),
            )
            if self._progress:
                last_token = first_token + tokens.token_ids.size - shard.first_token
                self._progress(self._rows_done + min(last_token, shard.n_rows), self._n_rows)
        self._rows_done += shard.n_rows
        self._times.n_tokens += shard.n_rows
        self._times.model_busy += time.perf_counter() - started

    def _free_window(self, writes: list[Future[None]]) -> Window:
        """A window that is not being written.

        An error of the writer's thread is raised here, so nobody waits for it.
        """
        started = time.perf_counter()
        while self._windows.empty() and writes:
            writes.pop(0).result()
        for future in [future for future in writes if future.done()]:
            future.result()
        self._times.model_wait += time.perf_counter() - started
        return self._windows.get_nowait()

    # --- in the writer's thread ---

    def _write(self, encoder: ShardEncoder, shard: Shard, window: Window, ready: torch.cuda.Event | None) -> None:
        with_tokens = not self._has_tokens(shard)
        record = encoder.write(shard, window, with_tokens=with_tokens, ready=ready)
        self._written(record)
        self._windows.put(window)
        if (shard.split, shard.index) == self._pending[0][:2]:
            self._say_first(record)

    def _has_tokens(self, shard: Shard) -> bool:
        """Whether the token arrays of the shard are stored, with as many rows as it has now."""
        record = self._finished.get((shard.split, shard.index))
        arrays = token_arrays(self._plan.identity["shard_rows"])
        return record is not None and record.n_rows == shard.n_rows and all(a.path in record.arrays for a in arrays)

    def _say_first(self, record: ShardRecord) -> None:
        """Log, after the first shard, what the rest will take."""
        n_left = self._count_rows(self._pending) - record.n_rows
        if n_left:
            rate = self._times.n_tokens / self._times.model_busy
            row_bytes = sum(array.n_bytes for array in record.arrays.values()) / record.n_rows
            logger.info(
                "first shard: %.0f tokens/s, %.0f bytes a row; about %.0f s and %.3g GB to go",
                rate,
                row_bytes,
                n_left / rate,
                n_left * row_bytes / 1e9,
            )

    def _add_stages(self, encoder: ShardEncoder, elapsed: float, n_threads: int) -> None:
        times, found = self._times, encoder.seconds
        times.copy_busy, times.encode_busy, times.write_busy = found.copy, found.encode, found.write
        times.copy_wait = elapsed - found.copy
        times.encode_wait = n_threads * elapsed - found.encode
        times.write_wait = elapsed - found.write


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """On CUDA, an event after the last scatter into a window. The writer waits for it, and the model runs on."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
