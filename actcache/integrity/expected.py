"""`ExpectedCache`: what a damaged cache should hold, as far as its manifest files tell, and what a repair has written.

manifest/cache.json, manifest/plan.json and the journals can each be made from the other two. Readers trust cache.json.
A repair also reads the journals, because they are newer if an earlier repair was killed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actcache.errors import CacheMismatch, ManifestError
from actcache.files import NoFile, contents, write_atomically
from actcache.flow import SPLITS
from actcache.format.arrays import hook_arrays, token_arrays
from actcache.format.codecs import codec
from actcache.format.manifest import Manifest, Plan, aligned_arrays, check_hooks
from actcache.format.paths import CACHE_MANIFEST, PLAN, STORE, partials_key, shard_key
from actcache.format.records import ArrayRecord, HookSpec, ShardRecord, merge_records
from actcache.format.seal import unseal
from actcache.integrity.problems import Problem, stored_arrays
from actcache.integrity.verify import agrees
from actcache.machine.limits import require_memory_for_array
from actcache.store.cache import Cache, read_manifest
from actcache.store.journal import Journal, hook_computes, read_journals

Key = tuple[str, int]  # split and index of a shard
SHARD_BYTES, CHUNK_BYTES = 1 << 11, 16  # of memory, for what is known of an array's shard or chunk, and wrong with it
UNKNOWN = -1  # size and checksum of an array that no line describes; no file has them

logger = logging.getLogger("actcache")


def twins(root: Path) -> tuple[Plan | None, Manifest | None, list[Problem]]:
    """(plan, manifest, problems): manifest/plan.json and manifest/cache.json, each None if it is missing or damaged.

    Raises ManifestError if both are, CacheMismatch if they belong to two caches, OSError if one cannot be read.
    """
    plan = manifest = None
    problems: list[Problem] = []
    try:
        plan = Plan.from_json(unseal(contents(root / PLAN), root / PLAN))
    except (ManifestError, NoFile) as error:
        problems.append(_unreadable(root / PLAN, error))
    try:
        manifest = Manifest.from_json(unseal(contents(root / CACHE_MANIFEST), root / CACHE_MANIFEST))
    except (ManifestError, NoFile) as error:
        problems.append(_unreadable(root / CACHE_MANIFEST, error))
    if plan is None and manifest is None:
        raise ManifestError(f"{'; '.join(map(str, problems))}; restore one of them, or harvest again elsewhere")
    if plan and manifest and plan.identity != manifest.identity:
        raise CacheMismatch(f"{root}: {PLAN} and {CACHE_MANIFEST} are of two caches; delete the one that is not of it")
    return plan, manifest, problems


def _unreadable(path: Path, error: ManifestError | NoFile) -> Problem:
    message = f"cannot be read ({error.strerror})" if isinstance(error, NoFile) else error.what
    return Problem(path=str(path), message=message)


def settled(root: Path, plan: Plan | None, manifest: Manifest | None) -> tuple[Plan, Manifest | None, list[Problem]]:
    """(plan, manifest, problems): the plan to repair by, and the manifest unless it is outdated or cannot be read.

    If the two files differ, the cache grows, or one is a copy from before it grew. The plan is the newer one if it has
    more rows, and the journals describe all of them or files are kept for growth.

    Args:
        root: the folder of the cache.
        plan, manifest: what `twins` gave.
    """
    if plan is None:
        assert manifest is not None, "one of the two can be read"
        return manifest.plan, manifest, []
    if manifest is None or replace(plan, hooks=()) == manifest.plan:
        return plan, manifest, []
    lines = merge_records(read_journals(root))
    covered = all(key in lines and lines[key].n_rows == plan.rows_of(*key) for key in _keys(plan))
    larger = sum(map(plan.n_rows, SPLITS)) > sum(map(manifest.n_rows, SPLITS))
    if larger and (covered or read_manifest(root).files.are_kept):
        return plan, None, [Problem(path=str(root / CACHE_MANIFEST), message="is from before the cache grew")]
    return manifest.plan, manifest, [Problem(path=str(root / PLAN), message=f"says another plan than {CACHE_MANIFEST}")]


def _keys(plan: Plan) -> list[Key]:
    return [(split, index) for split in SPLITS for index in range(plan.n_shards(split))]


def _unknown(plan: Plan, key: Key, hooks: Sequence[HookSpec], compute: dict[str, Any]) -> ShardRecord:
    """The record of a shard that no line describes. Every file of it counts as damaged."""
    (split, index), n_rows = key, plan.rows_of(*key)
    arrays = token_arrays(plan.identity["shard_rows"])
    for hook in hooks:
        arrays += hook_arrays(hook, codec(plan.identity["codec"]), plan.identity["chunk_rows"])
    n_chunks = {array.path: -(-n_rows // array.chunk_rows) for array in arrays}
    return ShardRecord(
        split=split,
        index=index,
        first_token=index * plan.identity["shard_rows"],
        n_rows=n_rows,
        hooks=tuple(hooks),
        arrays={path: ArrayRecord(n_bytes=UNKNOWN, checksums=(UNKNOWN,) * n) for path, n in n_chunks.items()},
        partials={partials_key(split, index, hook.hook_name): UNKNOWN for hook in hooks},
        compute=compute,
    )


def _fits(line: ShardRecord, shard: ShardRecord) -> bool:
    """Whether a line of a journal describes a shard of as many rows, and chunks of each array, as it must have."""
    pairs = [(line.arrays[path], array) for path, array in shard.arrays.items() if path in line.arrays]
    return line.n_rows == shard.n_rows and all(len(a.checksums) == len(b.checksums) for a, b in pairs)


def _require_memory(root: Path, plan: Plan, n_hooks: int) -> None:
    """Raise MemoryError if there is no room for the records of all shards: a short plan may ask for many."""
    chunk_rows = plan.identity["chunk_rows"]
    n_bytes = sum(
        plan.n_shards(split) * SHARD_BYTES + plan.n_rows(split) // chunk_rows * CHUNK_BYTES for split in SPLITS
    )
    require_memory_for_array((n_hooks + 1) * n_bytes, f"what {root} should hold")


class ExpectedCache:
    """What every shard should hold while a cache is repaired, and which files have been written again.

    Attributes:
        root: the folder of the cache.
        plan: its plan.
        believed: manifest/cache.json; None if it is lost or outdated.
        hooks: the hooks that the cache should have.
        held: (split, index) -> the record that the files of a shard must match.
        redone: the files that were written again.
    """

    def __init__(self, root: Path, plan: Plan, manifest: Manifest | None, journal: Journal):
        """Raises ManifestError if no manifest file tells the hooks of the cache. journal: open, takes new lines."""
        self.root, self.plan, self.believed, self._journal = root, plan, manifest, journal
        self._lines, self._computes = merge_records(read_journals(root)), hook_computes(root)
        self.hooks = manifest.hooks if manifest else self._hooks_of_lines()
        self.held = {key: self._first_held(key) for key in _keys(plan)}
        self._arrays = {array.path: array for array in aligned_arrays(self.cache().manifest)}
        self.redone: list[str] = []

    def cache(self) -> Cache:
        """The cache that the held records describe.

        Unlike a finished cache it may have shards that no line describes.
        """
        shards = {split: tuple(self.held[split, i] for i in range(self.plan.n_shards(split))) for split in SPLITS}
        manifest = Manifest(plan=replace(self.plan, hooks=()), hooks=self.hooks, shards=shards)
        return Cache(self.root, manifest, fingerprint="")

    def path(self, key: Key, array: str) -> Path:
        """The file of an array of a shard. array: path below the split, of a hook or of the tokens."""
        return self.root / STORE / key[0] / shard_key(self._arrays[array], key[1])

    def revision(self, key: Key) -> int:
        """The revision for new lines about a shard. It is higher than that of every line so far."""
        return self._lines[key].revision + 1 if key in self._lines else 0

    def arrays_of(self, hook: HookSpec) -> list[str]:
        """The paths of the arrays of a hook, below the split."""
        profile = codec(self.plan.identity["codec"])
        return [array.path for array in hook_arrays(hook, profile, self.plan.identity["chunk_rows"])]

    def compute(self, key: Key, hook: HookSpec) -> dict[str, Any]:
        """How a hook of a shard was computed.

        The journals know, if they describe the held arrays; else the shard's record.
        """
        held, line = self.held[key], self._lines.get(key)
        same = line is not None and all(line.arrays.get(array) == held.arrays[array] for array in self.arrays_of(hook))
        return self._computes[*key, hook.hook_name] if same else held.compute

    def in_words(self, problem: Problem) -> Problem:
        """The problem as it is reported.

        A file that no line describes has no right size, so its message is another one.
        """
        held = None if problem.split is None or problem.shard is None else self.held.get((problem.split, problem.shard))
        array = held.arrays.get(problem.array or "") if held else None
        if array is None or array.n_bytes != UNKNOWN:
            return problem
        return replace(problem, message="no line of a journal is left that says what it holds")

    def put(self, path: Path, payload: bytes) -> None:
        """Write a file, unless it has these bytes already. Raises OSError if these cannot be read."""
        try:
            if contents(path) == payload:
                return
        except NoFile:
            pass
        write_atomically(path, [payload])
        self.redone.append(str(path))

    def line(self, key: Key, **what: Any) -> ShardRecord:
        """A record of a shard that describes `what` alone. what: fields of ShardRecord."""
        nothing = {"hooks": (), "arrays": {}, "partials": {}, "revision": self.revision(key)}
        return replace(self.held[key], **{**nothing, **what})

    def record(self, record: ShardRecord) -> None:
        """Note files that were written again. If they differ from the held record, append the record to the journal."""
        key = (record.split, record.index)
        held = self.held[key]
        self.redone += [str(self.path(key, array)) for array in record.arrays]
        self.redone += [str(self.root / name) for name in record.partials]
        changed = [path for path, array in record.arrays.items() if held.arrays[path] != array]
        if not changed and all(held.partials[name] == checksum for name, checksum in record.partials.items()):
            return
        self._journal.append(record)
        self.held[key] = held.merge(record)
        for array in changed:
            if held.arrays[array].n_bytes != UNKNOWN:
                logger.warning("%s: came out with other bytes than it had", self.path(key, array))

    def restore_lines(self, manifest: Manifest) -> None:
        """Append lines to the journal until the journals describe each shard as manifest/cache.json will."""
        lines = merge_records(read_journals(self.root))
        for key in _keys(manifest.plan):
            shard = manifest.shards[key[0]][key[1]]
            if not agrees(lines.get(key), shard):
                self._journal.append(replace(shard, revision=self.revision(key)))
                self.redone.append(str(self._journal.path))

    def _hooks_of_lines(self) -> tuple[HookSpec, ...]:
        """Every hook that any line or the plan names, so that a lost line does not lose a hook."""
        if not self._lines:
            raise ManifestError(f"{self.root}: no finished shard is recorded; run the same `actcache harvest` again")
        named = {*self.plan.hooks, *(hook for line in self._lines.values() for hook in line.hooks)}
        hooks = tuple(sorted(named, key=lambda hook: hook.hook_name))
        check_hooks(self.plan, hooks)
        _require_memory(self.root, self.plan, len(hooks))
        return hooks

    def _first_held(self, key: Key) -> ShardRecord:
        """The first held record of a shard: that of manifest/cache.json if it is believed, else of the journals."""
        line = self._lines.get(key)
        if self.believed is None:
            unknown = _unknown(self.plan, key, self.hooks, next(iter(self._lines.values())).compute)
            return unknown.merge(line) if line and _fits(line, unknown) else unknown
        believed = self.believed.shards[key[0]][key[1]]
        return (
            self._truer(believed, line) if line and _fits(line, believed) and not agrees(line, believed) else believed
        )

    def _truer(self, believed: ShardRecord, line: ShardRecord) -> ShardRecord:
        """The record that fits the files better.

        It is that of the journals if a repair was killed before it wrote manifest/cache.json.
        """
        other = replace(
            believed,
            arrays={path: line.arrays.get(path, array) for path, array in believed.arrays.items()},
            partials={key: line.partials.get(key, checksum) for key, checksum in believed.partials.items()},
            compute=line.compute,
        )
        return min(believed, other, key=self._n_damaged)

    def _n_damaged(self, record: ShardRecord) -> int:
        assert self.believed is not None, "there are two records to choose from"
        shards = list(self.believed.shards[record.split])
        shards[record.index] = record
        manifest = replace(self.believed, shards={**self.believed.shards, record.split: tuple(shards)})
        stored = [s for s in stored_arrays(Cache(self.root, manifest, fingerprint="")) if s.split == record.split]
        aligned = [s for s in stored if s.array.path in record.arrays]
        return sum(problem is not None for s in aligned for problem in s.problems(record.index))
