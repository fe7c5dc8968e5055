"""One SAE of a sweep while it trains: `Run` steps it and writes the logs, checkpoints and failed.json of its folder.

`trainer.run_folder` says what the folder holds. `sweep` writes config.json and sae/.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.errors import TrainingDiverged
from actcache.files import own_file, write_atomically
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.kernels import active
from trainer.kernels.active import Workspace
from trainer.run_folder import CHECKPOINTS, FAILED_FILE, METRICS_FILE, TIMING_FILE, read_json, whole_lines, write_json
from trainer.training.checkpoint import checkpoint_step, latest_checkpoint, save_checkpoint
from trainer.training.loggers import MetricLogger
from trainer.training.step import TrainState, check_losses_are_finite, check_weights_are_finite, log_record, train_step

LOOK_EVERY = 100  # steps on CUDA, at most, between two looks at the losses, each of which waits for the device
Moment = float | torch.cuda.Event


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What became of one SAE.

    Attributes:
        config: the SAE.
        folder: its folder RUNS/<name>.
        metrics: its last line of metrics.jsonl; {} if there is none.
        seconds: how long its steps took in this call. On CUDA it is the device's time.
        error: why it was stopped; None if it was not.
    """

    config: SAEConfig
    folder: Path
    metrics: dict[str, Any]
    seconds: float
    error: str | None


class Run:
    """One SAE of a sweep: its state, and the files that it writes. As a context manager it closes them."""

    def __init__(
        self,
        state: TrainState,
        folder: Path,
        train_config: TrainConfig,
        workspace: Workspace,
        loggers: Sequence[MetricLogger],
    ):
        self.state, self.folder, self._workspace = state, folder, workspace
        self.config, self._train_config, self._loggers = state.config, train_config, loggers
        self.error: str | None = None
        self.seconds = 0.0
        self._unseen: list[tuple[Tensor, Moment, Moment]] = []  # of each step since the last look: loss, start, end
        folder.mkdir(parents=True, exist_ok=True)
        lines, _ = (_cut_back(folder / name, state.step) for name in (METRICS_FILE, TIMING_FILE))
        self.metrics: dict[str, Any] = lines[-1] if lines else {}
        self._line: dict[str, Any] | None = None  # the line of the step just done, until it is written
        self._metrics_file = open(folder / METRICS_FILE, "a", encoding="utf-8", opener=own_file)  # noqa: SIM115, closed by __exit__
        self._timing_file = open(folder / TIMING_FILE, "a", encoding="utf-8", opener=own_file)  # noqa: SIM115

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics_file.close()
        self._timing_file.close()

    @property
    def is_over(self) -> bool:
        """Whether the SAE diverged or did its last step."""
        return self.error is not None or self.state.step >= self.config.n_steps

    def is_due(self, every: int | None) -> bool:
        """Whether the step just done is the last one, or a multiple of `every`. With None no step is due."""
        is_last = self.state.step == self.config.n_steps
        return every is not None and (is_last or self.state.step % every == 0)

    def step(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]) -> None:
        """Do one step, and make its line for the log if one is due. If the SAE diverges, this run alone ends.

        On CUDA up to `LOOK_EVERY` more steps may follow before the divergence is seen. Nothing of them is written.

        Args:
            x: scaled rows, as the config's `inputs` say.
            y: the scaled rows that are to be reconstructed, as its `outputs` say.
        """
        started = _moment(x.device)
        try:
            outcome = train_step(self.state, x, self._workspace, y=y)
        except TrainingDiverged as error:
            self._fail(error)
            return
        self._unseen.append((outcome.loss.total, started, _moment(x.device)))
        is_logged = self.is_due(self._train_config.log_every) or self.is_due(self._train_config.eval_every)
        if is_logged or len(self._unseen) == LOOK_EVERY or not active.on_cuda(x):
            self._look()
        if is_logged and self.error is None:
            self._line = log_record(self.state, y, outcome)

    def _look(self) -> None:
        """Add up the times of the steps since the last look. A loss that is not finite ends this run."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        losses = torch.stack([loss for loss, _, _ in unseen])
        try:
            check_losses_are_finite(self.config, losses, first_step=self.state.step - len(unseen))
        except TrainingDiverged as error:
            self._fail(error)
        self.seconds += sum(_seconds(started, ended) for _, started, ended in unseen)

    def add_to_line(self, metrics: Mapping[str, float]) -> None:
        """Add held-out metrics to the line of this step. A metric that is not finite ends this run, as a loss does."""
        assert self._line is not None, "an evaluation is logged"
        wild = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wild:
            self._fail(
                TrainingDiverged(
                    f"{self.config.name}: held-out metrics must stay finite, got {metrics[wild[0]]} for {wild[0]} "
                    f"after step {self.state.step}; lower lr={self.config.lr}"
                )
            )
        self._line |= metrics

    def write(self, rates: Callable[[], dict[str, float]]) -> None:
        """Write what is due after a step, unless this run is stopped: a line in each log, and a checkpoint.

        rates: gives the rates of the sweep so far, for timing.jsonl.
        """
        line, self._line = self._line, None
        if line is not None and self.error is None:
            self._log(line, rates())
        if self.error is None and self.is_due(self._train_config.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Write a checkpoint, once the logs up to it are durable. A loss or weight that is not finite ends this run."""
        self._look()
        if self.error is not None:
            return
        try:
            check_weights_are_finite(self.state)
        except TrainingDiverged as error:
            self._fail(error)
            return
        for file in (self._metrics_file, self._timing_file):
            os.fsync(file.fileno())
        save_checkpoint(self.state, self.folder / CHECKPOINTS, keep=self._train_config.keep_checkpoints)

    def record(self) -> RunRecord:
        """What became of the SAE."""
        return RunRecord(
            config=self.config, folder=self.folder, metrics=self.metrics, seconds=self.seconds, error=self.error
        )

    def _fail(self, error: TrainingDiverged) -> None:
        self.error = fail(self.folder, self.state.step, str(error))

    def _log(self, metrics: dict[str, Any], rates: dict[str, float]) -> None:
        self.metrics = metrics
        timing = {"step": self.state.step, "step_seconds": self.seconds, **rates}
        for file, record in ((self._metrics_file, metrics), (self._timing_file, timing)):
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
        for logger in self._loggers:
            logger.log(self.config.name, metrics)


