"""Checksums of the files of a run: a sealed JSON file beside them, which is written before them.

A file of checksums holds {"files": {name: {"n_bytes": ..., "crc32c": [CRC-32C of each block of BLOCK_BYTES]}}}. Blocks
are there so that of a mapped file only what is looked at has to be read. Files that it does not name are not checked,
and so are all where there is none: runs of before it have none.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from actcache.errors import ManifestError
from actcache.format.codecs import crc32c
from actcache.format.seal import MALFORMED, seal, unseal

CHECKSUMS_FILE = "crc32c.json"
BLOCK_BYTES = 1 << 18

Checksums = dict[str, dict[str, Any]]  # name of a file -> {"n_bytes", "crc32c"}


def checksums_of(files: Mapping[str, bytes | np.ndarray]) -> Checksums:
    """The checksums of files: name -> what they hold, as bytes or as a uint8 array."""
    return {name: {"n_bytes": len(data), "crc32c": _block_checksums(data)} for name, data in files.items()}


def sealed(checksums: Checksums) -> bytes:
    """The file that holds these checksums."""
    return seal({"files": checksums})


def read_checksums(path: Path) -> Checksums:
    """What `sealed` wrote; {} where there is no file. Raises ManifestError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        files = unseal(path.read_bytes(), path)["files"]
        return {str(name): {"n_bytes": int(of["n_bytes"]), "crc32c": list(of["crc32c"])} for name, of in files.items()}
    except (ManifestError, *MALFORMED) as error:
        raise ManifestError(
            f"{path}: is damaged, so that the files beside it cannot be checked; remove it to use them unchecked"
        ) from error


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
    if not path.exists():
        raise ManifestError(f"{path}: is missing; {way_out}")
    with open(path, "rb") as file:
        _check_length(path, os.fstat(file.fileno()).st_size, checksums, way_out)
        for block in range(len(checksums[path.name]["crc32c"])):
            _check_block(path, block, crc32c(file.read(BLOCK_BYTES)), checksums, way_out)


class MappedFile:
    """A file mapped into memory, read-only. `check` looks at each block once, before its bytes are first used.

    path: the file. bytes: all of it, uint8.
    """

    def __init__(self, path: Path, checksums: Checksums, way_out: str):
        """Map the file. The arguments are those of `check_file`.

        Raises:
            ManifestError: the file has another length than it had when it was written.
            OSError: it cannot be opened or mapped.
            ValueError: it is empty.
        """
        self.path, self._checksums, self._way_out = path, checksums, way_out
        self._is_checked: Bool[np.ndarray, " block"] | None = None  # None where nothing is to be checked
        if path.name in checksums:
            _check_length(path, path.stat().st_size, checksums, way_out)
            self._is_checked = np.zeros(len(checksums[path.name]["crc32c"]), dtype=np.bool_)
        self.bytes: UInt8[np.ndarray, " byte"] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)

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


def _check_length(path: Path, n_bytes: int, checksums: Checksums, way_out: str) -> None:
    expected = checksums[path.name]["n_bytes"]
    if n_bytes != expected:
        raise ManifestError(f"{path}: is damaged: it must be {expected} bytes long, is {n_bytes}; {way_out}")


def _check_block(path: Path, block: int, found: int, checksums: Checksums, way_out: str) -> None:
    if found != checksums[path.name]["crc32c"][block]:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, checksums[path.name]["n_bytes"])
        raise ManifestError(f"{path}: is damaged: bytes {start} to {stop} do not match their checksum; {way_out}")


def _block_checksums(data: bytes | np.ndarray) -> list[int]:
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return [crc32c(view[start : start + BLOCK_BYTES]) for start in range(0, len(view), BLOCK_BYTES)]
