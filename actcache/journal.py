"""The append-only record of finished shards, and the lock that its writer holds."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from actcache.errors import CacheLocked, ManifestError
from actcache.manifest import ShardRecord, seal, shard_record, unseal
from actcache.writer import sync_folder


class Journal:
    """manifest/writer-00.jsonl, open for appending under an exclusive flock; one sealed line per finished shard."""

    def __init__(self, path: Path):
        """Take the lock and read what is there; a torn last line is cut off.

        Raises CacheLocked if another process holds it, ManifestError if a line other than the last is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by close(), with the lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CacheLocked(f"{path.parent.parent}: another process is writing this cache; wait for it") from None
        try:
            sync_folder(path.parent)
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict) -> None:
        """Make one line durable. A failing write or fsync (OSError) leaves at most a torn last line."""
        self._file.write(seal(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self) -> list[ShardRecord]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        records: list[ShardRecord] = []
        good_bytes = 0
        for number, line in enumerate(lines, 1):
            try:
                records.append(shard_record(unseal(_whole(line), self._path)))
            except (ManifestError, KeyError, TypeError, ValueError, AttributeError):
                if number < len(lines):
                    raise ManifestError(f"{self._path}: line {number} is damaged; restore the file") from None
                self._file.truncate(good_bytes)
                break
            good_bytes += len(line)
        return records


def _whole(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ValueError("torn line")
    return line
