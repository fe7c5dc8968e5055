"""What each run of a sweep is: its config, the rows it trains on, and what its config.json says.

A run that was begun keeps to the rows it began with, also if the cache has grown since.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actcache.arguments import shown
from actcache.errors import CacheMismatch, ManifestError
from actcache.files import is_file
from actcache.flow import SPLITS
from actcache.format.paths import KEPT
from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.run_folder import CHECKPOINTS, CONFIG_FILE, check_folder, is_over, read_run_json
from trainer.trained_on import FrozenHooks, cache_block, cache_with_rows, describer, names_rows, rows_state
from trainer.training.checkpoint import latest_checkpoint
from trainer.training.optimizer import check_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """One run of a sweep.

    Attributes:
        config: its SAE.
        cache: holds the rows it trains on, and no more.
        description: what its config.json says, or is to say.
    """

    config: SAEConfig
    cache: Cache
    description: dict[str, Any]


def resolve_runs(cache: Cache, config: SweepConfig, out: Path, epoch_rows: int) -> tuple[ResolvedRun, ...]:
    """Resolve every run of a sweep.

    Args:
        cache: the cache.
        config: the sweep.
        out: the folder of runs.
        epoch_rows: how many rows of the cache an epoch has (`Loader.n_rows`).

    Raises:
        ConfigError: a setting does not fit the cache, or the package of an optimizer is not installed.
        CacheMismatch: the folder of a run holds something else.
    """
    configs = config.expand(cache, config.train.training_tokens(epoch_rows))
    describe = describer(cache, config.train.row_filter)
    runs = []
    for number, each in enumerate(configs):
        check_optimizer(each)
        hooks = [hook.hook_name for hook in (*each.inputs, *each.outputs)]
        new = ResolvedRun(
            config=each, cache=cache, description=_description(each, config.train, describe(hooks), cache)
        )
        runs.append(_as_begun(new, replace(config, runs=config.runs[number : number + 1]), out / each.name))
    return tuple(runs)


def training_loader(
    cache: Cache,
    hook_names: tuple[str, ...],
    train_config: TrainConfig,
    start_step: int = 0,
    device: torch.device | str = "cpu",
) -> Loader:
    """The batches of training, from `start_step` on."""
    return Loader(
        cache,
        hook_names,
        batch_tokens=train_config.batch_tokens,
        seed=train_config.seed,
        epochs=train_config.epochs,
        start_step=start_step,
        exclude_special_tokens=train_config.exclude_special_tokens,
        device=device,
    )


def _as_begun(new: ResolvedRun, config: SweepConfig, folder: Path) -> ResolvedRun:
    """The run as it was begun in its folder, or the new one. `config` is the sweep with this run alone."""
    held = read_run_json(folder, CONFIG_FILE) if is_file(folder / CONFIG_FILE) else {}
    block = cache_block(folder, held)
    if not block:
        check_folder(folder, new.description)
        return new
    if not names_rows(block):  # its scales and its variance are compared with those of the cache: see trained_on
        check_folder(folder, {**new.description, "cache": block})
        return new
    state = rows_state(block, new.cache, "train")
    if state == "other":
        raise CacheMismatch(_other_rows(folder, block, new.cache))
    begun = new
    if state == "grown":
        (frozen,) = config.expand(FrozenHooks.of(block), _training_tokens(folder, held))
        begun = replace(new, config=frozen, description={**new.description, "sae": _plain(asdict(frozen))})
    begun = replace(begun, description={**begun.description, "cache": block})
    check_folder(folder, begun.description)
    if is_over(folder):
        return begun
    if latest_checkpoint(folder / CHECKPOINTS) is None:
        return new  # nothing was trained: it begins with the rows that there are now
    return _going_on(begun, folder)


def _training_tokens(folder: Path, held: Mapping[str, Any]) -> int:
    """How many tokens a run was to be trained on. Raises ManifestError if its config.json does not say so."""
    sae = held.get("sae")
    tokens = sae.get("training_tokens") if isinstance(sae, dict) else None
    if type(tokens) is not int or not 1 <= tokens < 2**63:
        what = f"sae.training_tokens must be a count, got {shown(tokens)}"
        raise ManifestError(what, path=folder / CONFIG_FILE, way_out="restore the file")
    return tokens


def _going_on(begun: ResolvedRun, folder: Path) -> ResolvedRun:
    """The run with the rows it goes on with. Raises CacheMismatch if the cache has them no longer in their order."""
    block, now = begun.description["cache"], begun.cache
    splits = SPLITS if begun.description["train"]["eval_every"] is not None else SPLITS[:1]
    cache = cache_with_rows(block, now, splits)
    if cache is None:
        then, found = (" and ".join(f"{rows[s]:,} {s}" for s in splits) for rows in (block["n_rows"], _n_rows(now)))
        raise CacheMismatch(
            f"{folder}: is unfinished, and {now.path} has changed since, from {then} rows to {found}; the former rows "
            f"are not in {now.path / KEPT} either, so that the run cannot go on; pass another --out or name to train "
            "it anew"
        )
    return replace(begun, cache=cache)


def _n_rows(cache: Cache) -> dict[str, int]:
    return {split: cache.n_rows(split) for split in SPLITS}


def _other_rows(folder: Path, block: Mapping[str, Any], cache: Cache) -> str:
    return (
        f"{folder}: holds another run: it was trained on other rows than {cache.path} holds (cache.fingerprint is "
        f"{block['fingerprint']!r} there, {cache.fingerprint!r} here); pass another --out or name"
    )


def _description(config: SAEConfig, train_config: TrainConfig, rows: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """What config.json says: all settings that decide how the run ends."""
    model = cache.identity["model"]
    return _plain(
        {
            "sae": asdict(config),
            "train": asdict(train_config),
            "cache": rows,
            "model": {"name": model["name"], "revision": model["revision"]},
        }
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are read back from JSON."""
    return json.loads(json.dumps(values))
