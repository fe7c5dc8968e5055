"""Files, read and durably written.

Two things may be wrong with a file that is read. It is not there: `NoFile`, which is damage. Or the surroundings do not
let us read it, for want of permission, descriptors, memory, a sound disk: any other OSError, which says nothing about
the bytes. No caller may take the second for the first.

A file is written aside, fsynced and renamed; then its folder is fsynced. So a reader never sees half of a file. A
folder that has to appear whole is written aside in the same way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from actcache.errors import CacheLocked, CacheMismatch, ManifestError
from actcache.machine.limits import require_memory_for_array
from actcache.machine.links import NOT_FOLLOWED, folder_of, open_unlinked, refuse_link

MOST_BYTES = 1 << 28  # the journals of a cache of 45 TB have as many
PARTIAL_SUFFIX = ".partial"
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.partial", re.DOTALL)
# What the system says where no file is: nothing, a folder, a file in the place of a folder, a link to itself, a name
# that no file can have, a socket.
NOT_THERE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
WAYS_OUT = {
    errno.EMFILE: "let this process open more files (`ulimit -n`)",
    errno.ENFILE: "this machine has too many files open; close programs that hold many",
    errno.EACCES: "ask its owner for the permission, or run as a user who has it",
    errno.EPERM: "ask its owner for the permission, or run as a user who has it",
    errno.EROFS: "its file system is mounted for reading only; take another",
    errno.ENOMEM: "give this process more memory (`ulimit -v`), or run fewer programs",
    errno.EIO: "check the disk and the network, then run the same again",
    errno.ENOSPC: "free space on this disk, then run the same again",
    errno.EDQUOT: "your quota of this disk is used up; free some of it, then run the same again",
    errno.ESTALE: "the file server has lost hold of the file; run the same again",
}
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
FOLDER_CANNOT_BE_MADE = "the folder cannot be made; pass another --out"
# what flock says where a file system has no locks; EBADF is NFS's, of a file that may only be read
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}

# of macOS, Windows, Linux desktops, NFS, ext4, file servers and notebooks; in lower case
_DROPPED = (
    *(".ds_store", "._*", ".spotlight-v100", ".fseventsd", ".trashes", ".apdisk", "icon\r"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *(".directory", ".hidden", ".trash-*", ".nfs*", ".fuse_hidden*", "lost+found", ".snapshot", "@eadir"),
    ".ipynb_checkpoints",
)


class NoFile(FileNotFoundError):
    """There is no regular file: nothing at all, a folder, a pipe, a device, or a link to itself."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. OSErrors that are raised while it is open are named as by `naming`.

    Raises NoFile if there is none: a pipe would block for ever, and a device may never end. Raises ManifestError if it
    is a link, or reached through one.
    """
    with naming(path):
        try:
            file = open(path, "rb", opener=open_unlinked)  # noqa: SIM115
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ManifestError(NOT_FOLLOWED, path=path, way_out="put a copy in its place") from None
            if error.errno in NOT_THERE:
                raise NoFile(error.errno, error.strerror, str(path)) from None
            raise
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise NoFile(errno.EINVAL, "no regular file", str(path))
            yield file


def refuse_links(folder: Path) -> None:
    """Raise ManifestError if a link below this folder leads out of it: before any work that would come to write there.

    A link to a file does no harm: it is replaced, or refused by `own_file`. wandb makes links within its own folder.
    """
    folders, inside = [str(folder)], f"{os.path.realpath(folder)}/"
    while folders:
        try:
            with naming(folder), os.scandir(folders.pop()) as found:
                for entry in found:
                    is_folder_or_none = entry.is_symlink() and not entry.is_file()
                    if is_folder_or_none and not os.path.realpath(entry.path).startswith(inside):
                        refuse_link(Path(entry.path))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # it is not there yet, or another process has removed it
            continue


def contents(path: Path) -> bytes:
    """The bytes of a regular file that is read as a whole, such as a manifest or a journal.

    Raises NoFile and ManifestError as `opened`, ManifestError if it has more than MOST_BYTES, another OSError if it
    cannot be read.
    """
    with opened(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        parts = [file.read(n_bytes + 1) if n_bytes <= MOST_BYTES else b""]
        if len(parts[0]) > n_bytes:  # it grows
            while sum(map(len, parts)) <= MOST_BYTES and (more := file.read(1 << 20)):
                parts.append(more)
    found = b"".join(parts)
    if max(n_bytes, len(found)) > MOST_BYTES:
        raise ManifestError(f"must have at most {MOST_BYTES:,} bytes", path=path, way_out="put the right file there")
    return found


def contents_of_any_size(path: Path) -> bytes:
    """As `contents`, without a bound: of weights, and of logs, which may be long. MemoryError: it does not fit."""
    with opened(path) as file:
        require_memory_for_array(os.fstat(file.fileno()).st_size, f"reading {path}")
        return file.read()


def file_bytes(path: Path) -> int | None:
    """Size in bytes of a regular file; None where `contents` raises NoFile. Raises OSError if that cannot be told."""
    try:
        with naming(path):
            status = path.stat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_file(path: Path) -> bool:
    """Whether a regular file is there. Raises OSError if that cannot be told: newer Pythons' Path.is_file says no."""
    return file_bytes(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises OSError if that cannot be told."""
    try:
        with naming(path):
            return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise


def is_there(path: str) -> bool:
    """Whether something has that path, quickly. Raises OSError if that cannot be told."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        name_(error, Path(path))
        raise
    return True


def listed(folder: Path) -> list[Path]:
    """What a folder holds, in order; nothing if there is no folder.

    Raises OSError if it cannot be listed. Path.glob and Path.rglob take such a folder for an empty one.
    """
    try:
        with naming(folder):
            return sorted(folder.iterdir())
    except OSError as error:
        if error.errno in NOT_THERE:
            return []
        raise


def files_below(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder, in order. Raises OSError as `listed`."""
    for path in listed(folder):
        if not path.is_dir():
            yield path
        elif not path.is_symlink():
            yield from files_below(path)


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; [] if it is missing. What systems drop into every folder is left out."""
    return [path for path in listed(folder) if not any(fnmatchcase(path.name.lower(), each) for each in _DROPPED)]


def sync_folder(folder: Path) -> None:
    """Make renames within the folder durable."""
    with naming(folder), _open_folder(folder) as descriptor:
        os.fsync(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and fsync the folder that holds each new one.

    Raises ManifestError if it, or one of its parents, is a link.
    """
    with naming(folder):
        try:
            with _open_folder(folder):
                return
        except FileNotFoundError:
            make_folder(folder.parent)
        with suppress(FileExistsError), folder_of(folder) as (above, name):  # another process may be as far
            os.mkdir(name, dir_fd=above)
        sync_folder(folder.parent)
        with _open_folder(folder):  # it is a folder, and no link
            pass


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that is raised inside say which file it is about, and the way out; see `name_`."""
    try:
        yield
    except OSError as error:
        name_(error, path)
        raise


def name_(error: OSError, path: Path) -> None:
    """Add the way out to an error, and the file's name: read, write, fsync, flock and mmap leave it out.

    Others name a file aside, which is gone by the time that somebody reads the error.
    """
    if error.errno is None:
        return
    if error.filename is None or str(error.filename).endswith(PARTIAL_SUFFIX):
        error.filename = str(path)
        if error.filename2 is not None:  # of a rename
            error.filename2 = str(path)
    way_out = WAYS_OUT.get(error.errno)
    if way_out and not str(error.strerror).endswith(way_out):
        error.strerror = f"{error.strerror}; {way_out}"


def is_writable(path: Path) -> bool:
    """Whether this user may write a file, or below a folder. What is missing is made in the nearest folder above it."""
    there = _nearest(path)
    return is_allowed(there, os.W_OK | os.X_OK if is_folder(there) else os.W_OK)


def is_allowed(path: Path, mode: int) -> bool:
    """Whether this user may do that with a path. mode: os.R_OK, os.W_OK, os.X_OK or several of them."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def require_writable(path: Path, folder: Path, what: str) -> None:
    """Raise OSError, before any work, if this user may not write.

    Args:
        path: what the user asked to be written, for the message.
        folder: where files have to be made for it; it may be missing.
        what: what cannot be done, and what to do instead, for the message.
    """
    if not is_writable(folder):
        is_read_only = os.statvfs(_nearest(folder)).f_flag & os.ST_RDONLY
        raise not_writable(path, errno.EROFS if is_read_only else errno.EACCES, what)


def not_writable(path: Path, code: int, what: str) -> OSError:
    """The error of a path that this user may not write. code: one of NOT_WRITABLE. what: as of `require_writable`."""
    error = OSError(code, f"{os.strerror(code)}: {what}", str(path))
    name_(error, path)
    return error


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts aside, fsync, rename over `path`, fsync its folder; returns the bytes written.

    A reader sees the old file or the whole new one. If a write or an fsync fails (OSError), the old file stays.
    """
    with naming(path):
        make_folder(path.parent)
    with naming(path), _open_folder(path.parent) as folder:
        with _aside(path, folder) as file:
            try:
                n_bytes = sum(file.write(part) for part in parts)
                file.flush()
                os.fsync(file.fileno())
                os.replace(os.path.basename(file.name), path.name, src_dir_fd=folder, dst_dir_fd=folder)  # still locked
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.basename(file.name), dir_fd=folder)
                raise
        os.fsync(folder)
    return n_bytes


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside `path`, to be filled with fsynced files. After the block it is `path`, whole or not at all.

    Each writer has a folder of its own. What killed ones left is removed. Where there are no locks it stays, for its
    writer may live.

    Args:
        path: it must be missing or an empty folder.
        replace: it may also hold something, which goes.

    Raises:
        CacheLocked: another process is writing `path`.
        CacheMismatch: another process has written `path` meanwhile.
        ManifestError: `path` is a link, or reached through one.
        OSError: this user may not write there.
    """
    path = path.absolute()
    if path.is_symlink():
        refuse_link(path)
    require_writable(path, path.parent, FOLDER_CANNOT_BE_MADE)
    make_folder(path.parent)
    with naming(path), _folder_aside(path) as aside:
        try:
            yield aside
            _put(aside, path, replace)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    sync_folder(path.parent)


def remove_leftovers(root: Path, *, alone: bool = False) -> None:
    """Delete the unfinished files of killed writers below `root`: regular files with a name that `_aside` gives.

    A living writer holds the lock of its file, so its file stays, and what cannot be deleted stays too.

    Args:
        root: a folder.
        alone: whether nobody else writes there. Then files go that cannot be locked, because the file system has no
            locks.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]  # none of ours
        for name in names:
            if LEFTOVER.fullmatch(name):
                with suppress(OSError):  # a leftover misleads nobody, and another process may have removed it
                    _remove_if_left(os.path.join(folder, name), alone)


@contextmanager
def _aside(path: Path, folder: int) -> Iterator[BinaryIO]:
    """A new file beside `path`, whose lock tells `remove_leftovers` that its writer lives. folder: open, of `path`."""

    def make(name: str, flags: int) -> int:
        return os.open(os.path.basename(name), flags | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)

    while True:
        aside = _name_aside(path)
        with open(aside, "wb", opener=make) as file:
            try:
                is_ours = _is_locked(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink > 0
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(aside.name, dir_fd=folder)
                raise
            if is_ours:
                yield file
                return


@contextmanager
def _folder_aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, whose lock tells others that its writer lives. Raises CacheLocked if one does."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(PARTIAL_SUFFIX)}")
    for other in listed(path.parent):
        if name.fullmatch(other.name):
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError), _open_folder(other) as descriptor:
                locked = _is_locked(descriptor)
                if locked is False:
                    raise CacheLocked(f"{path}: another process is writing it; wait for it, or pass another --out")
                if locked:
                    shutil.rmtree(other, ignore_errors=True)
    while True:
        aside = _name_aside(path)
        aside.mkdir()
        with _open_folder(aside) as descriptor:
            if _is_locked(descriptor) is not False and aside.exists():
                yield aside
                return


def _put(aside: Path, path: Path, replace: bool) -> None:
    old = _name_aside(path)
    if replace and path.exists():
        path.rename(old)
    try:
        aside.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise CacheMismatch(f"{path}: another process has written it meanwhile; pass another --out") from error
    shutil.rmtree(old, ignore_errors=True)


def _name_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of a folder. Raises ManifestError if it is a link, or reached through one."""
    with folder_of(f"{folder}/.") as (itself, _):
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=itself)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_if_left(path: str, alone: bool) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # NFS locks only what may be written
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
