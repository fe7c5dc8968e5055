"""Caches on their way, whose writers come to grief: what a reader may see of them, and what they must come to."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from actcache.errors import CorruptShard, ManifestError
from actcache.format.arrays import hook_arrays, token_arrays
from actcache.format.codecs import codec
from actcache.format.manifest import Plan
from actcache.format.paths import CACHE_MANIFEST, STORE, shard_key
from actcache.format.records import ShardRecord
from actcache.harvesting.plan import read_plan
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import read_journals
from actcache.store.shard_file import ShardFile
from support.faulty_writers import Fault, Writers
from support.forked_commands import Forked
from support.tiny_caches import HOOKS, promised_files

FEW_TOKENS, TOKENS, MANY_TOKENS = 330, 700, 3000
OLD, NEW = "old", "new"
LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is asked of a cache: of the finished one at `before`, or of an empty folder.

    after: all that it must come to. seconds: that coming to it at once took.
    """

    before: Path | None
    hooks: tuple[str, ...]
    tokens: int
    after: dict[str, str]
    seconds: float

    @cached_property
    def states(self) -> dict[str, dict[str, str]]:
        """The promised files of the finished caches that a reader may see."""
        return {OLD: promised_files(self.before) if self.before else {}, NEW: self.after}


class Scenarios:
    """Commands, each for as many copies of the cache before it as there are ways to die."""

    def __init__(self, model_dir: Path, texts: Path, folder: Path):
        self.writers, self._folder, self._n_caches = Writers(model_dir, texts, folder), folder, 0
        self._commands: dict[str, Command] = {}

    def command(self, name: str) -> Command:
        """begin: two hooks of an empty folder. grow, add: the same, of fewer tokens or one hook. many: more shards.

        Growth asks for one hook alone: the other has to grow with it.
        """
        if name not in self._commands:
            both, few, one = (HOOKS[:2], TOKENS), (HOOKS[:2], FEW_TOKENS), (HOOKS[:1], TOKENS)
            before, hooks, after = {
                "begin": (None, HOOKS[:2], both),
                "grow": (few, HOOKS[:1], both),
                "add": (one, HOOKS[1:2], both),
                "many": (None, HOOKS[:1], (HOOKS[:1], MANY_TOKENS)),
            }[name]
            begun = time.monotonic()
            files = promised_files(self._finished(*after))
            seconds = time.monotonic() - begun
            held = self._finished(*before) if before else None
            made = Command(before=held, hooks=hooks, tokens=after[1], after=files, seconds=seconds)
            self._commands[name] = made
        return self._commands[name]

    def copy(self, name: str, folder: Path | None = None) -> Path:
        """Where the command can be given: a copy of the cache before it, or a folder that is not there yet."""
        self._n_caches += 1
        root, before = (folder or self._folder) / f"{name}-{self._n_caches}" / "c", self.command(name).before
        root.parent.mkdir()
        if before:
            shutil.copytree(before, root)
        return root

    def start(self, name: str, root: Path, *more: object, fault: Fault | None = None, **settings: object) -> Forked:
        """Give the command."""
        command = self.command(name)
        return self.writers.start(root, command.hooks, command.tokens, *more, fault=fault, **settings)

    def run(self, name: str, root: Path, *more: object, **settings: object) -> tuple[int, str]:
        """Give the command and wait: its exit code, and what it said."""
        writer = self.start(name, root, *more, **settings)
        return writer.wait(), writer.said

    def finish(self, name: str, root: Path) -> str:
        """The same command again ends well, with the bytes of the uninterrupted cache; returns what it said."""
        code, said = self.run(name, root)
        assert code == 0, said
        self.check_finished(name, root)
        return said

    def check_finished(self, name: str, root: Path) -> None:
        """The bytes are those of the uninterrupted cache, and nothing else is left over."""
        assert promised_files(root) == self.command(name).after
        assert not list(root.rglob("*.partial"))

    def opened(self, name: str, root: Path) -> str | None:
        """What a reader gets: OLD, NEW or, with a clear error, None; not a byte of it may be wrong."""
        states = self.command(name).states
        check_visible(root, list(states.values()))
        found = promised_files(root)
        if CACHE_MANIFEST not in found:
            with pytest.raises(ManifestError, match=r"unfinished; run the same command again|not a cache"):
                open_cache(root)
            return None
        cache = open_cache(root)
        which = next(age for age, files in states.items() if files.get(CACHE_MANIFEST) == found[CACHE_MANIFEST])
        seen = {key: hashlib.sha256(cache.files.path(key).read_bytes()).hexdigest() for key in states[which]}
        assert seen == states[which], "what a finished cache promises is there"
        assert verify(root).problems == ()
        return which

    def kill_at_random(self, name: str, rng: random.Random, n_kills: int) -> int:
        """Two workers, one or both killed again and again until they are done; returns how many caches that took."""
        n_killed, n_caches = 0, 0
        while n_killed < n_kills:
            root, n_caches = self.copy(name), n_caches + 1
            with looked_at(root, list(self.command(name).states.values())):
                n_killed += self._kill_at_random(name, root, rng, n_kills - n_killed)
            self.check_finished(name, root)
        return n_caches

    def _kill_at_random(self, name: str, root: Path, rng: random.Random, n_kills: int) -> int:
        n_killed, workers = 0, [self.start(name, root, "--worker", f"{index}/2") for index in range(2)]
        while n_killed < n_kills and any(worker.is_alive() for worker in workers):
            time.sleep(rng.uniform(0, self.command(name).seconds))
            n_killed += sum(workers[index].kill() for index in rng.choice([(0,), (1,), (0, 1)]))
            workers = [self._revived(name, root, index, worker) for index, worker in enumerate(workers)]
        for index, worker in enumerate(workers):
            assert worker.wait() in (0, -signal.SIGKILL), worker.said
            assert self.run(name, root, "--worker", f"{index}/2")[0] == 0
        return n_killed

    def _revived(self, name: str, root: Path, index: int, worker: Forked) -> Forked:
        if worker.is_alive() or worker.wait() == 0:
            return worker
        assert worker.wait() == -signal.SIGKILL, worker.said
        return self.start(name, root, "--worker", f"{index}/2")

    def _finished(self, hooks: Sequence[str], tokens: int) -> Path:
        root = self._folder / f"{len(hooks)}-hooks-{tokens}"
        code, said = self.writers.run(root, hooks, tokens)
        assert code == 0, said
        return root


def errors_of(said: str) -> list[str]:
    """The lines that tell of an error; a traceback is one too many."""
    return [line for line in said.splitlines() if line.startswith(("error", "Traceback"))]


@contextmanager
def looked_at(root: Path, states: Sequence[dict[str, str]]) -> Iterator[None]:
    """Meanwhile somebody looks at what is visible, again and again."""
    done = threading.Event()

    def look() -> int:
        n_seen = 0
        while not done.wait(LOOK_SECONDS):
            n_seen += check_visible(root, states)
        return n_seen

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        try:
            yield
        finally:
            done.set()
        assert looks.result() > 0


def check_visible(root: Path, states: Sequence[dict[str, str]]) -> int:
    """No file is torn, and every line of a journal says what is there; returns the number of files and lines seen.

    A file that is not set aside is, to the byte, that of one of the states: the promised files of finished caches.
    """
    found = _visible(root)
    for key, digest in found.items():
        assert digest in {files.get(key) for files in states}, f"{key} is torn"
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
