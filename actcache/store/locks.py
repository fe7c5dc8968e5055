"""Locks on files: one process settles or finalises a cache at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actcache.files import make_folder
from actcache.format.paths import SETTLING

PROBE_SECONDS = 0.5  # a probe of another process holds a slot for microseconds


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """The one process that settles the plan, or finalises, at a time; others wait here."""
    path = root / SETTLING
    while True:
        make_folder(path.parent)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(path, file.fileno()):
                yield
                return


def is_held(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def try_lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was got; tried for as long as another process's probe may hold it."""
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        else:
            return True


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name: whoever held its lock may have replaced or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
