"""What a killed writer may leave: a cache begun, growing or getting a hook, and what a reader may see of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from faulty_writers import Fault, Writer, Writers
from tiny_caches import HOOKS, promised_files

from actcache.cache import CACHE_MANIFEST, STORE, open_cache
from actcache.codecs import codec
from actcache.errors import CorruptShard, ManifestError
from actcache.journal import read_journals
from actcache.manifest import Plan, ShardRecord, hook_arrays, shard_key, token_arrays
from actcache.plan import read_plan
from actcache.reader import ShardFile

OLD_TOKENS, TOKENS = 330, 700
OLD, NEW = "old", "new"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is asked of a cache: of the finished one at `before`, or of an empty folder."""

    before: Path | None
    hooks: tuple[str, ...]
    tokens: int = TOKENS


class Scenarios:
    """Three commands that all come to the cache `whole`: harvest it at once, grow to it, add its second hook."""

    def __init__(self, model_dir: Path, texts: Path, folder: Path):
        self.writers, self.folder, self._n_caches = Writers(model_dir, texts, folder), folder, 0

    @cached_property
    def whole(self) -> dict[str, str]:
        """The promised files of the uninterrupted cache."""
        return promised_files(self._finished("whole", HOOKS[:2], TOKENS))

    @cached_property
    def commands(self) -> dict[str, Command]:
        """Growth asks for one hook alone: the other has to grow with it."""
        few_tokens = self._finished("few-tokens", HOOKS[:2], OLD_TOKENS)
        one_hook = self._finished("one-hook", HOOKS[:1], TOKENS)
        return {
            "begin": Command(before=None, hooks=HOOKS[:2]),
            "grow": Command(before=few_tokens, hooks=HOOKS[:1]),
            "add": Command(before=one_hook, hooks=HOOKS[1:2]),
        }

    def copy(self, name: str) -> Path:
        """Where the command can be given: a copy of the cache before it."""
        self._n_caches += 1
        root, before = self.folder / f"{name}-{self._n_caches}" / "c", self.commands[name].before
        root.parent.mkdir()
        if before:
            shutil.copytree(before, root)
        return root

    def start(self, name: str, root: Path, *more: object, fault: Fault | None = None, **settings: object) -> Writer:
        """Give the command."""
        command = self.commands[name]
        return self.writers.start(root, command.hooks, command.tokens, *more, fault=fault, **settings)

    def run(self, name: str, root: Path, *more: object, **settings: object) -> tuple[int, str]:
        """Give the command and wait: its exit code, and what it said."""
        writer = self.start(name, root, *more, **settings)
        return writer.wait(), writer.said

    def finish(self, name: str, root: Path) -> None:
        """The same command again: it ends well, with the bytes of the uninterrupted cache, and nothing is left over."""
        code, said = self.run(name, root)
        assert code == 0, said
        assert promised_files(root) == self.whole
        assert not list(root.rglob("*.partial"))

    def opened(self, name: str, root: Path) -> str | None:
        """What a reader gets: OLD, NEW or, with a clear error, None; not a byte of it may be wrong."""
        before = self.commands[name].before
        wholes = {OLD: promised_files(before) if before else {}, NEW: self.whole}
        check_visible(root, list(wholes.values()))
        found = promised_files(root)
        if CACHE_MANIFEST not in found:
            with pytest.raises(ManifestError, match=r"unfinished; run the same command again|not a cache"):
                open_cache(root)
            return None
        open_cache(root)
        which = next(age for age, whole in wholes.items() if whole.get(CACHE_MANIFEST) == found[CACHE_MANIFEST])
        assert wholes[which].items() <= found.items(), "what a finished cache promises is there"
        return which

    def _finished(self, name: str, hooks: Sequence[str], tokens: int) -> Path:
        root = self.folder / name
        code, said = self.writers.run(root, hooks, tokens)
        assert code == 0, said
        return root


def check_visible(root: Path, wholes: Sequence[dict[str, str]]) -> int:
    """No file that has its name is torn, and every line of a journal says what is there; returns how many there are."""
    found = _visible(root)
    for key, digest in found.items():
        assert digest in {whole.get(key) for whole in wholes}, f"{key} is torn"
    return len(found) + _check_lines(root)


def _visible(root: Path) -> dict[str, str]:
    """Promised files, but those set aside; writers may be at work."""
    while True:
        try:
            return {key: digest for key, digest in promised_files(root).items() if not key.endswith(".partial")}
        except FileNotFoundError:  # set aside when it was listed, and renamed since
            continue


def _check_lines(root: Path) -> int:
    plan, n_lines = read_plan(root), 0
    try:
        for record in read_journals(root) if plan else []:
            if record.n_rows == plan.rows_of(record.split, record.index):  # else the shard has to grow
                _check_line(root, plan, record)
                n_lines += 1
    except (AssertionError, CorruptShard):
        if read_plan(root) == plan:
            raise
        return _check_lines(root)  # it grew meanwhile: another file is right now
    return n_lines


def _check_line(root: Path, plan: Plan, record: ShardRecord) -> None:
    profile, shard_rows = codec(plan.identity["codec"]), plan.identity["shard_rows"]
    hooks = [array for hook in record.hooks for array in hook_arrays(hook, profile, plan.identity["chunk_rows"])]
    for array in [*hooks, *token_arrays(shard_rows)]:
        if array.path in record.arrays:  # the tokens are in one of several lines
            stored = record.arrays[array.path]
            path = root / STORE / record.split / shard_key(array, record.index)
            file = ShardFile(path, shard_rows // array.chunk_rows, stored.n_bytes)
            for number, checksum in enumerate(stored.checksums):
                chunk = file.chunk(number)
                assert chunk is not None, f"{path}: lacks chunk {number}"
                assert profile.checksum(chunk) == checksum, f"{path}: chunk {number} is not what the line says"
