"""A harvest from beginning to end: settle the plan, harvest the missing shards of this worker, finalise.

`harvest` is for one process, `harvest_share` is for one of several, and `dry_run` tells the cost beforehand.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from actcache.arguments import local_path
from actcache.errors import CacheLocked
from actcache.files import write_atomically
from actcache.format.manifest import Plan
from actcache.format.paths import ORIGIN
from actcache.format.records import HookSpec, merge_records
from actcache.harvesting.codec_choice import choose_codec
from actcache.harvesting.config import AUTO, HarvestConfig
from actcache.harvesting.estimate import Estimate, expected_bytes, free_bytes, refuse_small_disk, tokens_per_second
from actcache.harvesting.finalise import finalise
from actcache.harvesting.loop import Harvester, HarvestTimes, Progress
from actcache.harvesting.packing_choice import as_packed
from actcache.harvesting.plan import already_there, read_plan, settle_plan, warn_of_empty_splits
from actcache.harvesting.provenance import identity_of, origin_of, refuse_other_identity, worded_as_held
from actcache.harvesting.sequences import count_sequences, packed_sequences
from actcache.harvesting.tasks import (
    Worker,
    claim_slot,
    finished_cache,
    finished_rows,
    missing_shards,
    refuse_foreign_folder,
    shard_number,
)
from actcache.models.language_model import LanguageModel
from actcache.store.cache import Cache, open_cache
from actcache.store.journal import active_writers, read_journals, writers
from actcache.store.locks import exclusive, remove_abandoned
from actcache.text.sources import Source

logger = logging.getLogger("actcache")


def harvest(
    model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path, *, progress: Progress | None = None
) -> Cache:
    """Run the model once over the packed dataset and write every asked hook into the cache at `out`.

    After a kill, the same call continues at the first unfinished shard. A finished cache that holds what is asked for
    is opened as it is. A hook that it lacks is added over the stored sequences. More tokens make it grow.

    Args:
        model: the model.
        source: the texts.
        config: what to harvest, and how it is packed and stored.
        out: the folder of the cache.
        progress: called with (rows done, rows in all) after every forward batch.

    Returns:
        the finished cache, opened.

    Raises:
        CacheMismatch: `out` holds something else; the message lists the differences.
        CacheLocked: another process is writing there.
        LocksMissing: the file system of `out` has no locks; see `actcache.store.locks.without_locks`.
        OSError: there is something to do, and this user may not write the cache.
        DiskTooSmall: the disk has less room than the shards will take.
        DatasetError: the dataset is missing, malformed or too short.
        ModelError: the model lacks a hook, or one sequence does not fit into its memory.
        NonFiniteActivations: the model gave NaN or infinity, or the stored dtype overflowed.

    After an error, finished shards stay and are not harvested again.
    """
    cache = harvest_share(model, source, config, out, Worker(), progress=progress)
    assert cache is not None, "a single worker waits for no other"
    return cache


def harvest_share(
    model: LanguageModel,
    source: Source,
    config: HarvestConfig,
    out: str | Path,
    worker: Worker,
    *,
    progress: Progress | None = None,
) -> Cache | None:
    """Harvest as one of several processes that share a cache. The process that writes the last shard finalises.

    Args:
        model, source, config, out, progress: as for `harvest`.
        worker: which of the processes this one is.

    Returns:
        the finished cache, opened; None if other workers still have shards to write.

    Raises:
        CacheLocked: another process is the same worker, or one of more workers than `worker.count`.
        CacheMismatch, LocksMissing, OSError, DiskTooSmall, DatasetError, ModelError, NonFiniteActivations: as for
            `harvest`.
    """
    root = local_path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    config = as_packed(model, source, config, read_plan(root))
    wanted = identity_of(model, source, config)
    cache = _already_there(root, wanted, model, config, widths)
    if cache is not None:
        remove_abandoned(root)
        return cache
    times, started = HarvestTimes(), time.perf_counter()
    begun = partial(_begun, root, wanted, model, source, config, widths, worker)
    journal, plan = claim_slot(root, worker.index, begun)
    with journal:
        times.pack = time.perf_counter() - started
        hooks = _wanted_hooks(plan, widths)
        cache = finished_cache(root, plan, hooks)
        if cache is not None:  # another worker finished it meanwhile
            return cache
        write_atomically(root / ORIGIN, [json.dumps(origin_of(model, source)).encode()])
        finished = merge_records(read_journals(root))
        pending = [
            task
            for task in missing_shards(plan, finished, hooks)
            if shard_number(plan, *task[:2]) % worker.count == worker.index
        ]
        harvester = Harvester(root, plan, model, pending, finished, config, journal.append, times, progress)
        harvester.warn_of_other_compute()
        harvester.run()
        cache, n_left = _finalised(root, hooks, times)
        times.total = time.perf_counter() - started
        _write_log(root, model, times)
        remove_abandoned(root)
    logger.info(times.described())
    if n_left:
        logger.info("%s: this worker is done; other workers owe %d shards, the last of them finalises", root, n_left)
    return cache


def dry_run(model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path) -> Estimate:
    """What `harvest` with these arguments still has to do. Two short forward passes run, and nothing is written.

    If config.tokens is None, the dataset is packed to count its sequences.

    Args:
        model, source, config, out: as for `harvest`.

    Raises:
        CacheMismatch, DatasetError, ModelError: as for `harvest`.
    """
    root = local_path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    held = read_plan(root)
    config = _with_codec(root, held, model, as_packed(model, source, config, held))
    if held is not None:
        wanted = identity_of(model, source, config)
        refuse_other_identity(root, held, worded_as_held(root, held, wanted, model))
    hooks = _specs(widths, config.dtype)
    n_sequences = (
        count_sequences(model, source, config) if config.tokens is None else config.tokens // config.context_size
    )
    n_rows = n_sequences * config.context_size - finished_rows(root, held, hooks)
    rate = tokens_per_second(model, config.hook_names, config.context_size, config.batch_sequences)
    return Estimate(
        n_rows=n_rows,
        n_bytes=expected_bytes(n_rows, hooks, config.codec),
        free_bytes=free_bytes(root),
        seconds=n_rows / rate,
    )


def _already_there(
    root: Path, wanted: Mapping[str, Any], model: LanguageModel, config: HarvestConfig, widths: dict[str, int]
) -> Cache | None:
    """The cache, if it is finished and holds what is asked for. This writes nothing and needs no lock."""
    held = read_plan(root)
    wanted = worded_as_held(root, held, wanted, model)
    if held is not None and config.codec == AUTO:
        wanted = {**wanted, "codec": held.identity["codec"]}
    return already_there(root, wanted, config.tokens, _specs(widths, config.dtype))


def _begun(
    root: Path,
    wanted: Mapping[str, Any],
    model: LanguageModel,
    source: Source,
    config: HarvestConfig,
    widths: dict[str, int],
    worker: Worker,
) -> Plan:
    """Settle the plan. Raises CacheLocked if workers with higher numbers write."""
    others = active_writers(root) - {worker.index}
    if any(slot >= worker.count for slot in others):
        raise CacheLocked(
            f"{root}: {len(others)} workers write this cache ({writers(root, others)}); wait for them, or join with "
            "--worker i/n"
        )
    held = read_plan(root)
    wanted = worded_as_held(root, held, wanted, model)
    config = _with_codec(root, held, model, config)
    if held is None and config.tokens is not None:
        refuse_small_disk(root, expected_bytes(config.tokens, _specs(widths, config.dtype), config.codec))
    sequences = packed_sequences(model, source, config)
    check = partial(source.refuse_change, wanted["dataset"])
    plan = settle_plan(root, {**wanted, "codec": config.codec}, sequences, config, max(widths.values()), check)
    warn_of_empty_splits(root, plan)
    return plan


def _with_codec(root: Path, held: Plan | None, model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The config with a profile as its codec. "auto" becomes the codec of the plan, or else the measured one."""
    if config.codec != AUTO:
        return config
    if held is not None:
        return replace(config, codec=held.identity["codec"])
    name, why = choose_codec(model, config.hook_names, config.context_size, config.batch_sequences, config.dtype, root)
    logger.info("codec %s: %s", name, why)
    return replace(config, codec=name)


