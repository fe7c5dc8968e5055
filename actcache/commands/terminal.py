"""The terminal: options that commands share, progress bars, printing, and the exit codes of errors.

Nothing heavy is imported here, because `actcache --help` would wait for it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pwd
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from tqdm import tqdm
from typer.core import TyperGroup

from actcache.arguments import device_of, local_path
from actcache.errors import ActcacheError, ConfigError
from actcache.files import is_writable
from actcache.machine.installs import no_installs
from actcache.machine.limits import SCARCE_BYTES, lacked, memory_room, room_to_live, thread_limits

if TYPE_CHECKING:
    from actcache.harvesting.tasks import Worker

tqdm.monitor_interval = 0  # no thread that watches the bars
SLURM_SPECIAL_STEPS = 0xFFFFFFF0  # step ids from here on are of batch scripts, interactive shells and the like
SLURM_BATCH = re.compile(r"slurmstepd: \[\S+\.batch\]")  # the title of the process that starts a batch script
ARGUMENTS_WRONG, FAILED, INTERRUPTED = 2, 1, 130
MOST_OF_AN_ERROR = 8000  # letters, more than a screen
LIBRARY_BYTES = {"torch": 160 << 20, "transformers": 190 << 20}  # with what it imports, and what we import with it
RESERVE_BYTES = 4 << 20  # given back when memory is out, so that the last line can be made
DATA, MODEL, CACHE, TRAINING, OUTPUT = "Data", "Model", "Cache", "Training", "Output"  # the panels of --help

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="The folder that `actcache harvest` wrote.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", help="The folder to write. The same command again goes on where it stopped.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT)]
NoLock = Annotated[
    bool,
    typer.Option(
        "--no-lock",
        help="Take no lock: the file system has none, and no other process writes there.",
        rich_help_panel=CACHE,
    ),
]


def checked_device(device: str) -> str:
    """--device as it was given. Raises ConfigError before any work if it is none of this machine."""
    if device != "auto":
        device_of("--device", device)
    return device


Device = Annotated[
    str,
    typer.Option(
        help="The device: cpu, cuda:0, ... With auto it is CUDA where there is a GPU.",
        callback=checked_device,
        rich_help_panel=MODEL,
    ),
]

Model = Annotated[
    str | None,
    typer.Option(
        help="The model: a Hugging Face name or a local directory.",
        show_default="as the cache remembers",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="A LoRA adapter of the model, named likewise.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the model run Python code that it brings.", rich_help_panel=MODEL),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Take weights that are a pickle, if there are no safetensors.", rich_help_panel=MODEL
    ),
]


class Commands(TyperGroup):
    """Turns every error that is raised on purpose into one line and an exit code. --debug may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move --debug to the front, where typer expects it, from any place before `--`."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. If it fails, print one line and exit."""
        reserve: list[bytearray] = []
        try:
            reserve.append(bytearray(RESERVE_BYTES))
            require_room_for("torch")
            with no_installs("a library"):  # of no command is it the work to install anything
                return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on from here", INTERRUPTED)
        except Exception as error:
            reserve.clear()
            code, line = _outcome(error)
            if code is None:
                raise
            if ctx.params["debug"]:
                traceback.print_exception(error)
            fail(line, code)


def _outcome(error: Exception) -> tuple[int | None, str]:
    """(exit code, line) of an error of a command; code None for one that is not to be one line."""
    lack = lacked(error)
    if lack is not None:
        return FAILED, lack_line(lack)
    if isinstance(error, ConfigError):
        return ARGUMENTS_WRONG, str(error)
    if isinstance(error, (ActcacheError, OSError)):
        return FAILED, str(error)
    is_ours = hasattr(error, "exit_code")  # typer ends a command by an error
    if not is_ours and memory_room().n_bytes < SCARCE_BYTES:  # where memory is short, libraries fail in strange ways
        return FAILED, lack_line(error)
    return None, ""


