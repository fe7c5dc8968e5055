"""Journals: the records of finished shards.

Each writer appends to a journal of its own and holds its lock meanwhile; the number of the journal is the writer's
slot. A file that is not named as a journal is none, and is ignored.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from actcache.errors import CacheLocked, ManifestError
from actcache.files import (
    LEFTOVER,
    contents,
    entries,
    file_bytes,
    listed,
    make_folder,
    naming,
    sync_folder,
    write_atomically,
)
from actcache.format.paths import CACHE_MANIFEST, EXCLUSIVE_LOCK, MANIFEST, PLAN, STORE
from actcache.format.records import ShardRecord, shard_record
from actcache.format.seal import MALFORMED, seal, unseal
from actcache.machine.links import own_file
from actcache.store.locks import holder, is_at, is_held, note_holder, try_lock

NAME = re.compile(r"writer-([0-9]{2}|[1-9][0-9]{2,})\.jsonl")


class Journal:
    """manifest/writer-NN.jsonl, open for appending under an exclusive flock. It has one sealed line for each shard.

    writer-NN.lock beside it has the note that says who holds the lock.
    """

    def __init__(self, root: Path, slot: int = 0, what: str = "harvests"):
        """Take the lock of the slot, and cut off a last line that is torn.

        Args:
            root: the folder of the cache.
            slot: number of the slot.
            what: what this process does, for the note.

        Raises:
            CacheLocked: another process holds the lock.
            LocksMissing: the file system has no locks.
            ManifestError: a line before the last is damaged.
        """
        self.path = _journal(root, slot)
        make_folder(self.path.parent)
        self._file = open(self.path, "a+b", buffering=0, opener=own_file)  # noqa: SIM115  # closed by close(), with the lock
        try:
            if not try_lock(self._file.fileno(), fcntl.LOCK_EX) or not is_at(self.path, self._file.fileno()):
                raise _held_by_another(root, slot)
            sync_folder(self.path.parent)
            _, n_bytes = _read(self.path)
            if n_bytes < self.path.stat().st_size:
                self._file.truncate(n_bytes)
            with suppress(OSError, ManifestError), open(_note(self.path), "ab", opener=own_file) as note:
                note_holder(note.fileno(), what)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: ShardRecord) -> None:
        """Write one line and fsync it. If the write or the fsync fails (OSError), the journal is as it was."""
        line, end = memoryview(seal(record.to_json())), self._file.seek(0, os.SEEK_END)
        try:
            with naming(self.path):
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)  # the next shard is written already; its line must not follow half a line
            raise

    def discard(self) -> None:
        """Remove this journal, the lock files and their folders, if the cache has nothing else.

        The caller holds `exclusive`.
        """
        folder = self.path.parent
        locks = [path for path in entries(folder) if path != self.path]
        if all(map(_is_lock, locks)) and entries(folder.parent) == [folder]:
            for path in (self.path, *sorted(locks, key=lambda path: path.name == Path(EXCLUSIVE_LOCK).name)):
                path.unlink()
            with suppress(OSError):  # another process may begin a cache here
                folder.rmdir()
                folder.parent.rmdir()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        with suppress(OSError):
            _note(self.path).unlink()
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_journals(root: Path) -> list[ShardRecord]:
    """Every finished shard that any writer has recorded. A torn last line is left out: it is being written.

    Raises ManifestError if a line before the last is damaged.
    """
    return [record for path in _journals(root) for record in _read(path)[0]]


def hook_computes(root: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """(split, index, hook name) -> how the arrays of that hook in that shard were computed.

    The merged record of a shard cannot tell: it holds the settings of the last run alone.
    """
    return {
        (record.split, record.index, hook.hook_name): record.compute
        for record in sorted(read_journals(root), key=lambda record: record.revision)
        for hook in record.hooks
        if any(path.startswith(f"{hook.hook_name}/") for path in record.arrays)
    }


def damaged_lines(root: Path) -> dict[Path, list[int]]:
    """Journal -> the numbers, from 1, of its damaged lines. A torn last line does not count as damaged."""
    found = {path: _damaged(_parsed(path)) for path in _journals(root)}
    return {path: numbers for path, numbers in found.items() if numbers}


def salvage(root: Path) -> dict[Path, list[int]]:
    """Rewrite every journal that has damaged lines without these lines; returns what `damaged_lines` found.

    Raises CacheLocked if another process writes one of these journals.
    """
    found = damaged_lines(root)
    for path in found:
        with open(path, "r+b", opener=own_file) as file:  # NFS locks only what may be written
            if not try_lock(file.fileno(), fcntl.LOCK_EX):
                raise CacheLocked(f"{path}: {holder(_note(path))} writes this damaged journal; wait for it")
            write_atomically(path, [line for line, record in _parsed(path) if record is not None])
    return found


def refuse_held(root: Path, slot: int) -> None:
    """Raise CacheLocked if any process holds the slot."""
    if slot in active_writers(root):
        raise _held_by_another(root, slot)


def active_writers(root: Path) -> set[int]:
    """The slots that processes hold, this process included. A process that waits for `exclusive` holds none yet."""
    return {slot for path, slot in _journals(root).items() if is_held(path)}


def writers(root: Path, slots: Collection[int]) -> str:
    """Who holds these slots, in words."""
    return ", ".join(holder(_note(_journal(root, slot))) for slot in sorted(slots))


def was_begun(root: Path) -> bool:
    """Whether a harvest was ever begun here.

    What is killed before there is a plan leaves packed sequences, lock files, empty journals and files aside alone.
    """
    folder, journals = root / MANIFEST, _journals(root)
    made = {path.name for path in entries(root)} <= {MANIFEST, STORE} and folder.is_dir()
    only_begun = made and all(
        _is_lock(path) or LEFTOVER.fullmatch(path.name) or (path in journals and not file_bytes(path))
        for path in entries(folder)
    )
    # looked for last: another worker may settle the plan meanwhile, and all that it writes then comes after the plan
    return only_begun or (root / PLAN).exists() or (root / CACHE_MANIFEST).exists()


def _journal(root: Path, slot: int) -> Path:
    return root / MANIFEST / f"writer-{slot:02d}.jsonl"


def _journals(root: Path) -> dict[Path, int]:
    """Journal -> its slot. A copy such as writer-00.bak.jsonl is no journal."""
    named = {path: NAME.fullmatch(path.name) for path in listed(root / MANIFEST)}
    return {path: int(match[1]) for path, match in named.items() if match}


def _note(journal: Path) -> Path:
    return journal.with_suffix(".lock")


def _is_lock(path: Path) -> bool:
    return path.suffix == ".lock"


def _held_by_another(root: Path, slot: int) -> CacheLocked:
    return CacheLocked(f"{root}: {writers(root, [slot])} is writing this cache as worker {slot}; wait for it")


def _read(path: Path) -> tuple[list[ShardRecord], int]:
    """The records of a journal, and the bytes of their lines. Bytes after those are a torn line."""
    parsed = _parsed(path)
    if damaged := _damaged(parsed):
        raise ManifestError(f"line {damaged[0]} is damaged", path=path, way_out="restore it with `actcache repair`")
    whole = [(line, record) for line, record in parsed if record is not None]
    return [record for _, record in whole], sum(len(line) for line, _ in whole)


def _damaged(parsed: Sequence[tuple[bytes, ShardRecord | None]]) -> list[int]:
    return [number for number, (_, record) in enumerate(parsed[:-1], 1) if record is None]


def _parsed(path: Path) -> list[tuple[bytes, ShardRecord | None]]:
    """Every line of a journal, and its record; None for a line that cannot be read."""
    return [(line, _record(line, path)) for line in contents(path).splitlines(keepends=True)]


def _record(line: bytes, path: Path) -> ShardRecord | None:
    try:
        return shard_record(unseal(line, path)) if line.endswith(b"\n") else None
    except (ManifestError, *MALFORMED):
        return None
