"""Loggers: wandb, trackio and TensorBoard get the lines of metrics.jsonl too, behind the protocol `MetricLogger`.

Each is an extra of the package, such as `pip install 'actcache[wandb]'`. A logger gets a line once the file has it,
with the same keys and values. The x axis is the step, and n_tokens is one of the values. Training reads nothing back.
"""

import importlib
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from contextvars import Context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from actcache.errors import ActcacheError, ConfigError, ManifestError
from actcache.files import contents, is_file, write_atomically
from actcache.machine.installs import no_installs
from trainer.config.settings import SAEConfig

PROJECT = "actcache"  # project in trackio, and in wandb unless WANDB_PROJECT names another
ID_FILE = "logger_id"
RUN_ID = re.compile(rb"[0-9a-f]{12}")

Send = Callable[[Mapping[str, Any]], None]


@runtime_checkable
class MetricLogger(Protocol):
    """What a sweep needs of a logger."""

    def log(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Log one line of metrics.jsonl of the SAE `name`. "step" and "n_tokens" are among its keys."""
        ...

    def close(self) -> None:
        """Write out all lines. No line comes afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """An SAE whose lines will be logged.

    Attributes:
        config: the SAE.
        folder: its folder RUNS/<name>, which exists.
        step: how many steps are done already.
    """

    config: SAEConfig
    folder: Path
    step: int

    @property
    def sweep(self) -> str:
        """The name of the folder of runs. Loggers group the runs under it."""
        return self.folder.resolve().parent.name


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown logger, and for one whose package is not installed."""
    for name in names:
        if name not in _MODULES:
            raise ConfigError(f"train: a logger must be one of {', '.join(_MODULES)}, got {name!r}")
        _module(name)


@contextmanager
def open_loggers(names: Sequence[str], runs: Sequence[LoggedRun]) -> Iterator[tuple[MetricLogger, ...]]:
    """Open each named logger once for these runs, and close it at the end.

    Raises:
        ConfigError: as `check_loggers`.
        ActcacheError: wandb cannot start a run.
    """
    with ExitStack() as stack:
        yield tuple(stack.enter_context(closing(_logger(name, runs))) for name in dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class _Logger:
    """A function for each SAE that sends a line of it, and what must be closed at the end."""

    send: Mapping[str, Send]
    opened: ExitStack

    def log(self, name: str, metrics: Mapping[str, Any]) -> None:
        self.send[name](metrics)

    def close(self) -> None:
        self.opened.close()


def _logger(name: str, runs: Sequence[LoggedRun]) -> MetricLogger:
    with no_installs(name), ExitStack() as opened:
        module = _module(name)
        send = {run.config.name: _OPEN[name](module, run, opened) for run in runs}
        return _Logger(send, opened.pop_all())


def _wandb(wandb: Any, run: LoggedRun, opened: ExitStack) -> Send:
    """Open one wandb run for an SAE. The run keeps its id, so wandb drops a line that is sent again after a kill."""
    try:
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.sweep,
            name=run.config.name,
            id=_run_id(run.folder),
            config=asdict(run.config),
            dir=run.folder,
            resume="allow",
            reinit="create_new",  # several are open at once
            settings=wandb.Settings(console="off", quiet=True),
        )
    except wandb.Error as error:
        raise ActcacheError(
            f"train: wandb must start a run for {run.config.name}, got {type(error).__name__}: {error}; "
            "see `wandb login`, or set WANDB_MODE=offline"
        ) from error
    opened.callback(started.finish)
    return lambda metrics: started.log(dict(metrics), step=metrics["step"])


def _trackio(trackio: Any, run: LoggedRun, opened: ExitStack) -> Send:
    """Open one trackio run for an SAE. trackio knows runs by name, so the name holds the id."""
    started = _printing_to_stderr(
        Context().run,  # a fresh context: trackio ends the run that its context holds
        trackio.init,
        project=PROJECT,
        group=run.sweep,
        name=f"{run.config.name}-{_run_id(run.folder)}",
        config=asdict(run.config),
        resume="allow",
        embed=False,
        auto_log_cpu=False,  # every SAE would log the same machine
        auto_log_gpu=False,
    )
    opened.callback(_printing_to_stderr, started.finish)
    return lambda metrics: started.log(_without_step(metrics), step=metrics["step"])


def _tensorboard(tensorboard: Any, run: LoggedRun, opened: ExitStack) -> Send:
    """Open an event file in the folder of an SAE. It hides the lines of an earlier file from the steps done again."""
    writer = opened.enter_context(tensorboard.SummaryWriter(run.folder, purge_step=run.step + 1))

    def send(metrics: Mapping[str, Any]) -> None:
        for key, value in _without_step(metrics).items():
            writer.add_scalar(key, value, global_step=metrics["step"])
        writer.flush()

    return send


_OPEN: dict[str, Callable[[Any, LoggedRun, ExitStack], Send]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
}
_MODULES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise ConfigError(
            f"train: the logger {name} needs a package that is not installed ({error}); pip install 'actcache[{name}]'"
        ) from error


def _printing_to_stderr(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call something that prints, with its output on stderr, because stdout is for JSON."""
    with redirect_stdout(sys.stderr):
        return call(*arguments, **named)


def _without_step(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "step"}


def _run_id(folder: Path) -> str:
    """The id that tells this run from runs of the same name in other sweeps. Its folder keeps it for later calls."""
    path = folder / ID_FILE
    if not is_file(path):
        write_atomically(path, [uuid.uuid4().hex[:12].encode()])
    held = contents(path)
    if not RUN_ID.fullmatch(held):  # another id would add these lines to another run
        raise ManifestError("must be 12 hex digits", path=path, way_out="remove it, and the loggers begin a new run")
    return held.decode()