def require_room_for(library: str) -> None:
    """Raise MemoryError if the kernel may end this process while it imports a library, or soon after.

    library: one of LIBRARY_BYTES. Whoever calls this is about to import it.
    """
    n_bytes = SCARCE_BYTES + (0 if library in sys.modules else LIBRARY_BYTES[library])
    if room_to_live().n_bytes < n_bytes:
        raise MemoryError(f"importing {library} and room to work may take {n_bytes / 1e9:.2f} GB")


def end_at_once_without_memory(ended: SystemExit) -> None:
    """End the process now if memory was out: what libraries do at the end of Python would fail too, with tracebacks."""
    if lacked(ended) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def lack_line(error: BaseException) -> str:
    """What was asked for, what there is, and the way out, where memory or threads ran out."""
    asked = next((line.strip() for line in str(error).splitlines() if line.strip()), _place(error))
    if "thread" in asked:
        limits = "; ".join((*thread_limits(), str(memory_room())))
        return f"out of threads or of memory for them ({asked}): {limits}; allow more, or pass OMP_NUM_THREADS=1"
    return (
        f"out of memory ({asked}): {memory_room()}; allow more, or take less: a smaller batch, fewer hooks, a smaller "
        "d_sae, or OMP_NUM_THREADS=1, because each thread reserves memory"
    )


def _place(error: BaseException) -> str:
    """The type of an error that says nothing, and the module where it was raised, if there was memory to note that."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return " in ".join((type(error).__name__, *(frame.f_globals.get("__name__", "?") for frame in frames[-1:])))


def with_local_paths(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which refuses an address among its paths before it begins. It gets its paths with "~" expanded."""

    @functools.wraps(command)
    def checked(**arguments: Any) -> None:
        command(**{name: _local(value) for name, value in arguments.items()})

    return checked


def _local(value: Any) -> Any:
    if isinstance(value, list):
        return [_local(each) for each in value]
    return local_path(value) if isinstance(value, Path) else value


def fail(line: str, code: int) -> NoReturn:
    """Print an error as one line, and exit with `code`. What is too long to be read is cut in its middle."""
    line = " ".join(line.split())
    line = (
        line
        if len(line) <= MOST_OF_AN_ERROR
        else f"{line[: MOST_OF_AN_ERROR // 2]} ... {line[-MOST_OF_AN_ERROR // 2 :]}"
    )
    say(f"error: {line}")
    raise typer.Exit(code)


def say(*lines: str) -> None:
    """Print lines for a person, on stderr. They may hold names, tokens and errors of strangers: see `plain`."""
    for line in lines:
        print(plain(line), file=sys.stderr)


def plain(line: str) -> str:
    """The line with each character escaped that is not to be seen: what a terminal obeys, ends lines or reorders them.

    So no name of a cache, a model or a file can clear the screen, write over other lines or look like one more line.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


class PlainRecord(logging.LogRecord):
    """A record of logging whose message is `plain`, whichever library writes it with whichever handler.

    A library's message of several lines stays one of several lines.
    """

    def getMessage(self) -> str:
        """The message, with its arguments."""
        message = super().getMessage()
        is_ours = self.name.partition(".")[0] in ("actcache", "trainer")
        return plain(message) if is_ours else "\n".join(map(plain, message.splitlines()))


def print_json(values: object) -> None:
    """Print one JSON object for a program, on stdout."""
    print(json.dumps(values, allow_nan=False))


class Bar:
    """A tqdm bar on stderr. It is called with (done, in all). touched: whether it was called."""

    def __init__(self, title: str, unit: str):
        self._bar = tqdm(desc=title, unit=unit, unit_scale=True, miniters=1, file=sys.stderr, disable=None)
        self.touched = False

    def __call__(self, done: int, total: int) -> None:
        if not self.touched:
            self._bar.reset(total)
            self._bar.initial = self._bar.n = 0
        self.touched = True
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar; its last state stays on the screen."""
        self._bar.close()


