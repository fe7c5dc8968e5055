"""Where the lines of metrics.jsonl go besides: wandb, trackio and TensorBoard, side by side behind `MetricLogger`.

Each is an extra of the package, such as `pip install 'actcache[wandb]'`. A logger gets a line when the file has it,
with its keys and values; the x axis is the step, and n_tokens is one of the values. Nothing comes back from it.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from contextvars import Context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from actcache.errors import ActcacheError, ConfigError
from actcache.files import write_atomically
from trainer.config.settings import SAEConfig

PROJECT = "actcache"  # of wandb, unless WANDB_PROJECT names another, and of trackio
ID_FILE = "logger_id"

Send = Callable[[Mapping[str, Any]], None]


@runtime_checkable
class MetricLogger(Protocol):
    """What a sweep needs of a logger."""

    def log(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl of the SAE of this name; "step" and "n_tokens" are among its keys."""
        ...

    def close(self) -> None:
        """Write out what was taken; no line comes after."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """An SAE whose lines are to come. folder: its RUNS/<name>, which exists. step: how many are done before."""

    config: SAEConfig
    folder: Path
    step: int

    @property
    def sweep(self) -> str:
        """Name of the folder of runs, under which loggers group them."""
        return self.folder.resolve().parent.name


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError for a logger that there is not, and for one whose package is not installed."""
    for name in names:
        if name not in _MODULES:
            raise ConfigError(f"train: a logger must be one of {', '.join(_MODULES)}, got {name!r}")
        _module(name)


@contextmanager
def open_loggers(names: Sequence[str], runs: Sequence[LoggedRun]) -> Iterator[tuple[MetricLogger, ...]]:
    """The named loggers, each once and ready for the lines of these runs; closed at the end.

    Raises ConfigError as `check_loggers`, ActcacheError if wandb cannot start a run.
    """
    with ExitStack() as stack:
        yield tuple(stack.enter_context(closing(_logger(name, runs))) for name in dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class _Logger:
    """How to send a line of each SAE, and what to close at the end."""

    send: Mapping[str, Send]
    opened: ExitStack

    def log(self, name: str, metrics: Mapping[str, Any]) -> None:
        self.send[name](metrics)

    def close(self) -> None:
        self.opened.close()


def _logger(name: str, runs: Sequence[LoggedRun]) -> MetricLogger:
    module = _module(name)
    with ExitStack() as opened:
        send = {run.config.name: _OPEN[name](module, run, opened) for run in runs}
        return _Logger(send, opened.pop_all())


def _wandb(wandb: Any, run: LoggedRun, opened: ExitStack) -> Send:
    """One wandb run an SAE. It keeps its id, and of a line that comes again after a kill wandb drops the second."""
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
    """One trackio run an SAE. trackio knows runs by name, so the name holds the id."""
    started = _printing_to_stderr(
        Context().run,  # of its own: trackio ends the run that the context has
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
    """One event file an SAE and call, in its folder; it hides what an earlier one has of the steps done again."""
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
    """Call what prints to stdout, which is for JSON."""
    with redirect_stdout(sys.stderr):
        return call(*arguments, **named)


def _without_step(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "step"}


def _run_id(folder: Path) -> str:
    """What tells this run from one of the same name in another sweep; kept in its folder, for when it goes on."""
    path = folder / ID_FILE
    if not path.exists():
        write_atomically(path, [uuid.uuid4().hex[:12].encode()])
    return path.read_text()
