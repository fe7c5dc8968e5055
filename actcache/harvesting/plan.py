"""`settle_plan`: finds, makes or extends the plan of a cache, before the first forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import CacheLocked, CacheMismatch, CorruptShard
from actcache.files import contents, write_atomically
from actcache.flow import HOLD_OUT_MORE, SPLITS
from actcache.format.arrays import chunk_rows, sequence_arrays, shard_rows
from actcache.format.codecs import codec
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.manifest import Plan, replaced_by_growth
from actcache.format.paths import CACHE_MANIFEST, PLAN, STORE, shard_key
from actcache.format.records import HookSpec, SequencesRecord
from actcache.format.seal import seal, unseal
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.provenance import refuse_other_identity
from actcache.harvesting.sequences import SequenceArrays, write_sequences
from actcache.harvesting.tasks import finished_cache
from actcache.store.cache import Cache, read_manifest, sequence_reader
from actcache.store.journal import active_writers, read_journals, writers
from actcache.store.kept import CacheFiles, forget, keep
from actcache.store.locks import may_write, refuse_unwritable
from actcache.text.packing import PackedSequence

logger = logging.getLogger("actcache")


def read_plan(root: Path) -> Plan | None:
    """The plan of the cache at `root`; None if there is none yet. Raises ManifestError if it is damaged."""
    path = root / PLAN
    return Plan.from_json(unseal(contents(path), path)) if path.exists() else None


def refuse_hopeless(root: Path, tokens: int | None, hook_names: Collection[str]) -> None:
    """Raise OSError if a harvest has to write a cache that this user may not write. It needs no model.

    tokens, hook_names: what is asked for.
    """
    if may_write(root):
        return
    held, is_finished = read_plan(root), (root / CACHE_MANIFEST).exists()
    hooks = read_manifest(root).manifest.hooks if is_finished else ()
    if held is None or not _covers(held, tokens) or not {hook.hook_name for hook in hooks}.issuperset(hook_names):
        refuse_unwritable(root)


def already_there(root: Path, wanted: Mapping[str, Any], tokens: int | None, hooks: Sequence[HookSpec]) -> Cache | None:
    """The opened cache, if it is finished and holds what is asked for; else None. Nothing is locked or written.

    Args:
        root: the folder of the cache.
        wanted: the identity of the cache, without SIZES.
        tokens: how many are asked for; None asks for the whole dataset.
        hooks: the hooks that are asked for.

    Raises:
        CacheMismatch: the folder holds another cache.
        ManifestError, CorruptShard: the cache is damaged.
    """
    held = read_plan(root)
    if held is None:
        return None
    refuse_other_identity(root, held, wanted)
    if not (_covers(held, tokens) and _tails_are_sound(root, held)):
        return None
    if may_write(root) and any(_unplanned(root, held)):  # they can go only while nobody grows the cache
        return None
    read_journals(root)  # damage is told, though nothing of them is needed
    cache = finished_cache(root, held, [*hooks, *held.hooks])
    if cache is not None:
        warn_of_empty_splits(root, held)
    return cache


def settle_plan(
    root: Path,
    wanted: Mapping[str, Any],
    sequences: Iterable[PackedSequence],
    config: HarvestConfig,
    widest: int,
    check: Callable[[], None] = lambda: None,
) -> Plan:
    """The plan on disk, if it has enough tokens; else a new or a grown plan, for which the dataset is packed.

    While a cache grows, its finished part can be read: the files of it that change are kept under other names before
    they do. The caller holds `exclusive` and a writer's slot.

    Args:
        root: the folder of the cache.
        wanted: the identity of the cache, without SIZES.
        sequences: the packed sequences of the dataset; read only if they are needed.
        config: the settings of the harvest; its codec is a profile, not "auto".
        widest: the largest d_in of the hooks.
        check: called after the sequences were read, before the plan changes; what it raises ends the harvest.

    Raises:
        CacheMismatch: the folder holds another cache (the message lists the differences), an unfinished harvest of
            another number of tokens, or a cache of a dataset that has changed.
        CacheLocked: the cache has to grow while another process writes.
        DatasetError: the dataset holds fewer tokens than were asked for.
    """
    held = read_plan(root)
    if held is not None:
        refuse_other_identity(root, held, wanted)
        if _covers(held, config.tokens) and _tails_are_sound(root, held):
            _refuse_unfinished(root, held, config.tokens)
            return _settled(root, held)
        if len(slots := active_writers(root)) > 1:
            raise CacheLocked(
                f"{root}: other processes write this cache ({writers(root, slots)}); wait for them before it grows"
            )
    packed = SequenceArrays(root, codec(config.codec), config.context_size, held)
    try:
        write_sequences(packed, sequences, config)
        packed.finish()
        check()
    except BaseException:
        packed.abandon()
        raise
    finished = _finished_part(root)
    if finished is not None:
        keep(root, finished.fingerprint, replaced_by_growth(finished.manifest))
    hooks = finished.manifest.hooks if finished else held.hooks if held else ()
    stored = packed.commit()
    identity = {**wanted, **_sizes(config, widest, stored)} if held is None else held.identity
    plan = Plan(identity=identity, tokens=config.tokens, sequences=stored, hooks=hooks)
    return _settled(root, _write_plan(root, plan))


def warn_of_empty_splits(root: Path, plan: Plan) -> None:
    """Log a warning for a split that has no row, unless none was held out on purpose."""
    holdout = plan.identity["holdout"]
    if plan.n_rows("validation") == 0 and holdout > 0:
        logger.warning(
            "%s: the validation split is empty (holdout %s): no held-out document fills a sequence; eval and features "
            "will refuse this cache: %s, into another --out",
            root,
            holdout,
            HOLD_OUT_MORE,
        )
    if plan.n_rows("train") == 0:
        logger.warning(
            "%s: the train split is empty (holdout %s): every document that fills a sequence is held out; training "
            "will refuse this cache: harvest with a smaller --holdout or with more documents, into another --out",
            root,
            holdout,
        )


def _write_plan(root: Path, plan: Plan) -> Plan:
    """Write the plan, once it reads back: so it equals the plan of a resumed run down to the order of its keys."""
    sealed = seal(plan.to_json())
    read_back = Plan.from_json(unseal(sealed, root / PLAN))
    write_atomically(root / PLAN, [sealed])
    return read_back


def _settled(root: Path, plan: Plan) -> Plan:
    """The plan, after shards of sequences went that it does not name, and what a growth kept that was never begun."""
    for path in _unplanned(root, plan):
        path.unlink()
    finished = _finished_part(root)
    if finished is not None and _has_all(finished, plan):
        forget(root, finished.fingerprint)
    return plan


def _unplanned(root: Path, plan: Plan) -> Iterator[Path]:
    """Shards of sequences that the plan does not name; a killed run that asked for more tokens left them.

    The folders are listed: a run that was killed while it deleted them may have left a gap.
    """
    for split, record in plan.sequences.items():
        for array in sequence_arrays(plan.identity["context_size"]):
            planned = {str(index) for index in range(len(record.arrays[array.path]))}
            for folder in sorted((root / STORE / split / array.path / "c").glob("*")):
                if re.fullmatch("0|[1-9][0-9]*", folder.name) and folder.name not in planned:
                    path = root / STORE / split / shard_key(array, int(folder.name))
                    if path.exists():
                        yield path


def _finished_part(root: Path) -> Cache | None:
    """The cache as far as it is finished; None if nothing is."""
    return read_manifest(root) if (root / CACHE_MANIFEST).exists() else None


def _has_all(finished: Cache, plan: Plan) -> bool:
    return finished.manifest.plan.sequences == plan.sequences


def _sizes(config: HarvestConfig, widest: int, sequences: dict[str, SequencesRecord]) -> dict[str, int]:
    itemsize = TORCH_DTYPE[config.dtype].itemsize
    n_rows = shard_rows(
        widest,
        itemsize,
        n_hooks=len(config.hook_names),
        n_rows=max(record.n_sequences for record in sequences.values()) * config.context_size,
        batch_tokens=config.batch_sequences * config.context_size,
    )
    return {"shard_rows": n_rows, "chunk_rows": chunk_rows(widest, itemsize, n_rows)}


def _covers(held: Plan, tokens: int | None) -> bool:
    """Whether the plan has the rows that are asked for. tokens: None asks for the whole dataset."""
    if tokens is None:
        return held.tokens is None
    return tokens // held.identity["context_size"] * held.identity["context_size"] <= _n_rows(held)


def _n_rows(plan: Plan) -> int:
    return sum(plan.n_rows(split) for split in SPLITS)


def _refuse_unfinished(root: Path, held: Plan, tokens: int | None) -> None:
    """Raise CacheMismatch if an unfinished cache was begun with another number of tokens.

    A finished cache holds the fewer tokens that are asked for. To finish an unfinished one would harvest more than
    that.
    """
    finished = _finished_part(root)
    if tokens != held.tokens and (finished is None or not _has_all(finished, held)):
        raise CacheMismatch(
            f"{root}: holds an unfinished harvest of {held.tokens or 'all'} tokens, {tokens} asked; finish it with "
            f"{'no --tokens' if held.tokens is None else f'--tokens {held.tokens}'}, or pass another --out"
        )


def _tails_are_sound(root: Path, plan: Plan) -> bool:
    """Whether the last shard of every sequence array is the plan's. After a kill while the cache grew it may not be."""
    for split in SPLITS:
        for name in ("id", "document"):
            reader = sequence_reader(CacheFiles(root=root), plan, split, name)
            try:
                reader.read(max(reader.n_rows - 1, 0), reader.n_rows)
            except CorruptShard:
                return False
    return True
