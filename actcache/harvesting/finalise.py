"""`finalise`: turns finished shards into a finished cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actcache.errors import ManifestError
from actcache.files import write_atomically
from actcache.flow import SPLITS
from actcache.format.codecs import codec
from actcache.format.manifest import Manifest, Plan, store_arrays
from actcache.format.paths import CACHE_MANIFEST, STORE, partials_key, statistics_key
from actcache.format.records import HookSpec, ShardRecord, merge_records
from actcache.format.seal import seal
from actcache.store.cache import Cache
from actcache.store.statistics import statistics_payload
from actcache.store.zarr_metadata import write_metadata


def finalise(root: Path, plan: Plan, records: Sequence[ShardRecord]) -> None:
    """Write the statistics, the Zarr metadata and, last, manifest/cache.json, which readers trust.

    After a kill at any point, the same call does it again. The caller holds `exclusive`.

    Args:
        root: the folder of the cache.
        plan: its plan.
        records: all records of its journals.

    Raises:
        ManifestError: a shard is missing.
        CorruptShard: partial statistics, or a chunk that the median needs, are damaged.
    """
    manifest = finished_manifest(plan, records)
    cache = Cache(root, manifest, fingerprint="")
    for split in SPLITS:
        for hook in manifest.hooks:
            payload = statistics_payload(cache, split, hook)
            write_atomically(root / statistics_key(split, hook.hook_name), [payload])
    write_metadata(root / STORE, {"actcache": plan.identity}, store_arrays(manifest), codec(plan.identity["codec"]))
    write_atomically(root / CACHE_MANIFEST, [seal(manifest.to_json())])


def finished_manifest(plan: Plan, records: Sequence[ShardRecord]) -> Manifest:
    """The manifest of the finished cache. Raises ManifestError if a shard is missing."""
    merged = merge_records(records)
    found = {split: _finished_shards(plan, split, merged) for split in SPLITS}
    hooks = _finished_hooks(found)
    shards = {split: tuple(_canonical(shard, hooks) for shard in found[split]) for split in SPLITS}
    manifest = Manifest(plan=replace(plan, hooks=()), hooks=hooks, shards=shards)
    return Manifest.from_json(manifest.to_json())


def _finished_shards(plan: Plan, split: str, merged: dict[tuple[str, int], ShardRecord]) -> tuple[ShardRecord, ...]:
    missing = [
        index
        for index in range(plan.n_shards(split))
        if (split, index) not in merged or merged[split, index].n_rows != plan.rows_of(split, index)
    ]
    if missing:
        raise ManifestError(f"finalise: {len(missing)} shards of {split} are missing, the first is {missing[0]}")
    return tuple(merged[split, index] for index in range(plan.n_shards(split)))


def _finished_hooks(shards: dict[str, tuple[ShardRecord, ...]]) -> tuple[HookSpec, ...]:
    """The hooks that every shard holds, sorted by name."""
    everywhere = set.intersection(*(set(shard.hooks) for split in SPLITS for shard in shards[split]))
    return tuple(sorted(everywhere, key=lambda hook: hook.hook_name))


def _canonical(shard: ShardRecord, hooks: tuple[HookSpec, ...]) -> ShardRecord:
    """The record without anything that depends on how the cache came about. Equal caches have equal manifests."""
    dropped = tuple(f"{hook.hook_name}/" for hook in set(shard.hooks) - set(hooks))
    keys = [partials_key(shard.split, shard.index, hook.hook_name) for hook in hooks]
    return replace(
        shard,
        hooks=hooks,
        arrays={path: array for path, array in shard.arrays.items() if not path.startswith(dropped)},
        partials={key: shard.partials[key] for key in keys},
        revision=0,
    )
