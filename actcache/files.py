"""Durable files, and which paths can be theirs.

A file is written aside, fsynced and renamed; then its folder is fsynced. So a reader never sees half of a file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from actcache.errors import ConfigError

PARTIAL_SUFFIX = ".partial"
# what flock says where a file system has no locks; EBADF is NFS's, of a file that may only be read
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}

# of macOS, Windows, Linux desktops, NFS, ext4, file servers and notebooks; in lower case
_DROPPED = (
    *(".ds_store", "._*", ".spotlight-v100", ".fseventsd", ".trashes", ".apdisk", "icon\r"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *(".directory", ".hidden", ".trash-*", ".nfs*", ".fuse_hidden*", "lost+found", ".snapshot", "@eadir"),
    ".ipynb_checkpoints",
)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[:/]")  # s3://; a Path of it has one slash; fsspec chains with ::


def local_path(path: str | Path) -> Path:
    """The path of a file or folder, with "~" expanded. Raises ConfigError for an address such as s3://bucket/cache."""
    refuse_address(path, "a path of this machine")
    return Path(os.path.expanduser(path))


def refuse_address(name: str | Path, instead: str) -> None:
    """Raise ConfigError for an address, which as a path would be a folder of the name "s3:".

    instead: what the caller should pass, for the message.
    """
    if ADDRESS.match(str(name)):
        raise ConfigError(f"{name}: no address is read or written; mount or copy what is there, and pass {instead}")


def can_only_be_a_path(name: str, suffixes: Collection[str]) -> bool:
    """Whether a name cannot be one of the hub, owner/name. suffixes: of the files that such a path may have."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in suffixes


def missing_here(name: str) -> str:
    """What to say first when the hub has no owner/name: that a folder called owner is here and lacks it; else ""."""
    owner = os.path.dirname(name)
    return f"the folder {owner} is here and lacks it; the hub: " if owner and os.path.isdir(owner) else ""


def contents(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises OSError if it is missing or no regular file: a pipe would block for ever, and a device may never end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file")
    return path.read_bytes()


def file_bytes(path: Path) -> int | None:
    """Size in bytes of a regular file; None if it is missing, out of reach, or a folder, a pipe or a device."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; [] if it is missing. What systems drop into every folder is left out."""
    return sorted(path for path in folder.iterdir() if not _is_dropped(path.name)) if folder.exists() else []


def sync_folder(folder: Path) -> None:
    """Make renames within the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and fsync the folder that holds each new one."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError raised inside the file's name: write, fsync and flock leave it out, others name a file aside."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not str(error.filename).endswith(PARTIAL_SUFFIX)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts aside, fsync, rename over `path`, fsync its folder; returns the bytes written.

    A reader sees the old file or the whole new one. If a write or an fsync fails (OSError), the old file stays.
    """
    make_folder(path.parent)
    with naming(path), _aside(path) as file:
        try:
            n_bytes = sum(file.write(part) for part in parts)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)  # before the lock goes
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
    return n_bytes


def remove_leftovers(root: Path, *, alone: bool = False) -> None:
    """Delete the unfinished files of killed writers below `root`.

    A living writer holds the lock of its file, so its file stays, and what cannot be deleted stays too.

    Args:
        root: a folder.
        alone: whether nobody else writes there. Then files go that cannot be locked, because the file system has no
            locks.
    """
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL_SUFFIX):
                with suppress(OSError):  # a leftover misleads nobody, and another process may have removed it
                    _remove_if_left(os.path.join(folder, name), alone)


def _is_dropped(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in _DROPPED)


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, whose lock tells `remove_leftovers` that its writer lives."""
    while True:
        with open(path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"), "wb") as file:
            if _is_locked(file.fileno()) is not False and os.path.exists(file.name):
                yield file
                return


def _remove_if_left(path: str, alone: bool) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    descriptor = os.open(path, os.O_RDWR)  # NFS locks only what may be written
    try:
        locked = _is_locked(descriptor)
        if locked or (locked is None and alone):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool | None:
    """Try to lock an open file: True if it is locked now, False if another has it, None if there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True
