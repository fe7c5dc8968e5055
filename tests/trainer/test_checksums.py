"""Checksums of files: what is damaged is named, wherever it is, and what has no checksum is read."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from support.surroundings import descriptors

from actcache.errors import ManifestError
from actcache.files import NoFile
from trainer.checksums import (
    BLOCK_BYTES,
    GrowingChecksum,
    MappedFile,
    add_checksums,
    check_file,
    checked_bytes,
    checksums_of,
    file_crc32c,
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


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("file", '{"n_bytes": 1e999, "crc32c": []}'),
        ("file", '{"n_bytes": -1, "crc32c": []}'),
        ("file", '{"n_bytes": 3, "crc32c": []}'),
        ("file", '{"n_bytes": 0, "crc32c": [0, 0]}'),
        ("file", '{"n_bytes": 3, "crc32c": {"0": 1}}'),
        ("file", "[]"),
        *(
            (name, '{"n_bytes": 1, "crc32c": [0]}')
            for name in ("../file", "/etc/passwd", "sae/file", "..", "", "a\\u0000")
        ),
    ],
)
def test_checksums_that_nothing_wrote_are_damaged(name: str, entry: str, path: Path) -> None:
    """Their seal fits: they are a stranger's. No file elsewhere is opened, and no block is looked for in vain."""
    beside, body = path.with_name("crc32c.json"), f'{{"files":{{"{name}":{entry}}}'.encode()
    beside.write_bytes(body + f',"crc32c":"{crc32c(body):08x}"}}\n'.encode())
    with pytest.raises(ManifestError, match=r"crc32c\.json: is damaged, .* remove it to use them unchecked"):
        read_checksums(beside)


def test_what_is_no_file_is_damage(path: Path) -> None:
    held = checksums(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ManifestError, match="file: is missing, or no file; restore it"):
        check_file(path, held, "restore it")
    path.rmdir()
    for check in (check_file, checked_bytes):
        with pytest.raises(ManifestError, match="file: is missing, or no file; restore it"):
            check(path, held, "restore it")
    with pytest.raises(NoFile):
        checked_bytes(path, {}, "")


def test_what_cannot_be_read_is_not_damaged(path: Path) -> None:
    held = checksums(path)
    reads = [lambda check=check: check(path, held, "") for check in (check_file, checked_bytes, MappedFile)]
    for read in (*reads, lambda: checksums(path), lambda: file_crc32c(path)):
        with descriptors(3), pytest.raises(OSError, match="ulimit -n") as raised:
            read()
        assert (raised.value.errno, type(raised.value)) == (errno.EMFILE, OSError)
        assert str(path.parent) in str(raised.value)


@pytest.mark.parametrize("sizes", [[0], [N_BYTES], [1, BLOCK_BYTES - 1, 1, BLOCK_BYTES + 22, 0, 1], [7] * 50])
def test_the_checksum_of_what_grows_is_that_of_the_whole(sizes: list[int], path: Path) -> None:
    growing, data = GrowingChecksum(), path.read_bytes()[: sum(sizes)]
    for size in sizes:
        growing.add(data[growing.n_bytes : growing.n_bytes + size])
    assert growing.entry() == checksums_of({"file": data})["file"]


def test_of_a_file_that_grows_what_was_summed_is_checked(path: Path) -> None:
    held, data = checksums(path), path.read_bytes()
    path.write_bytes(data + b"more")
    assert checked_bytes(path, held, "", grows=True) == data + b"more"
    with pytest.raises(ManifestError, match=f"must be {N_BYTES} bytes long, is {N_BYTES + 4}; restore it"):
        checked_bytes(path, held, "restore it")
    for damage, found in ((data[:-1], "bytes long"), (data[:-1] + b"x" + b"more", "do not match their checksum")):
        path.write_bytes(damage)
        with pytest.raises(ManifestError, match=f"file: is damaged: .*{found}.*; restore it"):
            checked_bytes(path, held, "restore it", grows=True)


def test_that_there_are_no_checksums_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert read_checksums(tmp_path / "crc32c.json", warns=True) == {}
    says = "is not there, so the files beside it are not checked: it was removed, or they are older"
    assert caplog.messages == [f"{tmp_path / 'crc32c.json'}: {says}"]
    (tmp_path / "crc32c.json").mkdir()
    with pytest.raises(ManifestError, match="is damaged"):
        read_checksums(tmp_path / "crc32c.json")


def test_checksums_are_added_to_others(path: Path) -> None:
    add_checksums(path.with_name("crc32c.json"), checksums_of({"other": b"1"}))
    assert sorted(checksums(path)) == ["file", "other"]
    assert file_crc32c(path) == crc32c(path.read_bytes())


def test_a_log_may_be_longer_than_a_file_that_is_read_as_a_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actcache.files.MOST_BYTES", N_BYTES - 1)
    assert checked_bytes(path, checksums(path), "", grows=True) == path.read_bytes()
    with pytest.raises(ManifestError, match="file: must have at most"):
        checked_bytes(path, checksums(path), "")


def test_a_log_that_no_training_wrote_is_not_read(tmp_path):
    """It is a hole in a file, of 100 GiB."""
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 100 << 30)
    with pytest.raises(ManifestError, match=r"metrics\.jsonl: must have at most 8,589,934,592 bytes, has 107,3"):
        checked_bytes(path, {}, "restore it", grows=True)
