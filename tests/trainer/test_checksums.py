"""Checksums of files: what is damaged is named, wherever it is, and what has no checksum is read."""

from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

from actcache.errors import ManifestError
from trainer.checksums import (
    BLOCK_BYTES,
    MappedFile,
    check_file,
    checksums_of,
    read_checksums,
    sealed,
)

N_BYTES = 2 * BLOCK_BYTES + 24


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three blocks, the last one short, with its checksums beside it."""
    data = np.random.default_rng(0).bytes(N_BYTES)
    (tmp_path / "crc32c.json").write_bytes(sealed(checksums_of({"file": data})))
    (tmp_path / "file").write_bytes(data)
    return tmp_path / "file"


def checksums(path: Path) -> dict:
    return read_checksums(path.with_name("crc32c.json"))


def test_checksums_are_those_of_each_block(path: Path) -> None:
    data = path.read_bytes()
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, N_BYTES, BLOCK_BYTES)]
    assert checksums(path) == {"file": {"n_bytes": N_BYTES, "crc32c": [crc32c(block) for block in blocks]}}
    check_file(path, checksums(path), "")


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, BLOCK_BYTES, N_BYTES - 1])
def test_a_changed_byte_is_named(at: int, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    start = at // BLOCK_BYTES * BLOCK_BYTES
    with pytest.raises(ManifestError, match=rf"file: is damaged: bytes {start} to \d+ do not match .*; restore it"):
        check_file(path, checksums(path), "restore it")


def test_another_length_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    for check in (check_file, MappedFile):
        with pytest.raises(ManifestError, match=f"must be {N_BYTES} bytes long, is {N_BYTES - 1}; restore it"):
            check(path, checksums(path), "restore it")


def test_a_mapped_file_is_checked_where_it_is_looked_at(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[BLOCK_BYTES] ^= 1
    path.write_bytes(data)
    file = MappedFile(path, checksums(path), "restore it")
    file.check(file.bytes[:BLOCK_BYTES])
    file.check(file.bytes[2 * BLOCK_BYTES :].view(np.int32))
    file.check(file.bytes[BLOCK_BYTES:BLOCK_BYTES])
    with pytest.raises(ManifestError, match=rf"bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES} do not match"):
        file.check(file.bytes[BLOCK_BYTES - 1 : BLOCK_BYTES + 1])
    array = file.bytes[8:].view(np.int64)
    file.check_at(array, np.array([0, 5, len(array) - 1], dtype=np.int32))
    file.check_at(array, np.empty(0, dtype=np.int64))
    with pytest.raises(ManifestError, match="do not match"):
        file.check_at(array, np.array([0, BLOCK_BYTES // 8], dtype=np.int32))


def test_what_has_no_checksum_is_not_checked(path: Path, tmp_path: Path) -> None:
    assert read_checksums(tmp_path / "nowhere") == {}
    path.write_bytes(b"12345678")
    check_file(path, {}, "")
    MappedFile(path, {}, "").check(np.empty(3, np.uint8))


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data.replace(b"crc", b"crd"), lambda _: b""])
def test_damaged_checksums_are_named(damage, path: Path) -> None:
    beside = path.with_name("crc32c.json")
    beside.write_bytes(damage(beside.read_bytes()))
    with pytest.raises(ManifestError, match=r"crc32c\.json: is damaged, .* remove it to use them unchecked"):
        read_checksums(beside)


def test_a_file_out_of_reach_is_not_damaged(path: Path) -> None:
    held = checksums(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        check_file(path, held, "")
    path.rmdir()
    with pytest.raises(ManifestError, match="file: is missing; restore it"):
        check_file(path, held, "restore it")