def _moment(device: torch.device) -> Moment:
    """Now. On CUDA it is an event of the device, because the CPU's clock only says when work was queued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(started: Moment, ended: Moment) -> float:
    """Seconds between two moments of one device. On CUDA the device must have reached the second one."""
    if isinstance(started, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        return started.elapsed_time(ended) / 1000
    assert not isinstance(ended, torch.cuda.Event)
    return ended - started


def fail(folder: Path, step: int, error: str) -> str:
    """Write failed.json: why a run diverged, and after which step. Returns the error."""
    write_json(folder / FAILED_FILE, {"step": step, "error": error})
    return error


def saved_step(folder: Path) -> int:
    """The step of the latest checkpoint of a run; 0 without one."""
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    return 0 if checkpoint is None else checkpoint_step(checkpoint)


def stored_record(config: SAEConfig, folder: Path) -> RunRecord:
    """The record of a run that ended in an earlier call."""
    lines = whole_lines(folder / METRICS_FILE)
    failed = folder / FAILED_FILE
    error = str(read_json(failed).get("error")) if failed.is_file() else None
    return RunRecord(config=config, folder=folder, metrics=lines[-1] if lines else {}, seconds=0.0, error=error)


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove from a log the lines after `step` and an incomplete one: a resumed run writes them again.

    Returns the lines that stay.
    """
    lines = [line for line in whole_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if path.exists() and path.read_bytes() != text:
        write_atomically(path, [text])
    return lines
