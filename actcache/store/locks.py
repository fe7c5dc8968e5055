"""Locks on files (flock): `exclusive`, by which one process at a time changes a cache, and what others lock with.

Whoever holds a lock leaves a note that says who that is. Where the file system has no locks, every function here raises
LocksMissing, unless the caller is inside `without_locks`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from actcache.errors import LocksMissing
from actcache.files import (
    NO_LOCKS,
    NOT_WRITABLE,
    contents,
    is_writable,
    make_folder,
    naming,
    not_writable,
    opened,
    refuse_links,
    remove_leftovers,
    require_writable,
)
from actcache.format.paths import EXCLUSIVE_LOCK
from actcache.machine.links import own_file

PROBE_SECONDS = 0.5  # `is_held` in another process holds a lock for microseconds
SILENT_SECONDS = 1.0  # whoever waits longer says so
POLL_SECONDS = 0.01
NOTE_BYTES = 300  # of a note that are read
HAS_TO_WRITE = "this has to write the cache"

logger = logging.getLogger("actcache")
_are_off: ContextVar[bool] = ContextVar("locks are off", default=False)


@contextmanager
def without_locks() -> Iterator[None]:
    """Take no lock meanwhile, in this thread. The caller knows that no other process writes."""
    token = _are_off.set(True)
    try:
        yield
    finally:
        _are_off.reset(token)


def are_off() -> bool:
    """Whether this is inside `without_locks`."""
    return _are_off.get()


def remove_abandoned(root: Path) -> None:
    """Delete the unfinished files of killed writers below `root`, as `remove_leftovers` does."""
    remove_leftovers(root, alone=are_off())


@contextmanager
def exclusive(root: Path, what: str = "changes it") -> Iterator[None]:
    """Let one process at a time settle a plan, finalise, repair or relabel. Others wait here, and say for whom.

    Args:
        root: the folder of the cache; it is made if it is missing.
        what: what this process does meanwhile, for those who wait.

    Raises:
        LocksMissing: the file system has no locks.
        ManifestError: the cache holds a link through which would be written elsewhere.
        OSError: this user may not write the cache. The error names the folder.
    """
    path = root / EXCLUSIVE_LOCK
    refuse_links(root)
    while True:
        with _refusal_explained(root):
            make_folder(path.parent)
            file = open(path, "ab", opener=own_file)  # noqa: SIM115  # closed below
        with file:
            _wait_for(path, file.fileno())
            if is_at(path, file.fileno()):
                note_holder(file.fileno(), what)
                try:
                    yield
                finally:
                    with suppress(OSError):
                        file.truncate(0)  # the note is of nobody any more
                return


def may_write(root: Path) -> bool:
    """Whether this user may write the cache, as far as `exclusive` needs it. The folder may be missing."""
    return is_writable(root / EXCLUSIVE_LOCK)


def refuse_unwritable(root: Path) -> None:
    """Raise OSError, which names the folder, unless this user may write the cache. For commands that have --out."""
    require_writable(root, root / EXCLUSIVE_LOCK, f"{HAS_TO_WRITE}; pass another --out")


def note_holder(descriptor: int, what: str) -> None:
    """Replace the note in an open file: who holds the lock now, and `what` that process does. `holder` reads it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError):  # the lock counts, the note is for people
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} ({what}, since {since})\n".encode())


def holder(note: Path) -> str:
    """What the note in a file says of the process that holds the lock; "another process" if there is no note."""
    try:
        said = contents(note)[:NOTE_BYTES].decode(errors="replace")
    except OSError:
        said = ""
    return " ".join(said.split()) or "another process"


def is_held(path: Path) -> bool:
    """Whether any process holds the exclusive lock of a file. Raises LocksMissing, and as `opened`."""
    with opened(path) as file:
        return not _locked(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)


def try_lock(descriptor: int, kind: int) -> bool:
    """Try to take a lock without waiting for its holder. Raises LocksMissing.

    `is_held` holds a lock for a moment, so try for PROBE_SECONDS.

    Args:
        descriptor: of the open file. For an exclusive lock on NFS it must be open for writing.
        kind: fcntl.LOCK_EX or fcntl.LOCK_SH.
    """
    return _locked_within(descriptor, kind, PROBE_SECONDS)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has that path. Whoever held its lock may have replaced or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _wait_for(path: Path, descriptor: int) -> None:
    if not _locked_within(descriptor, fcntl.LOCK_EX, SILENT_SECONDS):
        logger.warning("%s: waits for %s", path, holder(path))
        _locked(descriptor, fcntl.LOCK_EX)


def _locked_within(descriptor: int, kind: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _locked(descriptor, kind | fcntl.LOCK_NB):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _locked(descriptor: int, kind: int) -> bool:
    """Take the lock of an open file. False if that would mean waiting, and `kind` forbids it."""
    if are_off():
        return True
    path = _path_of(descriptor)
    try:
        with naming(path):
            fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise LocksMissing(
            f"{path}: the file system must have locks, it says: {error.strerror}; pass --no-lock if you know that no "
            "other process writes here, or take another folder"
        ) from error
    return True


def _path_of(descriptor: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:  # there is no /proc
        return Path("a lock file")


@contextmanager
def _refusal_explained(root: Path) -> Iterator[None]:
    """Name the folder and the way out where this user may not write."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in NOT_WRITABLE:
            raise
        raise not_writable(root, error.errno, HAS_TO_WRITE) from error
