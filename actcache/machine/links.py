"""Files and folders that are reached through no link.

A cache or a run may be a stranger's. A link in it would lead whoever reads or writes there to another place. So each
folder on the way is opened within the one before it, and none that is a link. What the user names may be a link all the
same: `actcache.arguments.local_path` follows it beforehand.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actcache.errors import ManifestError

NOT_FOLLOWED = "is a link, and no link is followed there"
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW
_ON_THE_WAY = getattr(os, "O_PATH", os.O_RDONLY) | _FOLDER  # O_PATH asks for no permission to list what is there


@contextmanager
def folder_of(path: str | Path) -> Iterator[tuple[int, str]]:
    """(a descriptor of the folder that holds `path`, the name of `path` in it), for calls that take a `dir_fd`.

    A relative path begins at the working folder. An OSError that is raised meanwhile is named after the whole path.

    Raises ManifestError if a folder on the way is a link, OSError if it cannot be opened.
    """
    *folders, name = os.fspath(path).split("/")
    try:
        descriptor = os.open("/" if folders and not folders[0] else ".", _ON_THE_WAY)
        try:
            for number, folder in enumerate(folders):
                if folder not in ("", "."):
                    below = _below(descriptor, folder, "/".join(folders[: number + 1]))
                    os.close(descriptor)
                    descriptor = below
            yield descriptor, name
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = os.fspath(path).removesuffix("/.")
        raise


def open_unlinked(path: str, flags: int) -> int:
    """An opener for `open`: of what is reached through no link. Raises OSError with ELOOP if it is a link itself."""
    with folder_of(path) as (folder, name):
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)


def own_file(path: str, flags: int) -> int:
    """An opener for `open`: of a file that is appended to, cut or locked where it lies, and made if it is missing.

    Raises ManifestError if it is a link or has another name (a hard link), for then another file would change, and if
    it is no regular file.
    """
    what = "is no regular file"
    try:
        descriptor = open_unlinked(path, flags)
        try:
            status = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        if stat.S_ISREG(status.st_mode):
            if status.st_nlink <= 1:  # 0: somebody has just removed it
                return descriptor
            what = "has another name too (a hard link)"
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        if error.errno == errno.ELOOP:
            what = NOT_FOLLOWED
    way_out = "remove it, or put a copy with a name of its own in its place"
    raise ManifestError(what, path=Path(path), way_out=way_out)


def refuse_link(path: Path) -> None:
    """Raise ManifestError for a folder that is a link."""
    what = f"is a link to {os.readlink(path)}, and nothing is read or written through links"
    raise ManifestError(what, path=path, way_out="put the folder itself in its place")


def _below(folder: int, name: str, path: str) -> int:
    """A descriptor of the folder of that name in an open one. path: of it, for the message."""
    try:
        return os.open(name, _ON_THE_WAY, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):
            refuse_link(Path(path))
        raise
