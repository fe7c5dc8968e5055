"""The append-only records of finished shards, one file for each writer, and the locks that writers hold."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from actcache.errors import CacheLocked, ManifestError
from actcache.manifest import ShardRecord, seal, shard_record, unseal
from actcache.writer import sync_folder

MANIFEST = "manifest"
SETTLING = "manifest/settling.lock"
PROBE_SECONDS = 0.5  # a probe of another process holds a slot for microseconds


class Journal:
    """manifest/writer-NN.jsonl, open for appending under an exclusive flock; one sealed line per finished shard."""

    def __init__(self, root: Path, slot: int = 0):
        """Take the slot's lock; a torn last line is cut off.

        Raises CacheLocked if another process holds it, ManifestError if a line other than the last is damaged.
        """
        self.path = root / MANIFEST / f"writer-{slot:02d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115  # closed by close(), with the lock
        try:
            if not _locked(self._file.fileno(), fcntl.LOCK_EX):
                raise CacheLocked(f"{root}: another process is writing this cache as worker {slot}; wait for it")
            sync_folder(self.path.parent)
            _, n_bytes = _read(self.path)
            if n_bytes < self.path.stat().st_size:
                self._file.truncate(n_bytes)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict) -> None:
        """Make one line durable. A failing write or fsync (OSError) leaves at most a torn last line."""
        self._file.write(seal(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Remove what making this journal left in a folder where nothing else was begun."""
        folder = self.path.parent
        if {path.name for path in folder.iterdir()} == {self.path.name, Path(SETTLING).name}:
            (folder.parent / SETTLING).unlink()
            self.path.unlink()
            folder.rmdir()
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def settling(root: Path) -> Iterator[None]:
    """The one process that settles the plan, or finalises, at a time; others wait here."""
    path = root / SETTLING
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    # The file stays: removing it would let a process that waits on it and a newcomer both hold "the" lock.


def read_journals(root: Path) -> list[ShardRecord]:
    """Every finished shard that any writer has recorded; a line that is still being written is left out."""
    return [record for path in _journals(root) for record in _read(path)[0]]


def active_writers(root: Path) -> set[int]:
    """The slots that a process holds, this one's included."""
    return {slot for path, slot in _journals(root).items() if _is_held(path)}


def has_journal(root: Path) -> bool:
    """Whether a harvest was ever begun here."""
    return bool(_journals(root))


def _journals(root: Path) -> dict[Path, int]:
    paths = sorted((root / MANIFEST).glob("writer-*.jsonl"))
    return {path: int(path.stem.removeprefix("writer-")) for path in paths}


def _is_held(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _locked(descriptor: int, kind: int) -> bool:
    """Whether the lock was got; tried for as long as another process's probe may hold it."""
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


def _read(path: Path) -> tuple[list[ShardRecord], int]:
    """The records of a journal, and the bytes that they take: what lies behind is a torn line."""
    lines = path.read_bytes().splitlines(keepends=True)
    records: list[ShardRecord] = []
    n_bytes = 0
    for number, line in enumerate(lines, 1):
        try:
            records.append(shard_record(unseal(_whole(line), path)))
        except (ManifestError, KeyError, TypeError, ValueError, AttributeError):
            if number < len(lines):
                raise ManifestError(f"{path}: line {number} is damaged; restore it with `actcache repair`") from None
            break
        n_bytes += len(line)
    return records, n_bytes


def _whole(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ValueError("torn line")
    return line
