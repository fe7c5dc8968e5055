"""`actcache` as it is typed, in processes forked from a server that has imported everything once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import cli
from support.places import CHILD, ROOT
from support.surroundings import mapped_bytes

STUCK_SECONDS = 600
# what commands import when they need it, here and in libraries
PRELOADED = [
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("actcache", "trainer")
        for path in sorted((ROOT / package).rglob("[a-z]*.py"))
    ),
    "transformers.models.llama.modeling_llama",
]
CliRunner().invoke(cli.app, ["harvest", "--help"])  # once, in the server: each process would import the rest of typer


@dataclass(kw_only=True)
class Forked:
    """A forked process, and what it says on stdout and stderr."""

    process: Any
    said_path: Path
    exit_code: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        return self.said_path.read_bytes().decode()  # each carriage return is one

    def is_alive(self) -> bool:
        return self.exit_code is None and self.process.is_alive()

    def kill(self) -> bool:
        """SIGKILL; whether it was alive until then."""
        if self.exit_code is None:
            self.process.kill()
        return self.wait() == -signal.SIGKILL

    def wait(self, seconds: float = STUCK_SECONDS) -> int:
        """Its exit code; a signal's number is negative. After so many seconds it is stuck."""
        if self.exit_code is None:
            self.process.join(seconds)
            assert self.process.exitcode is not None, f"stuck: {self.said}"
            self.exit_code = self.process.exitcode
            self.process.close()  # else its pipes stay open until it is collected
        return self.exit_code


def server() -> Any:
    """The context of multiprocessing whose processes are such forks. When this returns, everything is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts: it inherits them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTHONPATH"] = CHILD["PYTHONPATH"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])  # counts for the first caller, who starts the server
    first = context.Process(target=int)  # the server has imported everything once it has ended
    first.start()
    first.join()
    return context


def begin(said: Path) -> None:
    """In the forked process: let what it says go into a file."""
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()  # else every page of what the server has imported is copied, and counts as memory of this process
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # else tqdm's and blosc's locks outlive a killed process


def call(arguments: Sequence[str]) -> None:
    """In the forked process: the command line."""
    sys.argv = ["actcache", *arguments]
    cli.main()


class Commands:
    """Runs commands, each in a process of its own."""

    def __init__(self, folder: Path):
        """folder: for what they say."""
        self._folder, self._server, self._n_started = folder, server(), 0

    def run(
        self,
        arguments: Sequence[object],
        before: Callable[[], None],
        what: Callable[[Sequence[str]], None] = call,
    ) -> tuple[int, str]:
        """The exit code of a command, and what it said.

        before: called in the process first; it is pickled. what: called with the arguments; the command line or
        something else.
        """
        self._n_started += 1
        said = self._folder / f"said-{self._n_started}.txt"
        process = self._server.Process(target=_call_after, args=(before, what, [*map(str, arguments)], said))
        process.start()
        forked = Forked(process=process, said_path=said)
        try:
            return forked.wait(60), forked.said
        finally:
            forked.kill()


def _call_after(
    before: Callable[[], None], what: Callable[[Sequence[str]], None], arguments: Sequence[str], said: Path
) -> None:
    begin(said)
    before()
    what(arguments)


def leave_address_space(n_bytes: int) -> None:
    """From now on this process may map no more than `n_bytes` beside what it has mapped."""
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + n_bytes, resource.RLIM_INFINITY))


def join_group(group: Path) -> None:
    """From now on this process is in a control group. What it has mapped until then counts elsewhere."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
