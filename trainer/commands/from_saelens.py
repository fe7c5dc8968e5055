"""`actcache train --from-saelens`: its table, what the cache says otherwise, and what the L0 at the end says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.arguments import shown
from actcache.commands.from_saelens import row_lines
from actcache.commands.terminal import say
from actcache.errors import ManifestError
from trainer.config.settings import TOPK_FAMILY

if TYPE_CHECKING:
    from actcache.interop.saelens_config import SAELensConfig
    from actcache.store.cache import Cache
    from trainer.config.sweep import SweepConfig
    from trainer.training.run import RunRecord

USUAL_L0 = (50, 200)  # of SAEs of language models whose latents people can name
FAR = 2  # as a factor


def saelens_sweep(path: Path, cache: Cache, single: Mapping[str, Any], shared: Mapping[str, Any]) -> SweepConfig:
    """The sweep that FILE asks for, fitted to the cache. It says what becomes of each field, and what is unlike there.

    Args:
        path: FILE.
        cache: the opened cache.
        single: settings of the SAE that options give, which win.
        shared: settings of the sweep that options give, likewise.
    """
    from actcache.interop.saelens_config import read_saelens_config
    from trainer.config.saelens import sweep_of

    config = read_saelens_config(path)
    say(*row_lines(config.rows("train")))
    own = {name: shared[name] for name in ("tokens", "batch_tokens") if name in shared}
    sweep = sweep_of(config, **own, settings=single)
    planned, n_steps = (math.ceil((s.train.tokens or 1) / s.train.batch_tokens) for s in (sweep_of(config), sweep))
    if n_steps < planned:
        say(f"{path}: asks for {planned:,} steps, here are {n_steps:,}; warm-ups and decay are as much shorter")
    say(*(f"{path}: {line}" for line in unlike(config, cache)))
    return fitted(replace(sweep, train=replace(sweep.train, **shared)), cache, shared)


def fitted(sweep: SweepConfig, cache: Cache, shared: Mapping[str, Any]) -> SweepConfig:
    """The sweep with as many epochs as its tokens need, as SAELens begins its dataset again, and says so.

    It evaluates nothing where the cache holds no row out. What options give stays.
    """
    train, n_rows = sweep.train, max(1, cache.n_rows("train"))
    if train.tokens is not None and train.tokens > n_rows and "epochs" not in shared:
        train = replace(train, epochs=math.ceil(train.tokens / n_rows))
        say(f"{cache.path}: {train.tokens:,} tokens of {n_rows:,} rows take {train.epochs} epochs")
    if cache.n_rows("validation") == 0 and "eval_every" not in shared:
        train = replace(train, eval_every=None)
    return replace(sweep, train=train)


def unlike(config: SAELensConfig, cache: Cache) -> Iterator[str]:
    """A line for each thing that a config and the cache say otherwise. Training goes by the cache."""
    from actcache.models.names import same_name
    from actcache.store.cache import read_origin

    origin: dict[str, Any] = {}
    with suppress(ManifestError, OSError):  # a cache without an origin knows less
        origin = read_origin(cache.path)
    model = cache.identity["model"]["name"]
    if "model_name" in config.given and not same_name(config["model_name"], model):
        yield f"model_name is {config['model_name']}, the cache is of {model}"
    pairs = {"dataset_path": (origin.get("dataset") or {}).get("path"), "context_size": cache.context_size}
    pairs["prepend_bos"] = cache.identity["prepend_bos"]
    if config.hook_name in cache.hook_names:
        pairs["d_in"] = cache.hook(config.hook_name).d_in
    for name, there in pairs.items():
        if name in config.given and there is not None and config[name] != there:
            yield f"{name} is {shown(config[name])}, the cache has {shown(there)}"
    if config.of_sae_alone:
        yield "is the cfg.json of an SAE, which does not say lr, batch or tokens: those are SAELens' defaults"


def l0_lines(records: Sequence[RunRecord]) -> Iterator[str]:
    """A line for each SAE whose L0 is far from the usual one, with the way out. The TopK family has what was asked."""
    low, high = USUAL_L0
    for record in records:
        l0 = record.metrics.get("validation/l0", record.metrics.get("metrics/l0"))
        if l0 is None or record.error or record.config.architecture in TOPK_FAMILY or low / FAR <= l0 <= high * FAR:
            continue
        d_in = record.config.d_in
        many = f"; a coefficient for the mean over d_in is {d_in} times as large here" if l0 > high else ""
        yield (
            f"{record.config.name}: L0 is {l0:,.1f}, and {low} to {high} is usual; "
            f"{'lower' if l0 < low else 'raise'} --sparsity-coefficient, which is "
            f"{record.config.sparsity_coefficient:g}, of a squared error that is summed over d_in={d_in}{many}"
        )
