"""A harvest from begin to end: settle the plan, harvest the missing shards of this worker, finalise.

`harvest` is for one process, `harvest_share` for one of several, `dry_run` for the cost beforehand.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from actcache.errors import CacheLocked
from actcache.files import remove_leftovers, write_atomically
from actcache.format.manifest import Plan
from actcache.format.paths import ORIGIN
from actcache.format.records import HookSpec, merge_records
from actcache.harvesting.codec_choice import choose_codec
from actcache.harvesting.config import AUTO, HarvestConfig
from actcache.harvesting.estimate import Estimate, expected_bytes, free_bytes, refuse_small_disk, tokens_per_second
from actcache.harvesting.finalise import finalise
from actcache.harvesting.loop import Harvester, HarvestTimes, Progress
from actcache.harvesting.plan import read_plan, settle_plan
from actcache.harvesting.provenance import identity_of, origin_of, refuse_other_identity
from actcache.harvesting.sequences import count_sequences, packed_sequences
from actcache.harvesting.tasks import (
    Worker,
    claim_slot,
    finished_cache,
    finished_rows,
    missing_shards,
    refuse_foreign_folder,
    release_slot,
    shard_number,
)
from actcache.models.language_model import LanguageModel
from actcache.store.cache import Cache, open_cache
from actcache.store.journal import active_writers, read_journals
from actcache.store.locks import exclusive
from actcache.text.sources import Source

logger = logging.getLogger("actcache")


def harvest(
    model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path, *, progress: Progress | None = None
) -> Cache:
    """Run the model once over the packed dataset and write every asked hook into the cache at `out`.

    The same call after a kill continues at the first unfinished shard; a finished cache that already holds what is
    asked is opened as it is; a hook that it lacks is added over the stored sequences; more tokens make it grow.

    Args:
        progress: called with (rows done, rows in all) after every forward batch.

    Raises:
        CacheMismatch: `out` holds something else; the message lists the differences.
        CacheLocked: another process is writing there.
        DiskTooSmall: the disk has less room than the shards will take.
        DatasetError, ModelError, NonFiniteActivations: see there; what is finished stays and is not redone.
    """
    cache = harvest_share(model, source, config, out, Worker(), progress=progress)
    assert cache is not None, "a single worker owes nothing to others"
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
    """`harvest` by one of several processes on one cache; whichever writes the last shard finalises.

    Returns None while other workers owe shards. CacheLocked: another process is the same worker, or one with more.
    """
    root = Path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    times, started = HarvestTimes(), time.perf_counter()
    journal, plan = claim_slot(root, worker.index, partial(_begun, root, model, source, config, widths, worker))
    with journal:
        times.pack = time.perf_counter() - started
        hooks = _wanted_hooks(plan, widths)
        cache = finished_cache(root, plan, hooks)
        if cache is not None:
            release_slot(root, journal)
            return cache
        write_atomically(root / ORIGIN, [json.dumps(origin_of(model, source)).encode()])
        done = merge_records(read_journals(root))
        share = [
            owed
            for owed in missing_shards(plan, done, hooks)
            if shard_number(plan, *owed[:2]) % worker.count == worker.index
        ]
        harvester = Harvester(root, plan, model, share, done, config, journal.append, times, progress)
        harvester.warn_of_other_compute()
        harvester.run()
        cache = _finalised(root, hooks, times)
        times.total = time.perf_counter() - started
        _write_log(root, model, times)
        release_slot(root, journal)
    logger.info(times.described())
    return cache


def dry_run(model: LanguageModel, source: Source, config: HarvestConfig, out: str | Path) -> Estimate:
    """What `harvest` has still to do there; runs two short forward passes and writes nothing.

    Without config.tokens the dataset is packed to count it. Raises CacheMismatch for another cache, as `harvest` does.
    """
    root = Path(out)
    widths = model.hook_widths(config.hook_names)
    refuse_foreign_folder(root)
    held = read_plan(root)
    config = _with_codec(root, held, model, config)
    if held is not None:
        refuse_other_identity(root, held, identity_of(model, source, config))
    hooks = _specs(widths, config.dtype)
    sequences = (
        count_sequences(model, source, config) if config.tokens is None else config.tokens // config.context_size
    )
    n_rows = sequences * config.context_size - finished_rows(root, held, hooks)
    rate = tokens_per_second(model, config.hook_names, config.context_size, config.batch_sequences)
    return Estimate(
        n_rows=n_rows,
        n_bytes=expected_bytes(n_rows, hooks, config.codec),
        free_bytes=free_bytes(root),
        seconds=n_rows / rate,
    )


def _begun(
    root: Path, model: LanguageModel, source: Source, config: HarvestConfig, widths: dict[str, int], worker: Worker
) -> Plan:
    """Settle the plan; what killed writers left goes, if nobody writes."""
    others = active_writers(root) - {worker.index}
    if any(slot >= worker.count for slot in others):
        raise CacheLocked(f"{root}: {len(others)} workers write this cache; wait for them, or join with --worker i/n")
    held = read_plan(root)
    config = _with_codec(root, held, model, config)
    if held is None and config.tokens is not None:
        refuse_small_disk(root, expected_bytes(config.tokens, _specs(widths, config.dtype), config.codec))
    sequences = packed_sequences(model, source, config)
    plan = settle_plan(root, identity_of(model, source, config), sequences, config, max(widths.values()))
    if not others:
        remove_leftovers(root)
    return plan


def _with_codec(root: Path, held: Plan | None, model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The config with its codec settled: the one that is there, else measured."""
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
    """The asked hooks, and those that grow with the cache."""
    return list(dict.fromkeys([*_specs(widths, plan.identity["dtype"]), *plan.hooks]))


def _finalised(root: Path, hooks: Sequence[HookSpec], times: HarvestTimes) -> Cache | None:
    """The finished cache, unless other workers owe shards; one process at a time."""
    started = time.perf_counter()
    with exclusive(root):
        plan, records = read_plan(root), read_journals(root)
        assert plan is not None, "settled before the first shard"
        owed = len(list(missing_shards(plan, merge_records(records), hooks)))
        if owed:
            logger.info("%s: this worker is done; other workers owe %d shards, the last of them finalises", root, owed)
            return None
        if finished_cache(root, plan, hooks) is None:
            finalise(root, plan, records)
    times.finalise = time.perf_counter() - started
    return open_cache(root)


def _write_log(root: Path, model: LanguageModel, times: HarvestTimes) -> None:
    """What may differ between equal caches: when, where and how fast."""
    values = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": str(model.device),
        "seconds": asdict(times),
    }
    write_atomically(root / "log" / f"harvest-{time.time_ns()}.json", [json.dumps(values, indent=1).encode()])
