"""A sweep: each batch is read once, and every SAE is stepped on it. `train` does this for a cache and a sweep file.

`trainer.run_folder` says what the folder of each SAE holds. The same call again goes on where the last one stopped, bit
for bit.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.arguments import device_of, local_path, typed, whole_number
from actcache.errors import DatasetError
from actcache.flow import Batch
from actcache.store.cache import Cache
from trainer.config.settings import BATCH_FAMILY, TRANSCODERS, DecoderBiasInit, SAEConfig, ScaledHook, TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.formats.saelens import inference_sae, write_run_sae
from trainer.kernels.active import Workspace
from trainer.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    RUNS_LOCK,
    check_out,
    is_over,
    only_writer,
    write_run_json,
)
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.loggers import LoggedRun, MetricLogger, check_loggers, open_loggers
from trainer.training.plan import SweepPlan, free_memory, plan_passes, reading_bytes
from trainer.training.resolve import ResolvedRun, resolve_runs, training_loader
from trainer.training.run import Run, RunRecord, fail, saved_step, stored_record
from trainer.training.step import TrainState, calibrated_threshold, inference_weights, initial_state, scaled_rows
from trainer.training.validation import (
    check_validation,
    reconstruction_sums,
    validation_batches,
    validation_metrics,
    warn_of_no_validation,
)

CALIBRATION_BATCHES = 16  # first batches of training that calibrate a threshold or an initial b_enc


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """How far a sweep is. Tokens and seconds count from the start of this call.

    Attributes:
        step: steps done.
        n_steps: steps of the longest run.
        n_tokens: rows read.
        n_sae_tokens: rows that each SAE was stepped on, summed over the SAEs.
        n_saes: how many SAEs still train.
        seconds: time since the start.
        wait_seconds: the part of it that was spent waiting for data.
        metrics: the line of each SAE that was logged at this step, by name.
    """

    step: int
    n_steps: int
    n_tokens: int
    n_sae_tokens: int
    n_saes: int
    seconds: float
    wait_seconds: float
    metrics: dict[str, dict[str, Any]]


Progress = Callable[[SweepProgress], None]
Validation = Callable[[Sequence[str]], Iterable[Batch]]  # hook names -> the held-out rows, the same at every call


def train(
    cache: Cache,
    config: SweepConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    memory_bytes: int | None = None,
    loggers: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[RunRecord, ...]:
    """Train every run of a sweep on a cache, each into the folder `out`/<name>.

    Runs that are finished are left alone, and others go on from their last checkpoint. An SAE that diverges says so in
    its record, while the others go on. SAEs that do not fit into the memory together are trained in several passes over
    the cache, as `plan` says.

    Args:
        cache: an open cache.
        config: which SAEs to train.
        out: the folder of runs.
        device: where the SAEs train.
        memory_bytes: how much memory training may take; None for most of what is free.
        loggers: any of "wandb", "trackio" and "tensorboard", which get the lines of metrics.jsonl too.
        progress: called after every step.

    Returns:
        One record for each run, in the order of the config.

    Raises:
        ConfigError: more tokens are asked for than the epochs hold, a setting does not fit the cache, an SAE does not
            fit into the memory, the package of a logger or an optimizer is not installed, or `device` is none of this
            machine.
        DatasetError: `eval_every` is given and the validation split has no rows.
        CacheMismatch: `out` holds something else than runs, or one of its folders holds a different run. The message
            lists the differences.
        CacheLocked: something is left to train, and another process trains in `out`.
        KeyboardInterrupt: SIGINT or SIGTERM came. Every SAE was saved at the same step before.
    """
    out, records, device = local_path(out), dict[str, RunRecord](), device_of("train", device)
    check_loggers(loggers)
    epoch_rows = _epoch_rows(cache, config, out)
    warn_of_no_validation(cache)
    runs = resolve_runs(cache, config, out, epoch_rows)
    if any(not is_over(out / run.config.name) for run in runs):  # else a folder that is read-only will do
        with only_writer(out, RUNS_LOCK, "is training there", "training has to write there; pass another --out"):
            runs = resolve_runs(cache, config, out, epoch_rows)  # the process that held the lock may have changed them
            by_name = {run.config.name: run for run in runs}
            for each in _plan(runs, config, out, device, memory_bytes).passes:
                records |= _train_pass(
                    [by_name[one.name] for one in each], config.train, out, device, loggers, progress
                )
    return tuple(records.get(run.config.name) or stored_record(run.config, out / run.config.name) for run in runs)


def plan(
    cache: Cache,
    config: SweepConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    memory_bytes: int | None = None,
) -> SweepPlan:
    """What `train` with the same arguments has still to do. Nothing is written. Raises as `train` does."""
    out, device = local_path(out), device_of("train", device)
    runs = resolve_runs(cache, config, out, _epoch_rows(cache, config, out))
    return _plan(runs, config, out, device, memory_bytes)


def _plan(
    runs: Sequence[ResolvedRun], config: SweepConfig, out: Path, device: torch.device | str, memory_bytes: int | None
) -> SweepPlan:
    """The passes over what is pending. The runs of a pass train on the same rows."""
    if memory_bytes is not None:
        whole_number("train", "memory_bytes", memory_bytes, 1)
    pending = [run for run in runs if not is_over(out / run.config.name)]
    memory_bytes, batch = memory_bytes or free_memory(device), config.train.batch_tokens
    plans: list[SweepPlan] = []
    for cache in {run.cache.n_rows(): run.cache for run in pending}.values():  # of one that grew, some read less
        together = [run.config for run in pending if run.cache.n_rows() == cache.n_rows()]
        reading = reading_bytes(cache, config.train, _hook_names(together))
        is_cuda = torch.device(device).type == "cuda"
        plans.append(plan_passes(together, batch, memory_bytes, loader_bytes=reading, is_cuda=is_cuda))
    return SweepPlan(
        passes=tuple(each for one in plans for each in one.passes),
        batch_tokens=batch,
        memory_bytes=memory_bytes,
        needed_bytes=max((one.needed_bytes for one in plans), default=0),
    )


def _epoch_rows(cache: Cache, config: SweepConfig, out: Path) -> int:
    """How many rows an epoch has. Raises CacheMismatch if `out` holds something else than runs."""
    typed("train", "cache", cache, Cache)
    typed("train", "config", config, SweepConfig)
    if config.train.eval_every is not None:
        check_validation(cache, config.train)
    check_out(out, {run["name"] for run in config.runs})
    with training_loader(cache, config.hook_names[:1], config.train) as loader:
        return loader.n_rows


def _train_pass(
    runs: Sequence[ResolvedRun],
    train_config: TrainConfig,
    out: Path,
    device: torch.device | str,
    loggers: Sequence[str],
    progress: Progress | None,
) -> dict[str, RunRecord]:
    """Train these SAEs in one pass over the cache, from the lowest step among them."""
    cache = runs[0].cache
    hook_names = _hook_names([run.config for run in runs])
    start = min(saved_step(out / run.config.name) for run in runs)
    states = [_state(run, out / run.config.name, train_config, device) for run in runs]
    with training_loader(cache, hook_names, train_config, start, device) as loader:
        validation = partial(validation_batches, cache, train_config, device)
        logged = [LoggedRun(config=s.config, folder=out / s.config.name, step=s.step) for s in states]
        with open_loggers(loggers, logged) as opened:
            records = sweep(loader, states, train_config, out, validation=validation, loggers=opened, progress=progress)
    for state in states:
        record = records[state.config.name]
        if record.error is not None:
            continue
        error = _divergence(state, record, train_config, cache)
        if error is None:
            _save_sae(state, record, train_config, cache)
        else:
            records[state.config.name] = replace(record, error=fail(record.folder, state.step, error))
    return records


def _hook_names(configs: Sequence[SAEConfig]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hook.hook_name for each in configs for hook in (*each.inputs, *each.outputs)))


def sweep(
    batches: Iterable[Batch],
    states: Sequence[TrainState],
    train_config: TrainConfig,
    out: Path,
    *,
    validation: Validation | None = None,
    loggers: Sequence[MetricLogger] = (),
    progress: Progress | None = None,
) -> dict[str, RunRecord]:
    """Step every SAE on every batch, until each has done the n_steps of its config.

    Logs, checkpoints and failed.json are written below out/<name>. An SAE ends bit for bit as if it was trained alone.

    Args:
        batches: the batches from the lowest step among the states on. An SAE that is further joins at its own step.
        states: the SAEs.
        train_config: what they share.
        out: the folder of runs.
        validation: gives the held-out rows for `train_config.eval_every`, once for each evaluation of all SAEs.
        loggers: get the lines of metrics.jsonl too.
        progress: called after every step.

    Returns:
        The record of each SAE, by name.

    Raises:
        ValueError: `eval_every` is given and `validation` is not.
        DatasetError: the batches end too early.
        KeyboardInterrupt: SIGINT or SIGTERM came. The step was done and every SAE was saved before.
    """
    if train_config.eval_every is not None and validation is None:
        raise ValueError(f"sweep: eval_every={train_config.eval_every} needs rows to evaluate on; pass validation")
    workspace, clock, stream = Workspace(), _Clock(), iter(batches)
    with ExitStack() as stack:
        runs = [stack.enter_context(Run(s, out / s.config.name, train_config, workspace, loggers)) for s in states]
        stopped_by = stack.enter_context(_signals())
        while active := [run for run in runs if not run.is_over]:
            batch = _next_batch(stream, active, clock)
            stepped = _step_all(active, batch, clock)
            if validation is not None:
                _validate([run for run in stepped if run.is_due(train_config.eval_every)], validation, workspace)
            for run in stepped:
                run.write(clock.rates)
            if progress is not None:
                progress(clock.progress(runs, stepped, batch.step + 1))
            if stopped_by:
                _save_all(active)
                raise KeyboardInterrupt(f"{signal.Signals(stopped_by[0]).name}: all is saved; the same command goes on")
    return {run.config.name: run.record() for run in runs}


def _next_batch(batches: Iterator[Batch], active: Sequence[Run], clock: "_Clock") -> Batch:
    """The next batch, for which the clock counts the wait. Raises DatasetError at the end of the batches."""
    before = time.perf_counter()
    batch = next(batches, None)
    clock.wait_seconds += time.perf_counter() - before
    if batch is None:
        raise DatasetError(
            f"sweep: the stream must serve {max(run.config.n_steps for run in active)} batches, it ended after "
            f"{min(run.state.step for run in active)}; train on fewer tokens"
        )
    return batch


def _step_all(active: Sequence[Run], batch: Batch, clock: "_Clock") -> list[Run]:
    """Step every SAE whose next step takes this batch. Returns those that did not diverge."""
    assert all(run.state.step >= batch.step for run in active), "the stream starts at the lowest step"
    due = [run for run in active if run.state.step == batch.step]
    made: dict[tuple[ScaledHook, ...], Tensor] = {}  # SAEs with the same inputs share the scaled rows
    clock.n_tokens += len(batch.row)
    for run in due:
        n_rows = run.config.training_tokens - run.state.n_tokens
        x, y = (scaled_rows(batch, hooks, made)[:n_rows] for hooks in (run.config.inputs, run.config.outputs))
        clock.n_sae_tokens += len(x)
        run.step(x, y)
    return [run for run in due if run.error is None]


def _validate(due: Sequence[Run], validation: Validation, workspace: Workspace) -> None:
    """Measure every SAE on the held-out rows, which are read once for all of them."""
    if due:
        batches = validation(_hook_names([run.config for run in due]))
        metrics = validation_metrics([run.state for run in due], batches, workspace)
        for run, measured in zip(due, metrics, strict=True):
            run.add_to_line(measured)


def _save_all(active: Sequence[Run]) -> None:
    for run in active:
        if not run.is_over:
            run.save()


@dataclass(slots=True)
class _Clock:
    """The wall time of a sweep since the call, the part of it spent waiting for data, and the rows done in it."""

    started: float = field(default_factory=time.perf_counter)
    wait_seconds: float = 0.0
    n_tokens: int = 0
    n_sae_tokens: int = 0

    def rates(self) -> dict[str, float]:
        """Seconds and rates since the call, as timing.jsonl has them."""
        seconds = time.perf_counter() - self.started
        return {
            "seconds": seconds,
            "tokens_per_second": self.n_tokens / seconds,
            "sae_tokens_per_second": self.n_sae_tokens / seconds,
            "wait_share": self.wait_seconds / seconds,
        }

    def progress(self, runs: Sequence[Run], stepped: Sequence[Run], step: int) -> SweepProgress:
        """The progress of all runs, once those in `stepped` have done `step` steps."""
        return SweepProgress(
            step=step,
            n_steps=max(run.config.n_steps for run in runs),
            n_tokens=self.n_tokens,
            n_sae_tokens=self.n_sae_tokens,
            n_saes=sum(not run.is_over for run in runs),
            seconds=time.perf_counter() - self.started,
            wait_seconds=self.wait_seconds,
            metrics={run.config.name: run.metrics for run in stepped if run.metrics.get("step") == step},
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Put SIGINT and SIGTERM into the list instead of letting them act. A second one acts as usual.

    In a thread other than the main one, signals act as usual.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in usual:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def _state(run: ResolvedRun, folder: Path, train_config: TrainConfig, device: torch.device | str) -> TrainState:
    """The state of the latest checkpoint. Without one it is the initial state, and config.json is written."""
    config, cache = run.config, run.cache
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        return load_checkpoint(config, checkpoint, device)
    write_run_json(folder, CONFIG_FILE, run.description)
    b_dec = torch.zeros(config.d_out)
    if config.b_dec_init != "zeros":
        b_dec = _centre(config.outputs, config.b_dec_init, train_config, cache)
    x_mean = _centre(config.inputs, "mean", train_config, cache) if config.architecture in TRANSCODERS else None
    if config.init_firing_rate is None:
        return initial_state(config, b_dec.to(device), x_mean=x_mean)
    with _first_inputs(config, train_config, cache, device) as inputs:
        return initial_state(config, b_dec.to(device), x_mean=x_mean, sample=torch.cat(list(inputs)))


def _centre(
    hooks: Sequence[ScaledHook], which: DecoderBiasInit, train_config: TrainConfig, cache: Cache
) -> Float[Tensor, " width"]:
    """The mean or the geometric median of the training rows, scaled, with all hooks side by side."""
    centres = []
    for hook in hooks:
        statistics = cache.statistics(hook.hook_name, split="train", row_filter=train_config.row_filter)
        centre = statistics.mean if which == "mean" else statistics.geometric_median
        centres.append((torch.from_numpy(centre) * hook.scale).float())
    return torch.cat(centres)


@contextmanager
def _first_inputs(
    config: SAEConfig, train_config: TrainConfig, cache: Cache, device: torch.device | str
) -> Iterator[Iterator[Float[Tensor, "batch d_in"]]]:
    """The first batches of training, as the SAE gets them."""
    hook_names = tuple(hook.hook_name for hook in config.inputs)
    with training_loader(cache, hook_names, train_config, device=device) as loader:
        n_batches = max(1, min(CALIBRATION_BATCHES, config.training_tokens // train_config.batch_tokens))
        yield (scaled_rows(batch, config.inputs, {}) for batch in islice(loader, n_batches))


def _save_sae(state: TrainState, record: RunRecord, train_config: TrainConfig, cache: Cache) -> None:
    """Write sae/ of a trained SAE. The threshold of a BatchTopK SAE is calibrated on the first training batches."""
    config, threshold = state.config, None
    if config.architecture in BATCH_FAMILY:
        with _first_inputs(config, train_config, cache, state.weights["b_dec"].device) as inputs:
            threshold = calibrated_threshold(state, inputs, Workspace())
    identity = cache.identity
    metadata = {
        "model_name": identity["model"]["name"],
        "dataset_path": identity["dataset"]["name"],
        "context_size": identity["context_size"],
        "prepend_bos": identity["prepend_bos"],
        "exclude_special_tokens": train_config.exclude_special_tokens,
    }
    write_run_sae(record.folder, inference_sae(config, inference_weights(state, threshold), metadata=metadata))


def _divergence(state: TrainState, record: RunRecord, train_config: TrainConfig, cache: Cache) -> str | None:
    """Why an SAE has diverged though its weights are finite; None if it has not.

    It has if it ends farther from the activations than zeros are, and than it was before its first step with zeros for
    b_dec. So an SAE that learnt little has not. A batch is looked at if the log's last line gives cause (0: one row).
    """
    config, device = state.config, state.weights["b_dec"].device
    if isinstance(explained := record.metrics.get("metrics/explained_variance"), float) and explained > 0:
        return None
    began = initial_state(config, torch.zeros(config.d_out, device=device))
    with training_loader(cache, _hook_names([config]), train_config, device=device) as loader:
        ends, begins = reconstruction_sums([state, began], islice(loader, 1), Workspace())
    if not ends.is_worse_than_zeros or ends.square_error <= begins.square_error:
        return None
    return (
        f"{config.name}: must end nearer to the activations than zeros are, its explained variance on training rows is "
        f"{ends.explained_variance:.3g}; lower lr={config.lr}"
    )