def _specs(widths: dict[str, int], dtype: str) -> list[HookSpec]:
    return [HookSpec(hook_name=name, d_in=d_in, dtype=dtype) for name, d_in in widths.items()]


def _wanted_hooks(plan: Plan, widths: dict[str, int]) -> list[HookSpec]:
    """The hooks that are asked for, and those that have to grow with the cache."""
    return list(dict.fromkeys([*_specs(widths, plan.identity["dtype"]), *plan.hooks]))


def _finalised(root: Path, hooks: Sequence[HookSpec], times: HarvestTimes) -> tuple[Cache | None, int]:
    """Finalise the cache, if no shard is missing.

    Returns:
        the cache, or None if other workers still have shards to write, and how many.
    """
    started = time.perf_counter()
    with exclusive(root, "finalises"):
        plan, records = read_plan(root), read_journals(root)
        assert plan is not None, "settled before the first shard"
        n_left = len(list(missing_shards(plan, merge_records(records), hooks)))
        if n_left:
            return None, n_left
        if finished_cache(root, plan, hooks) is None:
            finalise(root, plan, records)
    times.finalise = time.perf_counter() - started
    return open_cache(root), 0


def _write_log(root: Path, model: LanguageModel, times: HarvestTimes) -> None:
    """Write when, where and how fast the harvest ran. Equal caches may differ in this file."""
    values = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": str(model.device),
        "seconds": asdict(times),
    }
    write_atomically(root / "log" / f"harvest-{time.time_ns()}.json", [json.dumps(values, indent=1).encode()])