class StageBar:
    """A bar for each stage of a command. It is called with (name of the stage, done, in all)."""

    def __init__(self) -> None:
        self._bar, self._stage, self._done = None, "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage or done < self._done:
            self.close()
            self._bar, self._stage = Bar(stage, {"verify": "chunk", "harvest": "tok"}[stage]), stage
        self._done = done
        self._bar(done, total)

    def close(self) -> None:
        """End the last bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def resolved_device(device: str) -> str:
    """The device that --device names; "auto" is CUDA if there is a GPU, else the CPU. Raises ConfigError."""
    return str(device_of("--device", device))


@contextmanager
def locking(root: Path, no_lock: bool) -> Iterator[None]:
    """Run a command that writes into `root`. With --no-lock it takes no lock, and says so."""
    from actcache.store.locks import without_locks

    say_owner(root)
    if not no_lock:
        yield
        return
    say(f"{root}: no lock is taken; no other process may write here until this command ends")
    with without_locks():
        yield


def say_owner(folder: Path) -> None:
    """Say so if a folder that may be written belongs to another user: what it holds may be a stranger's."""
    try:
        owner = os.stat(folder).st_uid
    except OSError:  # it is not there yet, or the command says what is wrong
        return
    if owner != os.geteuid() and is_writable(folder):
        names = dict.fromkeys((owner, os.geteuid()), "")
        for number in names:
            with suppress(KeyError):
                names[number] = f" ({pwd.getpwuid(number).pw_name})"
        owners, mine = (f"user {number}{name}" for number, name in names.items())
        say(f"{folder}: belongs to {owners}, and is written by {mine}")


def this_worker(share: str | None) -> Worker:
    """The worker that --worker i/n names; None takes the worker that torchrun or srun made of this process.

    A worker that is not alone is told which one it is.
    """
    from actcache.harvesting.tasks import Worker

    share, whence = _launched_share() if share is None else (share, "--worker")
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if match is None:
        raise ConfigError(f"harvest: {whence} must be i/n, such as 0/4, got {share!r}")
    worker = Worker(index=int(match[1]), count=int(match[2]))
    if worker.count > 1:
        say(f"harvest: worker {worker.index} of {worker.count} ({whence}) takes one of {worker.count} shards")
    return worker


def _launched_share() -> tuple[str, str]:
    """(i/n, what says so): the share that torchrun or srun gave this process, or else all."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return f"{environment['RANK']}/{environment['WORLD_SIZE']}", "RANK/WORLD_SIZE of torchrun"
    n_tasks = environment.get("SLURM_NTASKS", "1")
    if _is_slurm_step() and "SLURM_PROCID" in environment:
        n_tasks = environment.get("SLURM_STEP_NUM_TASKS", n_tasks)
        return f"{environment['SLURM_PROCID']}/{n_tasks}", "SLURM_PROCID/SLURM_NTASKS of srun"
    if n_tasks != "1":
        say(f"harvest: SLURM_NTASKS is {n_tasks}, but srun did not start this process: it takes every shard")
    return "0/1", "no launcher"


def _is_slurm_step() -> bool:
    """Whether srun started this process. A batch script and a shell of salloc get the numbers of the whole job.

    A batch script that was submitted from within a step has the numbers of that step too, which are not its own.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SLURM_SPECIAL_STEPS and SLURM_BATCH.match(_slurm_title()) is None


def _slurm_title() -> str:
    """What Slurm calls its process that started this task, such as `slurmstepd: [7.0]`; "" if it is not to be seen."""
    try:
        task = Path("/proc", os.environ["SLURM_TASK_PID"], "stat").read_text()
        parent = task.rpartition(")")[2].split()[1]
        return Path("/proc", parent, "cmdline").read_text()
    except (KeyError, OSError, IndexError, ValueError):
        return ""


def local_device(device: str, device_map: str | None) -> str:
    """The device of this process. Of several processes on one machine, each takes a GPU of its own."""
    import torch

    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "") if _is_slurm_step() else "")
    mine = device == "auto" and device_map is None and rank.isdecimal() and torch.cuda.device_count() > 1
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if mine else device
