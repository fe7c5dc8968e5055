"""Which shards are still to be harvested, which worker harvests them, and the slots of writers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actcache.arguments import type_fields_
from actcache.errors import CacheMismatch, ConfigError
from actcache.files import entries
from actcache.flow import SPLITS
from actcache.format.manifest import Plan
from actcache.format.paths import CACHE_MANIFEST, PLAN
from actcache.format.records import HookSpec, ShardRecord, merge_records
from actcache.store.cache import Cache, open_cache
from actcache.store.journal import Journal, read_journals, refuse_held, was_begun
from actcache.store.locks import exclusive, refuse_unwritable, remove_abandoned

ShardTask = tuple[str, int, tuple[HookSpec, ...], int]  # of a shard: split, index, hooks to be written, revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of `count` processes that share a cache. It harvests the shards whose number modulo `count` is `index`.

    Raises ConfigError unless 0 <= index < count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        type_fields_("harvest: worker", self)
        if not 0 <= self.index < self.count:
            raise ConfigError(f"harvest: worker i/n must have 0 <= i < n, got {self.index}/{self.count}")


def finished_rows(root: Path, held: Plan | None, hooks: Sequence[HookSpec]) -> int:
    """How many rows of the held plan are stored for all of the hooks; 0 if there is no plan."""
    if held is None:
        return 0
    lacking = {(split, index) for split, index, _, _ in missing_shards(held, merge_records(read_journals(root)), hooks)}
    return sum(
        held.rows_of(split, index)
        for split in SPLITS
        for index in range(held.n_shards(split))
        if (split, index) not in lacking
    )


def claim_slot(root: Path, slot: int, begun: Callable[[], Plan]) -> tuple[Journal, Plan]:
    """Take a writer's slot, call `begun` to settle the plan while no other process can, and clean up after the killed.

    A process that waits here for its turn holds no slot yet. If `begun` fails and there is no plan, the journal and its
    folder are removed again.

    Args:
        root: the folder of the cache.
        slot: number of the slot.
        begun: settles the plan and returns it.

    Returns:
        the open journal, which holds the slot, and the plan.

    Raises:
        CacheLocked: another process holds the slot.
        LocksMissing, OSError: as for `exclusive`.
    """
    refuse_held(root, slot)
    refuse_unwritable(root)
    with exclusive(root, "settles the plan"):
        journal = Journal(root, slot)
        try:
            plan = begun()
            remove_abandoned(root)
            return journal, plan
        except BaseException:
            if not (root / PLAN).exists():
                journal.discard()
            journal.close()
            raise


def refuse_foreign_folder(root: Path) -> None:
    """Raise CacheMismatch unless the folder is missing, empty, or a cache, finished or not."""
    if root.is_file():
        raise CacheMismatch(f"{root}: must be a folder for the cache, is a file; pass another --out")
    if root.exists() and not was_begun(root):
        held = entries(root)
        if held:
            names = ", ".join(path.name for path in held[:5])
            raise CacheMismatch(f"{root}: must be empty or a cache, holds {names}; pass another --out")


def finished_cache(root: Path, plan: Plan, hooks: Sequence[HookSpec]) -> Cache | None:
    """The opened cache, if it is finished, has the sequences of this plan and holds these hooks; else None."""
    if not (root / CACHE_MANIFEST).exists():
        return None
    cache = open_cache(root)
    grown = cache.manifest.plan.sequences != plan.sequences
    return None if grown or not set(hooks) <= set(cache.manifest.hooks) else cache


def missing_shards(
    plan: Plan, finished: dict[tuple[str, int], ShardRecord], hooks: Sequence[HookSpec]
) -> Iterator[ShardTask]:
    """The shards that lack something.

    Args:
        plan: which shards there are to be.
        finished: (split, index) -> what is recorded of a shard.
        hooks: the hooks that every shard is to hold.

    Returns:
        for each shard the hooks that it lacks; all of them if the shard has grown.
    """
    for split in SPLITS:
        for index in range(plan.n_shards(split)):
            record = finished.get((split, index))
            if record is not None and record.n_rows != plan.rows_of(split, index):
                yield split, index, tuple(hooks), record.revision + 1
                continue
            stored = set(record.hooks) if record else set()
            lacking = tuple(hook for hook in hooks if hook not in stored)
            if lacking:
                yield split, index, lacking, record.revision if record else 0


def shard_number(plan: Plan, split: str, index: int) -> int:
    """Number of a shard among those of both splits, by which workers divide the shards."""
    return index if split == SPLITS[0] else plan.n_shards(SPLITS[0]) + index
