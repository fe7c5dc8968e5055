"""Writers in processes of their own, `actcache harvest` as typed, that come to grief at a point chosen before.

They are forked from a server that has imported everything once. What they call is real, and so is the signal that they
send themselves or the disk that they fill; only `os.fsync`, `os.replace`, `os.link`, `os.unlink` and `open` count their
calls.
"""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from actcache import files
from actcache.format import arrays
from actcache.store import journal, locks
from support.forked_commands import Forked, begin, call, server

CONTEXT_SIZE = 16
SEQUENCE_SHARD_TOKENS = 16 * CONTEXT_SIZE  # so that tiny caches have several shards of sequences
FILL = "fill the disk"
PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")
BALLAST = "ballast"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At the `count`-th event like `event`, send oneself the signal `action`, or FILL the disk.

    event: "<kind> <path below the cache>" with * as in file names. Of a file, aside or not, in order: opening,
    appending, writing (half of it is written), syncing, synced; then replacing, replaced, and folder with
    the path of its folder, synced; linking, linked; unlinking, unlinked.
    """

    event: str
    count: int = 1
    action: int | str = signal.SIGKILL


class Writers:
    """Starts writers on one model and text."""

    def __init__(self, model_dir: Path, texts: Path, folder: Path):
        """folder: for what they say."""
        self._common = ["--model", model_dir, "--dataset", texts, "--context-size", CONTEXT_SIZE, "--batch-size", 8]
        self._common += ["--holdout", 0.2, "--device", "cpu"]
        self._folder, self._started, self._server = folder, [], server()

    def kill_all(self) -> None:
        """Let nobody wait for what a failed test has left running, or stopped."""
        for started in self._started:
            started.kill()

    def arguments(self, out: Path, hooks: Sequence[str], tokens: int | None, *more: object) -> list[str]:
        """What is typed behind `actcache`."""
        named = [part for hook in hooks for part in ("--hook", hook)]
        limit = [] if tokens is None else ["--tokens", tokens]
        return ["harvest", *map(str, [*self._common, "--out", out, *named, *limit, *more])]

    def start(
        self,
        out: Path,
        hooks: Sequence[str],
        tokens: int | None,
        *more: object,
        fault: Fault | None = None,
        file_bytes: int | None = None,
        events: Path | None = None,
    ) -> Forked:
        """Start a writer. file_bytes: what no file may exceed. events: where to write down all that it went through."""
        said = self._folder / f"said-{len(self._started)}.txt"
        arguments = (self.arguments(out, hooks, tokens, *more), out, said, fault, file_bytes, events)
        process = self._server.Process(target=_write, args=arguments)
        process.start()
        self._started.append(Forked(process=process, said_path=said))
        return self._started[-1]

    def run(self, *args: Any, **settings: Any) -> tuple[int, str]:
        """Start a writer and wait for it: its exit code, and what it said."""
        started = self.start(*args, **settings)
        return started.wait(), started.said


class _Watch:
    """Counts events, and acts at the chosen one."""

    def __init__(self, root: Path, fault: Fault | None):
        self._root, self._fault, self._count = os.path.realpath(root), fault, 0
        self.events: list[str] = []

    def reached(self, kind: str, path: str | Path) -> None:
        if self.is_now(kind, path):
            self.act()

    def is_now(self, kind: str, path: str | Path) -> bool:
        folder, name = os.path.split(os.path.relpath(os.path.realpath(path), self._root))
        match = PARTIAL.fullmatch(name)
        event = f"{kind} {os.path.join(folder, match[1] if match else name)}"
        self.events.append(event)
        if self._fault is None or not fnmatchcase(event, self._fault.event):
            return False
        self._count += 1
        return self._count == self._fault.count

    def act(self) -> None:
        assert self._fault is not None, "is_now"
        if self._fault.action == FILL:
            fill_disk(Path(self._root).parent)
        else:
            os.kill(os.getpid(), int(self._fault.action))

    def around(self, real: Callable[..., Any], before: str, after: str, which: int) -> Callable[..., Any]:
        """`real` with an event on both sides, of the path that is its argument number `which`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            path = _path_of(args[which], kwargs.get("dst_dir_fd", kwargs.get("dir_fd")))
            is_folder = os.path.isdir(path)
            if not is_folder:
                self.reached(before, path)
            result = real(*args, **kwargs)
            self.reached("folder" if is_folder else after, path)
            return result

        return watched

    def open(self, path: Path, mode: str, buffering: int = -1, **more: Any) -> io.IOBase:
        if mode == "rb":
            return open(path, mode, **more)
        self.reached("opening", path)
        if mode == "ab":  # a lock, never written
            return open(path, mode, **more)
        raw = _WatchedFile(self, path, mode.replace("b", ""), **more)
        return io.BufferedWriter(raw) if buffering else raw


class _WatchedFile(io.FileIO):
    """A file whose writes are events."""

    def __init__(self, watch: _Watch, path: Path, mode: str, opener: Callable[[str, int], int] | None = None):
        super().__init__(path, mode, opener=opener)
        self._watch, self._path = watch, path

    def write(self, data: memoryview) -> int:
        self._watch.reached("appending", self._path)
        if not self._watch.is_now("writing", self._path):
            return super().write(data)
        half = super().write(data[: len(data) // 2])
        self._watch.act()
        return half + super().write(data[half:])


def fill_disk(folder: Path) -> None:
    """Write a file there that leaves no room for another byte."""
    with open(folder / BALLAST, "ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def shrink_sequence_shards(set_value: Callable[[object, str, object], None] = setattr) -> None:
    """Make the shards of sequences small, here; a monkeypatch.setattr can undo it."""
    set_value(arrays, "SEQUENCE_SHARD_TOKENS", SEQUENCE_SHARD_TOKENS)


def _write(
    arguments: list[str], out: Path, said: Path, fault: Fault | None, file_bytes: int | None, events: Path | None
) -> None:
    """In the forked process: the command line, with a watch on its writes."""
    begin(said)
    shrink_sequence_shards()
    watch = _Watch(out, fault)
    os.fsync = watch.around(os.fsync, "syncing", "synced", 0)
    os.replace = watch.around(os.replace, "replacing", "replaced", 1)
    os.link = watch.around(os.link, "linking", "linked", 0)
    os.unlink = watch.around(os.unlink, "unlinking", "unlinked", 0)
    for module in (files, journal, locks):
        module.open = watch.open
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    try:
        call(arguments)
    finally:
        if events is not None:
            events.write_text("\n".join(watch.events))


def _path_of(argument: int | str | Path, folder: int | None = None) -> str:
    """The path that a system call's argument means, a descriptor or a path, which may be one within an open folder."""
    if isinstance(argument, int):
        return os.readlink(f"/proc/self/fd/{argument}")
    return os.fspath(argument) if folder is None else os.path.join(_path_of(folder), argument)
