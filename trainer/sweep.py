"""Each batch is read once and every SAE is stepped on it; `train` does that for a cache and a sweep file.

RUNS/<name>/ of each SAE: config.json, metrics.jsonl (deterministic), timing.jsonl, checkpoint/, and at the end sae/, or
failed.json where it diverged. The same call again goes on where the last one stopped, bit for bit.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.cache import Cache
from actcache.errors import CacheMismatch, DatasetError, ManifestError, TrainingDiverged
from actcache.flow import Batch
from actcache.loader import Loader
from actcache.writer import write_atomically
from trainer.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.config import BATCH_FAMILY, TRANSCODERS, SAEConfig, ScaledHook, TrainConfig
from trainer.kernels import Workspace
from trainer.plan import SweepPlan, free_memory, plan_passes
from trainer.saelens import save_inference_sae
from trainer.sweep_file import SweepConfig
from trainer.train import (
    TrainState,
    calibrated_threshold,
    check_weights_are_finite,
    inference_weights,
    initial_state,
    log_record,
    train_step,
)

CONFIG_FILE, METRICS_FILE, TIMING_FILE, FAILED_FILE = "config.json", "metrics.jsonl", "timing.jsonl", "failed.json"
CHECKPOINTS, SAE_FOLDER = "checkpoint", "sae"
CALIBRATION_BATCHES = 16
_MAY_DIFFER = ("cache.path", "train.checkpoint_every")  # between two calls on one folder: they change no result


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What became of one SAE.

    metrics: its last line of metrics.jsonl, {} if there is none. seconds: spent stepping it in this call. error: why it
    was stopped, None if it was not.
    """

    config: SAEConfig
    folder: Path
    metrics: dict[str, Any]
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """How far a sweep is.

    n_tokens, n_sae_tokens (summed over SAEs), seconds and wait_seconds (spent waiting for data) count from the start of
    this call. n_saes: still training. metrics: of each SAE that logged at this step, by name.
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


def train(
    cache: Cache,
    config: SweepConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[RunRecord, ...]:
    """Train every run of a sweep on a cache into `out`/<name>; finished ones are left alone, others go on.

    Returns one record a run, in order; an SAE that diverged says so in its record while the others went on.
    memory_bytes: what training may take, most of what is free if None; SAEs that do not fit together are trained in
    several passes over the cache, as `plan` says.

    Raises:
        ConfigError: more tokens asked than the epochs serve, a setting that does not fit the cache, or an SAE that does
            not fit into the memory.
        CacheMismatch: `out` holds something else than runs, or a folder of it a different run (the message lists the
            differences).
        KeyboardInterrupt: SIGINT or SIGTERM came; every SAE was saved at the same step before.
    """
    out, records = Path(out), dict[str, RunRecord]()
    configs = _checked_configs(cache, config, out)
    for each in _plan(configs, config, out, device, memory_bytes).passes:
        records |= _train_pass(cache, each, config.train, out, device, progress)
    return tuple(records.get(each.name) or _stored_record(each, out / each.name) for each in configs)


def plan(
    cache: Cache,
    config: SweepConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    memory_bytes: int | None = None,
) -> SweepPlan:
    """What `train` with the same arguments has still to do; nothing is written. Raises as `train` does."""
    return _plan(_checked_configs(cache, config, Path(out)), config, Path(out), device, memory_bytes)


def _plan(
    configs: Sequence[SAEConfig], config: SweepConfig, out: Path, device: torch.device | str, memory_bytes: int | None
) -> SweepPlan:
    pending = [each for each in configs if not _is_over(out / each.name)]
    return plan_passes(pending, config.train.batch_tokens, memory_bytes or free_memory(device))


def _checked_configs(cache: Cache, config: SweepConfig, out: Path) -> tuple[SAEConfig, ...]:
    """Every run resolved, none of them in a folder that holds something else."""
    _check_out(out, {run["name"] for run in config.runs})
    with _loader(cache, config.hook_names[:1], config.train, 0, "cpu") as loader:
        configs = config.expand(cache, config.train.training_tokens(loader.n_rows))
    for each in configs:
        _check_folder(out / each.name, _description(each, config.train, cache))
    return configs


def _train_pass(
    cache: Cache,
    configs: Sequence[SAEConfig],
    train_config: TrainConfig,
    out: Path,
    device: torch.device | str,
    progress: Progress | None,
) -> dict[str, RunRecord]:
    """One reading of the cache for all of these SAEs, from the lowest step among them."""
    hook_names = tuple(dict.fromkeys(hook.hook_name for each in configs for hook in (*each.inputs, *each.outputs)))
    start = min(_saved_step(out / each.name) for each in configs)
    states = [_state(each, out / each.name, train_config, cache, device) for each in configs]
    with _loader(cache, hook_names, train_config, start, device) as loader:
        records = sweep(loader, states, train_config, out, progress=progress)
    for state in states:
        if records[state.config.name].error is None:
            _save_sae(state, out / state.config.name, train_config, cache)
    return records


def sweep(
    batches: Iterator[Batch],
    states: Sequence[TrainState],
    train_config: TrainConfig,
    out: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, RunRecord]:
    """Step every SAE on every batch until each has done its config's n_steps; records by name.

    batches: the stream, from the lowest step among the states; an SAE that is further joins at its own step. Writes
    metrics, timing, checkpoints and failed.json below out/<name>. An SAE ends bit for bit as if it was trained alone.

    Raises:
        DatasetError: the stream ends too early. KeyboardInterrupt: on SIGINT or SIGTERM, after the step, all saved.
    """
    workspace, clock = Workspace(), _Clock()
    with ExitStack() as stack:
        runs = [stack.enter_context(_Run(state, out / state.config.name, workspace)) for state in states]
        stopped_by = stack.enter_context(_signals())
        while active := [run for run in runs if not run.is_over]:
            batch = clock.next_batch(batches)
            if batch is None:
                raise _ended_early(active)
            logged = _step_all(active, batch, train_config, clock)
            if progress is not None:
                progress(clock.progress(runs, batch.step + 1, logged))
            if stopped_by:
                _save_all(active)
                raise KeyboardInterrupt(f"{signal.Signals(stopped_by[0]).name}: all is saved; the same command goes on")
    return {run.config.name: run.record() for run in runs}


def _step_all(
    active: Sequence["_Run"], batch: Batch, train_config: TrainConfig, clock: "_Clock"
) -> dict[str, dict[str, Any]]:
    """Step every SAE whose turn this batch is; what they logged, by name. Equal inputs are made once."""
    made: dict[tuple[ScaledHook, ...], Tensor] = {}
    clock.n_tokens += len(batch.row)
    for run in active:
        assert run.state.step >= batch.step, "the stream starts at the lowest step"
        if run.state.step == batch.step:
            n_rows = run.config.training_tokens - run.state.n_tokens
            x, y = (_scaled(batch, hooks, made)[:n_rows] for hooks in (run.config.inputs, run.config.outputs))
            clock.n_sae_tokens += len(x)
            run.step(x, y, train_config, clock)
    return {run.config.name: run.metrics for run in active if run.metrics.get("step") == batch.step + 1}


def _scaled(
    batch: Batch, hooks: tuple[ScaledHook, ...], made: dict[tuple[ScaledHook, ...], Tensor]
) -> Float[Tensor, "batch width"]:
    """The hooks' activations side by side, float32 and scaled; a copy, so that the batch stays as it was read.

    made: what was made of this batch before.
    """
    if hooks not in made:
        parts = [batch.x[hook.hook_name].to(torch.float32, copy=True).mul_(hook.scale) for hook in hooks]
        made[hooks] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return made[hooks]


def _save_all(active: Sequence["_Run"]) -> None:
    for run in active:
        if not run.is_over:
            run.save()


def _ended_early(active: Sequence["_Run"]) -> DatasetError:
    return DatasetError(
        f"sweep: the stream must serve {max(run.config.n_steps for run in active)} batches, it ended after "
        f"{min(run.state.step for run in active)}; train on fewer tokens"
    )


class _Run:
    """One SAE of a sweep: its state, and the files that it writes. A context manager that closes them."""

    def __init__(self, state: TrainState, folder: Path, workspace: Workspace):
        self.state, self.folder, self._workspace = state, folder, workspace
        self.config = state.config
        self.error: str | None = None
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        kept = [_cut_back(folder / name, state.step) for name in (METRICS_FILE, TIMING_FILE)]
        self.metrics: dict[str, Any] = kept[0][-1] if kept[0] else {}
        self._metrics_file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        self._timing_file = open(folder / TIMING_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics_file.close()
        self._timing_file.close()

    @property
    def is_over(self) -> bool:
        """Whether it diverged or did its last step."""
        return self.error is not None or self.state.step >= self.config.n_steps

    def step(
        self,
        x: Float[Tensor, "batch d_in"],
        y: Float[Tensor, "batch d_out"],
        train_config: TrainConfig,
        clock: "_Clock",
    ) -> None:
        """One step; then, when due, a line in each log and a checkpoint. Divergence ends this run alone."""
        started = time.perf_counter()
        try:
            outcome = train_step(self.state, x, self._workspace, y=y)
        except TrainingDiverged as error:
            self._fail(error)
            return
        is_last = self.state.step == self.config.n_steps
        self.seconds += time.perf_counter() - started
        if is_last or self.state.step % train_config.log_every == 0:
            self._log(log_record(self.state, y, outcome), clock)
        if is_last or self.state.step % train_config.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """A checkpoint, once the log up to it is durable. Weights that are not finite end this run instead."""
        try:
            check_weights_are_finite(self.state)
        except TrainingDiverged as error:
            self._fail(error)
            return
        for file in (self._metrics_file, self._timing_file):
            os.fsync(file.fileno())
        save_checkpoint(self.state, self.folder / CHECKPOINTS)

    def record(self) -> RunRecord:
        """What became of it."""
        return RunRecord(
            config=self.config, folder=self.folder, metrics=self.metrics, seconds=self.seconds, error=self.error
        )

    def _fail(self, error: TrainingDiverged) -> None:
        self.error = str(error)
        _write_json(self.folder / FAILED_FILE, {"step": self.state.step, "error": self.error})

    def _log(self, metrics: dict[str, Any], clock: "_Clock") -> None:
        self.metrics = metrics
        timing = {"step": self.state.step, "step_seconds": self.seconds, **clock.rates()}
        for file, record in ((self._metrics_file, metrics), (self._timing_file, timing)):
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()


@dataclass(slots=True)
class _Clock:
    """Wall time of a sweep since the call, the part of it spent waiting for data, and what was done in it."""

    started: float = field(default_factory=time.perf_counter)
    wait_seconds: float = 0.0
    n_tokens: int = 0
    n_sae_tokens: int = 0

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, None at the end; its wait is counted."""
        before = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - before
        return batch

    def rates(self) -> dict[str, float]:
        """Averages since the call."""
        seconds = time.perf_counter() - self.started
        return {
            "seconds": seconds,
            "tokens_per_second": self.n_tokens / seconds,
            "sae_tokens_per_second": self.n_sae_tokens / seconds,
            "wait_share": self.wait_seconds / seconds,
        }

    def progress(self, runs: Sequence[_Run], step: int, metrics: dict[str, dict[str, Any]]) -> SweepProgress:
        """The public view."""
        return SweepProgress(
            step=step,
            n_steps=max(run.config.n_steps for run in runs),
            n_tokens=self.n_tokens,
            n_sae_tokens=self.n_sae_tokens,
            n_saes=sum(not run.is_over for run in runs),
            seconds=time.perf_counter() - self.started,
            wait_seconds=self.wait_seconds,
            metrics=metrics,
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of acting; a second one acts as usual. Main thread only."""
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


def _loader(
    cache: Cache, hook_names: Sequence[str], train_config: TrainConfig, start_step: int, device: torch.device | str
) -> Loader:
    return Loader(
        cache,
        hook_names,
        batch_tokens=train_config.batch_tokens,
        seed=train_config.seed,
        epochs=train_config.epochs,
        start_step=start_step,
        exclude_special_tokens=train_config.exclude_special_tokens,
        device=device,
    )


def _state(
    config: SAEConfig, folder: Path, train_config: TrainConfig, cache: Cache, device: torch.device | str
) -> TrainState:
    """The state of the latest checkpoint, or the initial one in a new folder with its config.json."""
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        return load_checkpoint(config, checkpoint, device)
    _write_json(folder / CONFIG_FILE, _description(config, train_config, cache))
    b_dec = _initial_b_dec(config, train_config, cache).to(device)
    if config.init_firing_rate is None and config.architecture not in TRANSCODERS:
        return initial_state(config, b_dec)
    with _first_inputs(config, train_config, cache, device) as inputs:
        return initial_state(config, b_dec, torch.cat(list(inputs)))


def _initial_b_dec(config: SAEConfig, train_config: TrainConfig, cache: Cache) -> Float[Tensor, " d_out"]:
    """Zeros, or the mean or geometric median of the rows that are to be reconstructed, in units of the scaled ones."""
    if config.b_dec_init == "zeros":
        return torch.zeros(config.d_out)
    centres = []
    for hook in config.outputs:
        statistics = cache.statistics(hook.hook_name, split="train", row_filter=train_config.row_filter)
        centre = statistics.mean if config.b_dec_init == "mean" else statistics.geometric_median
        centres.append((torch.from_numpy(centre) * hook.scale).float())
    return torch.cat(centres)


@contextmanager
def _first_inputs(
    config: SAEConfig, train_config: TrainConfig, cache: Cache, device: torch.device | str
) -> Iterator[Iterator[Float[Tensor, "batch d_in"]]]:
    """The first batches of training, as the SAE gets them: to begin with, or to calibrate on."""
    with _loader(cache, [hook.hook_name for hook in config.inputs], train_config, 0, device) as loader:
        n_batches = max(1, min(CALIBRATION_BATCHES, config.training_tokens // train_config.batch_tokens))
        yield (_scaled(batch, config.inputs, {}) for batch in islice(loader, n_batches))


def _save_sae(state: TrainState, folder: Path, train_config: TrainConfig, cache: Cache) -> None:
    """sae/ of a trained SAE; a threshold over whole batches is calibrated on the first training batches."""
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
    save_inference_sae(config, inference_weights(state, threshold), folder / SAE_FOLDER, metadata=metadata)


def _description(config: SAEConfig, train_config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """What config.json says: all that decides how the run ends."""
    model = cache.identity["model"]
    description = {
        "sae": asdict(config),
        "train": asdict(train_config),
        "cache": {"path": str(cache.path.absolute()), "fingerprint": cache.fingerprint},
        "model": {"name": model["name"], "revision": model["revision"]},
    }
    return json.loads(json.dumps(description))  # as it reads back, so that it compares equal


def _check_out(out: Path, names: set[str]) -> None:
    """Raises CacheMismatch for a file, and for a folder with things in it of which none is a run."""
    if out.is_file():
        raise CacheMismatch(f"{out}: must be a folder for runs, is a file; pass another --out")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held and not names.intersection(held) and not any(out.glob(f"*/{CONFIG_FILE}")):
        raise CacheMismatch(f"{out}: must be empty or hold runs, holds {', '.join(held[:5])}; pass another --out")


def _check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises CacheMismatch unless the folder is absent, empty, or of this very run."""
    if not folder.exists():
        return
    if not (folder / CONFIG_FILE).is_file():
        if not folder.is_dir() or any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise CacheMismatch(f"{folder}: must be a run or absent, it has no {CONFIG_FILE}; pass another --out")
        return
    held, wanted = _flat(_read_json(folder / CONFIG_FILE)), _flat(description)
    differences = [
        f"{key} is {held.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held, *wanted} - set(_MAY_DIFFER))
        if held.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{folder}: holds another run: {'; '.join(differences)}; pass another --out or name")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sae": {"lr": 1}} -> {"sae.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_over(folder: Path) -> bool:
    """Whether an earlier call finished this run, or saw it diverge (it would again)."""
    return (folder / SAE_FOLDER).is_dir() or (folder / FAILED_FILE).is_file()


def _saved_step(folder: Path) -> int:
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    return 0 if checkpoint is None else checkpoint_step(checkpoint)


def _stored_record(config: SAEConfig, folder: Path) -> RunRecord:
    """The record of a run that an earlier call ended."""
    lines = _lines(folder / METRICS_FILE)
    failed = folder / FAILED_FILE
    error = str(_read_json(failed).get("error")) if failed.is_file() else None
    return RunRecord(config=config, folder=folder, metrics=lines[-1] if lines else {}, seconds=0.0, error=error)


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step`, and a torn one, which a resumed run writes again; returns those that stay."""
    kept = [line for line in _lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept).encode()
    if path.exists() and path.read_bytes() != text:
        write_atomically(path, [text])
    return kept


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, up to the first that a kill has torn; [] without a file."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: must be readable JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, [(json.dumps(values, indent=1, allow_nan=False) + "\n").encode()])
