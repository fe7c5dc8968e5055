"""Durable files.

A file is written aside, fsynced and renamed; then its folder is fsynced. So a reader never sees half of a file.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


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
    """Add the file's name to an OSError raised inside: write and fsync leave it out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts aside, fsync, rename over `path`, fsync its folder; returns the bytes written.

    A reader sees the old file or the whole new one. If a write or an fsync fails (OSError), the old file stays.
    """
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with naming(path), open(aside, "wb") as file:
            n_bytes = sum(file.write(part) for part in parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return n_bytes


def remove_leftovers(root: Path) -> None:
    """Delete the unfinished files of killed writers below `root`. Only the holder of the lock may call this."""
    for path in root.rglob(f".*{PARTIAL_SUFFIX}"):
        path.unlink()
