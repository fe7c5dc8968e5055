"""From finished shards to a finished cache: statistics, Zarr metadata and, last, the manifest that readers trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from actcache.errors import CorruptShard, ManifestError
from actcache.flow import SPLITS
from actcache.format.codecs import codec, crc32c, float32_values
from actcache.format.manifest import (
    ArraySpec,
    HookSpec,
    Manifest,
    Plan,
    ShardRecord,
    aligned_arrays,
    merge_records,
    seal,
    sequence_arrays,
)
from actcache.format.stats import ROW_FILTERS, HookStatistics, Moments, geometric_median
from actcache.store.cache import CACHE_MANIFEST, STORE, Cache, file_bytes, statistics_key
from actcache.store.zarr_metadata import write_atomically, write_metadata

MEDIAN_ROWS = 8192


def finalise(root: Path, plan: Plan, records: Sequence[ShardRecord]) -> None:
    """Write statistics, Zarr metadata and, last, manifest/cache.json; may be killed and repeated at any point.

    Raises ManifestError if a shard is missing, CorruptShard if a shard's partial statistics are damaged.
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
    """What manifest/cache.json is to say. Raises ManifestError if a shard is missing."""
    merged = merge_records(records)
    found = {split: _finished_shards(plan, split, merged) for split in SPLITS}
    hooks = _finished_hooks(found)
    shards = {split: tuple(_canonical(shard, hooks) for shard in found[split]) for split in SPLITS}
    manifest = Manifest(plan=replace(plan, hooks=()), hooks=hooks, shards=shards)
    return Manifest.from_json(manifest.to_json())


def partials_key(split: str, index: int, hook_name: str) -> str:
    """Path, below the cache, of the partial statistics of one hook in one shard."""
    return f"manifest/partials/{split}-{index:06d}-{hook_name}.safetensors"


def partials_payload(moments: Mapping[str, Moments]) -> bytes:
    """The file of one hook's partial statistics in one shard, from the moments of each row filter."""
    arrays = {f"{row_filter}.{key}": v for row_filter, m in moments.items() for key, v in m.to_arrays().items()}
    return safetensors.numpy.save(arrays)


def statistics_payload(cache: Cache, split: str, hook: HookSpec) -> bytes:
    """The file of a hook's statistics. Raises CorruptShard if a partial, or a chunk of the median's, is damaged."""
    moments, medians = merged_moments(cache, split, hook), _medians(cache, split, hook)
    return seal({name: HookStatistics.of(moments[name], medians[name]).to_json() for name in ROW_FILTERS})


def merged_moments(cache: Cache, split: str, hook: HookSpec) -> dict[str, Moments]:
    """Moments per row filter; partials merge in shard order, so equal shards give equal bits. Raises CorruptShard."""
    moments = {row_filter: Moments.empty(hook.d_in) for row_filter in ROW_FILTERS}
    for shard in cache.manifest.shards[split]:
        for row_filter, found in _partials(cache.path, shard, hook.hook_name).items():
            moments[row_filter] = moments[row_filter].merge(found)
    return moments


def store_arrays(manifest: Manifest) -> dict[str, tuple[ArraySpec, int, int]]:
    """Path below the store -> (array, rows, rows of a shard), of every array."""
    arrays = {
        f"{split}/{array.path}": (array, manifest.n_rows(split), manifest.shard_rows)
        for split in SPLITS
        for array in aligned_arrays(manifest)
    }
    for split, record in manifest.plan.sequences.items():
        for array in sequence_arrays(manifest.identity["context_size"]):
            arrays[f"{split}/{array.path}"] = (array, record.n_sequences, array.chunk_rows)
    return arrays


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
    """The hooks that every shard holds, by name."""
    everywhere = set.intersection(*(set(shard.hooks) for split in SPLITS for shard in shards[split]))
    return tuple(sorted(everywhere, key=lambda hook: hook.hook_name))


def _canonical(shard: ShardRecord, hooks: tuple[HookSpec, ...]) -> ShardRecord:
    """The record as any other way to the same cache would have left it."""
    dropped = tuple(f"{hook.hook_name}/" for hook in set(shard.hooks) - set(hooks))
    keys = [partials_key(shard.split, shard.index, hook.hook_name) for hook in hooks]
    return replace(
        shard,
        hooks=hooks,
        arrays={path: array for path, array in shard.arrays.items() if not path.startswith(dropped)},
        partials={key: shard.partials[key] for key in keys},
        attempt=0,
    )


def _partials(root: Path, shard: ShardRecord, hook_name: str) -> dict[str, Moments]:
    key = partials_key(shard.split, shard.index, hook_name)
    payload = None if file_bytes(root / key) is None else (root / key).read_bytes()
    if payload is None or crc32c(payload) != shard.partials.get(key):
        raise CorruptShard(f"{root / key}: does not match its checksum; run `actcache repair`")
    arrays = safetensors.numpy.load(payload)
    prefixes = {row_filter: f"{row_filter}." for row_filter in ROW_FILTERS}
    return {
        row_filter: Moments.from_arrays({k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)})
        for row_filter, p in prefixes.items()
    }


def _medians(cache: Cache, split: str, hook: HookSpec) -> dict[str, Float[np.ndarray, " d_in"]]:
    """Geometric medians over the rows of evenly spaced chunks, about 8,192 of them."""
    reader, token_ids = cache.hook_reader(split, hook.hook_name), cache.token_reader(split, "id")
    chunk_rows = cache.manifest.chunk_rows
    n_wanted = min(reader.n_chunks, max(1, MEDIAN_ROWS // chunk_rows))
    special = np.array(cache.special_token_ids, dtype=np.int32)
    rows, plain_rows = [np.empty((0, hook.d_in), dtype=np.float32)], [np.empty(0, dtype=bool)]
    for number in range(n_wanted):
        start = (number * reader.n_chunks // n_wanted) * chunk_rows
        stop = min(start + chunk_rows, reader.n_rows)
        rows.append(float32_values(reader.read_stored(start, stop), hook.dtype))
        plain_rows.append(~np.isin(token_ids.read(start, stop), special))
    x, is_plain = np.concatenate(rows), np.concatenate(plain_rows)
    plain = geometric_median(x[is_plain])
    start = plain if is_plain.any() else None  # a few special rows move the median little
    return {"all": geometric_median(x, start=start), "no_special_tokens": plain}
