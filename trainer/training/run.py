"""One SAE of a sweep while it trains: `Run` steps it and writes the logs, checkpoints and failed.json of its folder.

`trainer.run_folder` says what the folder holds. `sweep` writes config.json and sae/.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.errors import TrainingDiverged
from actcache.files import contents_of_any_size, is_file, make_folder, naming, write_atomically
from actcache.machine.links import own_file
from trainer.checksums import CHECKSUMS_FILE, Checksums, GrowingChecksum, checksums_of, read_checksums, sealed
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.kernels import active
from trainer.kernels.active import Workspace
from trainer.run_folder import (
    CHECKPOINTS,
    FAILED_FILE,
    METRICS_FILE,
    TIMING_FILE,
    read_run_json,
    whole_lines,
    write_run_json,
)
from trainer.training.checkpoint import checkpoint_step, latest_checkpoint, save_checkpoint
from trainer.training.loggers import MetricLogger
from trainer.training.step import TrainState, check_losses_are_finite, check_weights_are_finite, log_record, train_step

LOGS = (METRICS_FILE, TIMING_FILE)
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
        lines = {name: [x for x in whole_lines(folder / name) if x["step"] <= state.step] for name in LOGS}
        self._checksums = _cut_back(folder, {name: _log_text(kept) for name, kept in lines.items()})
        self.metrics: dict[str, Any] = lines[METRICS_FILE][-1] if lines[METRICS_FILE] else {}
        self._line: dict[str, Any] | None = None  # the line of the step just done, until it is written
        self._logs: dict[str, _Log] = {}
        with ExitStack() as opened:  # closes the first if the second cannot be opened
            for name, kept in lines.items():
                self._logs[name] = opened.enter_context(closing(_Log(folder / name, _log_text(kept))))
            self._opened = opened.pop_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

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
        """Write a checkpoint, once the logs up to it and their checksums are durable.

        A loss or weight that is not finite ends this run.
        """
        self._look()
        if self.error is not None:
            return
        try:
            check_weights_are_finite(self.state)
        except TrainingDiverged as error:
            self._fail(error)
            return
        for name, log in self._logs.items():
            log.sync()
            self._checksums[name] = log.checksum.entry()
        write_atomically(self.folder / CHECKSUMS_FILE, [sealed(self._checksums)])
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
        for name, record in ((METRICS_FILE, metrics), (TIMING_FILE, timing)):
            self._logs[name].append(_log_text([record]))
        for logger in self._loggers:
            logger.log(self.config.name, metrics)


class _Log:
    """A log that grows by lines. checksum: of all that it holds."""

    def __init__(self, path: Path, held: bytes):
        """Open it. held: what it holds."""
        self._path, self.checksum = path, GrowingChecksum()
        self.checksum.add(held)
        with naming(path):
            self._file = open(path, "ab", opener=own_file)  # noqa: SIM115, closed by `close`

    def append(self, text: bytes) -> None:
        """Write lines at the end, and hand them to the system."""
        with naming(self._path):
            self._file.write(text)
            self._file.flush()
        self.checksum.add(text)

    def sync(self) -> None:
        """Make what was written durable."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


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
    write_run_json(folder, FAILED_FILE, {"step": step, "error": error})
    return error


def saved_step(folder: Path) -> int:
    """The step of the latest checkpoint of a run; 0 without one."""
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    return 0 if checkpoint is None else checkpoint_step(checkpoint)


def stored_record(config: SAEConfig, folder: Path) -> RunRecord:
    """The record of a run that ended in an earlier call."""
    lines = whole_lines(folder / METRICS_FILE)
    error = str(read_run_json(folder, FAILED_FILE).get("error")) if is_file(folder / FAILED_FILE) else None
    return RunRecord(config=config, folder=folder, metrics=lines[-1] if lines else {}, seconds=0.0, error=error)


def _cut_back(folder: Path, kept: Mapping[str, bytes]) -> Checksums:
    """Cut the logs back to the lines that are kept: a resumed run writes again what came after them.

    Returns the checksums of the run's files. Those of the logs are cut back first, so that after a kill in between the
    logs are longer than what is summed, and not shorter.
    """
    make_folder(folder)
    checksums = read_checksums(folder / CHECKSUMS_FILE, warns=any(kept.values()))
    cut = {name: text for name, text in kept.items() if name in checksums and len(text) < checksums[name]["n_bytes"]}
    if cut:
        checksums |= checksums_of(cut)
        write_atomically(folder / CHECKSUMS_FILE, [sealed(checksums)])
    for name, text in kept.items():
        if is_file(folder / name) and contents_of_any_size(folder / name) != text:
            write_atomically(folder / name, [text])
    return checksums


def _log_text(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
