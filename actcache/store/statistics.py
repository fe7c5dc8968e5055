"""The files of statistics: partial ones, of one hook in one shard, and those of a split, made by merging them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from actcache.errors import CorruptShard
from actcache.files import NoFile, contents
from actcache.format.codecs import crc32c, float32_values
from actcache.format.paths import partials_key
from actcache.format.records import HookSpec, ShardRecord
from actcache.format.seal import seal
from actcache.format.stats import ROW_FILTERS, HookStatistics, Moments, geometric_median
from actcache.store.cache import Cache
from actcache.store.kept import CacheFiles

MEDIAN_ROWS = 8192


def partials_payload(moments: Mapping[str, Moments]) -> bytes:
    """The bytes of the partial statistics of one hook in one shard. moments: row filter -> moments of the shard."""
    arrays = {f"{row_filter}.{key}": v for row_filter, m in moments.items() for key, v in m.to_arrays().items()}
    return safetensors.numpy.save(arrays)


def statistics_payload(cache: Cache, split: str, hook: HookSpec) -> bytes:
    """The bytes of the statistics file of a hook.

    Raises CorruptShard if partial statistics are damaged, or a chunk whose rows the median is taken of.
    """
    moments, medians = merged_moments(cache, split, hook), _medians(cache, split, hook)
    return seal({name: HookStatistics.of(moments[name], medians[name]).to_json() for name in ROW_FILTERS})


def merged_moments(cache: Cache, split: str, hook: HookSpec) -> dict[str, Moments]:
    """Row filter -> the moments of a hook in a split.

    Partial statistics merge in the order of the shards, so equal shards give equal bits. Raises CorruptShard if partial
    statistics are missing or damaged.
    """
    moments = {row_filter: Moments.empty(hook.d_in) for row_filter in ROW_FILTERS}
    for shard in cache.manifest.shards[split]:
        for row_filter, found in _partials(cache.files, shard, hook.hook_name).items():
            moments[row_filter] = moments[row_filter].merge(found)
    return moments


def _partials(files: CacheFiles, shard: ShardRecord, hook_name: str) -> dict[str, Moments]:
    key = partials_key(shard.split, shard.index, hook_name)
    arrays = safetensors.numpy.load(files.read(key, partial(checked_contents, shard.partials.get(key))))
    prefixes = {row_filter: f"{row_filter}." for row_filter in ROW_FILTERS}
    return {
        row_filter: Moments.from_arrays({k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)})
        for row_filter, p in prefixes.items()
    }


def checked_contents(checksum: int | None, path: Path) -> bytes:
    """The bytes of a small file. Raises CorruptShard if it is missing, or has another CRC-32C than `checksum`."""
    try:
        payload = contents(path)
    except NoFile as error:
        raise CorruptShard(f"cannot be read ({error.strerror})", path=path, way_out="run `actcache repair`") from error
    if crc32c(payload) != checksum:
        what = "does not match its checksum in the manifest"
        raise CorruptShard(what, path=path, way_out="run `actcache repair`")
    return payload


def _medians(cache: Cache, split: str, hook: HookSpec) -> dict[str, Float[np.ndarray, " d_in"]]:
    """Row filter -> geometric median of about 8,192 rows, those of evenly spaced chunks."""
    reader, token_ids = cache.hook_reader(split, hook.hook_name), cache.token_reader(split, "id")
    chunk_rows = cache.manifest.chunk_rows
    n_wanted = min(reader.n_chunks, max(1, MEDIAN_ROWS // chunk_rows))
    special = np.array(cache.special_token_ids, dtype=np.int32)
    x_parts, plain_parts = [np.empty((0, hook.d_in), dtype=np.float32)], [np.empty(0, dtype=bool)]
    for number in range(n_wanted):
        start = (number * reader.n_chunks // n_wanted) * chunk_rows
        stop = min(start + chunk_rows, reader.n_rows)
        x_parts.append(float32_values(reader.read_stored(start, stop), hook.dtype))
        plain_parts.append(~np.isin(token_ids.read(start, stop), special))
    x, is_plain = np.concatenate(x_parts), np.concatenate(plain_parts)
    plain = geometric_median(x[is_plain])
    start = plain if is_plain.any() else None  # a few special rows move the median little
    return {"all": geometric_median(x, start=start), "no_special_tokens": plain}
