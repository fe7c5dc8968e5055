"""Locks on files (flock): `exclusive`, by which one process at a time changes a cache, and what journals lock with."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actcache.files import make_folder
from actcache.format.paths import EXCLUSIVE_LOCK

PROBE_SECONDS = 0.5  # `is_held` in another process holds a lock for microseconds


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Let one process at a time settle a plan, finalise, repair, relabel, or give up a slot; others wait here.

    root: the folder of the cache; it is made if it is missing.
    """
    path = root / EXCLUSIVE_LOCK
    while True:
        make_folder(path.parent)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(path, file.fileno()):
                yield
                return


def is_held(path: Path) -> bool:
    """Whether any process holds the exclusive lock of a file."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def try_lock(descriptor: int, kind: int) -> bool:
    """Try to take a lock without waiting for its holder.

    `is_held` holds a lock for a moment, so try for PROBE_SECONDS.
    """
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
    """Whether the open file still has that path. Whoever held its lock may have replaced or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
