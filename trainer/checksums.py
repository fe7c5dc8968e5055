"""Checksums of the files of a run: a sealed JSON file beside them.

A file of checksums holds {"files": {name: {"n_bytes": ..., "crc32c": [CRC-32C of each block of BLOCK_BYTES]}}}. Blocks
are there so that of a mapped file only what is looked at has to be read. Of a log that grows, the first n_bytes are
meant. Files that it does not name are not checked, nor are any where there is none: runs of older versions have none.
"""

import errno
import functools
import logging
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.files import NoFile, contents, contents_of_any_size, file_bytes, opened, write_atomically
from actcache.format.codecs import crc32c
from actcache.format.seal import MALFORMED, seal, unseal
from actcache.machine.limits import json_memory, require_memory_for_array

CHECKSUMS_FILE = "crc32c.json"
MOST_LOG_BYTES = 1 << 33  # 20 million lines of metrics
BLOCK_BYTES = 1 << 18

logger = logging.getLogger("actcache")

Checksums = dict[str, dict[str, Any]]  # name of a file -> {"n_bytes", "crc32c"}


def checksums_of(files: Mapping[str, bytes | np.ndarray]) -> Checksums:
    """The checksums of files: name -> what they hold, as bytes or as a uint8 array."""
    return {name: {"n_bytes": len(data), "crc32c": _block_checksums(data)} for name, data in files.items()}


def sealed(checksums: Checksums) -> bytes:
    """The file that holds these checksums."""
    return seal({"files": checksums})


