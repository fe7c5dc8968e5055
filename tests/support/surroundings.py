"""Faults of the surroundings: limits that are reached, and system calls that fail.

Where only a system call that fails can make the fault, Python's own `open`, `stat`, `read`, `mmap`, ... fail.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import mmap
import os
import resource
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from actcache.machine.limits import _group_folders

ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.EIO, errno.ESTALE)


@contextmanager
def limited(which: int, value: int) -> Iterator[None]:
    """This process has no more than `value` of the resource `which`, as `resource` names it."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def descriptors(limit: int) -> Iterator[None]:
    """This process may have no more than `limit` open descriptors."""
    gc.collect()  # mapped files of tests before are held by exceptions whose tracebacks are circles
    with limited(resource.RLIMIT_NOFILE, limit):
        yield


@contextmanager
def address_space(n_bytes: int) -> Iterator[None]:
    """This process may map no more than `n_bytes` beside what it has mapped."""
    with limited(resource.RLIMIT_AS, mapped_bytes() + n_bytes):
        yield


def mapped_bytes() -> int:
    """How much address space this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def control_group(n_bytes: int) -> Iterator[Path]:
    """A real control group within our own, whose processes may take `n_bytes` of memory together; empty at the end.

    The test is skipped where none can be made.
    """
    group = _new_group(n_bytes)
    if group is None:
        pytest.skip("no control group can be made here")
    try:
        yield group
    finally:
        group.rmdir()


def _new_group(n_bytes: int) -> Path | None:
    for folder in _group_folders("memory"):
        group = folder / f"actcache-test-{uuid.uuid4().hex}"
        with suppress(OSError):
            group.mkdir()
            for limit in (group / "memory.max", group / "memory.limit_in_bytes"):
                if limit.exists():
                    limit.write_text(str(n_bytes))
                    return group
            group.rmdir()
    return None


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1


class FailingCalls:
    """System calls about files below a folder, counted; one of them fails. failed: which did, and for which file."""

    def __init__(self, folder: Path, number: int | None = None, error: int = errno.EIO):
        """number: from 0, of the call that fails; None lets every call do. error: its errno."""
        self._folder, self._number, self._error = str(folder), number, error
        self.names: list[str] = []
        self.failed = ""

    @property
    def n_calls(self) -> int:
        """How many there were. names: what each was."""
        return len(self.names)

    @contextmanager
    def __call__(self) -> Iterator[FailingCalls]:
        """The calls fail inside."""
        patches = [
            *((where, "open") for where in (builtins, io, os)),
            *((os, name) for name in ("stat", "fstat", "scandir", "listdir")),
            (mmap, "mmap"),
        ]
        with ExitStack() as stack:
            for where, name in patches:
                stack.enter_context(patch.object(where, name, self._failing(name, getattr(where, name))))
            yield self

    def _failing(self, name: str, call: Any) -> Any:
        if name == "mmap":
            return self._failing_map(call)

        def failing(*arguments: Any, **named: Any) -> Any:
            target = self.path_of(arguments[0] if arguments else ".", named.get("dir_fd"))
            found = call(*arguments, **named) if self._fails(name, target) else None
            return _FailingFile(found, self) if name == "open" and isinstance(found, io.BufferedReader) else found

        return failing

    def _failing_map(self, base: type[mmap.mmap]) -> type[mmap.mmap]:
        fails = self._fails

        class FailingMap(base):
            def __new__(cls, descriptor: int, *arguments: Any, **named: Any) -> mmap.mmap:
                fails("mmap", descriptor)
                made = super().__new__(cls, descriptor, *arguments, **named)
                made.where = os.readlink(f"/proc/self/fd/{descriptor}")
                return made

            def size(self) -> int:
                fails("size", self.where)
                return super().size()

            def madvise(self, *arguments: int) -> None:
                fails("madvise", self.where)
                super().madvise(*arguments)

        return FailingMap

    def _fails(self, name: str, target: object) -> bool:
        """Always True; raises OSError if this is the call that fails. As the kernel does it, without a name."""
        path = self.path_of(target)
        if path.startswith(self._folder):
            self.names.append(name)
            if self.n_calls - 1 == self._number:
                self.failed = f"{name} {path}"
                raise OSError(self._error, os.strerror(self._error))
        return True

    def path_of(self, target: object, folder: int | None = None) -> str:
        """The path that an argument means, a descriptor or a path, which may be one within an open folder."""
        if isinstance(target, int):
            try:
                return os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return ""
        if not isinstance(target, str | os.PathLike):
            return ""
        return os.path.abspath(os.path.join(self.path_of(folder) if folder is not None else "", os.fspath(target)))

    def reading(self, file: io.BufferedReader) -> None:
        """Count a read of a file; raises OSError if it is the call that fails."""
        self._fails("read", file.name)


class _FailingFile:
    """A file whose reads may fail."""

    def __init__(self, file: io.BufferedReader, calls: FailingCalls):
        self._file, self._calls = file, calls

    def read(self, *arguments: int) -> bytes:
        self._calls.reading(self._file)
        return self._file.read(*arguments)

    def readinto(self, buffer: Any) -> int:
        self._calls.reading(self._file)
        return self._file.readinto(buffer)

    def __enter__(self) -> _FailingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def outcome(do: Callable[[], Any]) -> Any:
    """What it gives, or the exception that it raises."""
    try:
        return do()
    except Exception as error:
        return error