def read_checksums(path: Path, *, warns: bool = False) -> Checksums:
    """What `sealed` wrote; {} where there is no file.

    warns: whether to log, once for each path, that there is none.

    Raises:
        ManifestError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        held = contents(path)
    except NoFile as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # a folder or a pipe lies there
            raise _damaged_checksums(path) from error
        if warns:
            _warn_of_none(path)
        return {}
    try:
        return {name: _entry(name, of) for name, of in unseal(held, path)["files"].items()}
    except (ManifestError, *MALFORMED) as error:
        raise _damaged_checksums(path) from error


def _entry(name: str, of: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a file. Raises ValueError unless it lies beside its checksums and has one for each block."""
    n_bytes, blocks = of["n_bytes"], of["crc32c"]
    is_beside = name == Path(name).name and name not in ("", "..") and "\0" not in name
    is_size = type(n_bytes) is int and n_bytes >= 0
    if not is_beside or not is_size or not isinstance(blocks, list) or len(blocks) != -(-n_bytes // BLOCK_BYTES):
        raise ValueError(f"{shown(name)} of {shown(n_bytes)} bytes with checksums {shown(blocks)}")
    return {"n_bytes": n_bytes, "crc32c": blocks}


def add_checksums(path: Path, checksums: Checksums) -> None:
    """Write these into a file of checksums, which keeps those of other files. The caller alone writes it."""
    write_atomically(path, [sealed(read_checksums(path) | checksums)])


def unless_changed(checksums_file: Path) -> str:
    """What to do about a damaged file that somebody may have changed on purpose."""
    return f"restore it; if you changed it yourself, remove {checksums_file}"


def check_file(path: Path, checksums: Checksums, way_out: str) -> None:
    """Check a whole file. It is read, not mapped, so that an error of the disk is an OSError and no signal.

    Args:
        path: the file.
        checksums: of the files of its folder; if this one is not among them, nothing is checked.
        way_out: what to do if it is damaged, for the message.

    Raises:
        ManifestError: the file is missing, or its bytes are not those that were written.
        OSError: it cannot be read.
    """
    if path.name not in checksums:
        return
    try:
        with opened(path) as file:
            _check_length(path, _size(file), checksums, way_out)
            for block in range(len(checksums[path.name]["crc32c"])):
                _check_block(path, block, crc32c(file.read(BLOCK_BYTES)), checksums, way_out)
    except NoFile as error:
        raise ManifestError("is missing, or no file", path=path, way_out=way_out) from error


def file_crc32c(path: Path) -> int:
    """CRC-32C of a whole file. Raises NoFile if there is none, another OSError if it cannot be read."""
    found = 0
    with opened(path) as file:
        while block := file.read(BLOCK_BYTES):
            found = crc32c(block, found)
    return found


def checked_bytes(path: Path, checksums: Checksums, way_out: str, *, grows: bool = False) -> bytes:
    """What a file holds, once it is checked as by `check_file`.

    grows: the file may have become longer since; what it has more is not checked.

    Raises:
        ManifestError, OSError: as `check_file`. A file that grows is too large.
        MemoryError: a file that grows takes more memory than there is.
        NoFile: there is no file, and it is not among the checksums.
    """
    n_bytes = (file_bytes(path) or 0) if grows else 0
    if n_bytes > MOST_LOG_BYTES:
        what = f"must have at most {MOST_LOG_BYTES:,} bytes, has {n_bytes:,}"
        raise ManifestError(what, path=path, way_out=way_out)
    try:
        data = contents_of_any_size(path) if grows else contents(path)
    except NoFile as error:
        if path.name not in checksums:
            raise
        raise ManifestError("is missing, or no file", path=path, way_out=way_out) from error
    if grows:
        require_memory_for_array(json_memory(data), f"reading {path}")
    if path.name in checksums:
        n_bytes = checksums[path.name]["n_bytes"]
        _check_length(path, min(len(data), n_bytes) if grows else len(data), checksums, way_out)
        for block, found in enumerate(_block_checksums(data[:n_bytes])):
            _check_block(path, block, found, checksums, way_out)
    return data


@dataclass(slots=True)
class GrowingChecksum:
    """The checksum of a file that grows at its end."""

    n_bytes: int = 0
    blocks: list[int] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        """These bytes come next."""
        while data:
            room = BLOCK_BYTES - self.n_bytes % BLOCK_BYTES
            if room == BLOCK_BYTES:
                self.blocks.append(0)
            part, data = data[:room], data[room:]
            self.blocks[-1] = crc32c(part, self.blocks[-1])
            self.n_bytes += len(part)

    def entry(self) -> dict[str, Any]:
        """What a file of checksums says of the bytes so far."""
        return {"n_bytes": self.n_bytes, "crc32c": [*self.blocks]}


class MappedFile:
    """A file mapped into memory, read-only. `check` looks at each block once, before its bytes are first used.

    path: the file. bytes: all of it, uint8.
    """

    def __init__(self, path: Path, checksums: Checksums, way_out: str):
        """Map the file. The arguments are those of `check_file`.

        Raises:
            ManifestError: the file has another length than it had when it was written.
            NoFile: it is missing, or no file.
            OSError: it cannot be opened or mapped.
            ValueError: it is empty.
        """
        self.path, self._checksums, self._way_out = path, checksums, way_out
        self._is_checked: Bool[np.ndarray, " block"] | None = None  # None where nothing is to be checked
        with opened(path) as file:
            if path.name in checksums:
                _check_length(path, _size(file), checksums, way_out)
                self._is_checked = np.zeros(len(checksums[path.name]["crc32c"]), dtype=np.bool_)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes: UInt8[np.ndarray, " byte"] = np.frombuffer(mapped, dtype=np.uint8)

    def check(self, view: Shaped[np.ndarray, "..."]) -> None:
        """Raise ManifestError unless a contiguous part of `bytes`, in any dtype, holds what was written."""
        if self._is_checked is not None and view.nbytes > 0:
            start = self._offset(view)
            self._check_blocks(np.arange(start // BLOCK_BYTES, (start + view.nbytes - 1) // BLOCK_BYTES + 1))

    def check_at(self, array: Shaped[np.ndarray, " n"], index: Int[np.ndarray, " chosen"]) -> None:
        """As `check`, for the chosen elements of an array that is a part of `bytes`."""
        if self._is_checked is not None:
            self._check_blocks((self._offset(array) + index.astype(np.int64) * array.itemsize) // BLOCK_BYTES)

    def _offset(self, view: Shaped[np.ndarray, "..."]) -> int:
        return view.__array_interface__["data"][0] - self.bytes.__array_interface__["data"][0]

    def _check_blocks(self, blocks: Int[np.ndarray, " block"]) -> None:
        assert self._is_checked is not None, "the caller looked"
        for block in np.unique(blocks[~self._is_checked[blocks]]).tolist():
            found = crc32c(self.bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
            _check_block(self.path, block, found, self._checksums, self._way_out)
            self._is_checked[block] = True


@functools.cache  # a command reads some of them several times
def _warn_of_none(path: Path) -> None:
    logger.warning("%s: is not there, so the files beside it are not checked: it was removed, or they are older", path)


def _damaged_checksums(path: Path) -> ManifestError:
    what = "is damaged, so that the files beside it cannot be checked"
    return ManifestError(what, path=path, way_out="remove it to use them unchecked")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _check_length(path: Path, n_bytes: int, checksums: Checksums, way_out: str) -> None:
    expected = checksums[path.name]["n_bytes"]
    if n_bytes != expected:
        what = f"is damaged: it must be {expected} bytes long, is {n_bytes}"
        raise ManifestError(what, path=path, way_out=way_out)


def _check_block(path: Path, block: int, found: int, checksums: Checksums, way_out: str) -> None:
    if found != checksums[path.name]["crc32c"][block]:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, checksums[path.name]["n_bytes"])
        what = f"is damaged: bytes {start} to {stop} do not match their checksum"
        raise ManifestError(what, path=path, way_out=way_out)


def _block_checksums(data: bytes | np.ndarray) -> list[int]:
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return [crc32c(view[start : start + BLOCK_BYTES]) for start in range(0, len(view), BLOCK_BYTES)]
