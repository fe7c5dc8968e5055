"""`actcache train`: the SAEs of a sweep file, or one SAE given by options."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from tqdm import tqdm

from actcache.commands.terminal import (
    DATA,
    OUTPUT,
    TRAINING,
    CachePath,
    Device,
    Out,
    resolved_device,
    say,
    say_owner,
)
from actcache.errors import ActcacheError, ConfigError
from trainer.commands.evaluate import ExcludeSpecialTokens, KeepSpecialTokens, is_excluding
from trainer.commands.from_saelens import l0_lines, saelens_sweep
from trainer.config.presets import PRESETS
from trainer.config.settings import Architecture

if TYPE_CHECKING:
    from trainer.config.sweep import SweepConfig
    from trainer.training.sweep import SweepProgress

SINGLE = "One SAE without a sweep file"


def train(
    cache: CachePath,
    out: Out,
    sweep: Annotated[
        Path | None, typer.Argument(metavar="[SWEEP.yaml]", help="A sweep file: which SAEs to train.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Another way to name the sweep file.", rich_help_panel=TRAINING)
    ] = None,
    hook: Annotated[str | None, typer.Option(help="The hook that it reads.", rich_help_panel=SINGLE)] = None,
    hook_out: Annotated[
        str | None, typer.Option(help="The hook that a transcoder predicts.", rich_help_panel=SINGLE)
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(get_args(Architecture))}.", show_default="topk", rich_help_panel=SINGLE),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"The settings of a paper, one of {', '.join(PRESETS)}.", rich_help_panel=SINGLE),
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="How many latents it has.", rich_help_panel=SINGLE)] = None,
    k: Annotated[
        int | None, typer.Option(help="Active latents per token, for the TopK family.", rich_help_panel=SINGLE)
    ] = None,
    sparsity_coefficient: Annotated[
        float | None,
        typer.Option(help="Weight of the penalty, for all but the TopK family.", rich_help_panel=SINGLE),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="the preset's", rich_help_panel=SINGLE)
    ] = None,
    sae_seed: Annotated[
        int | None, typer.Option(help="Seed of the initial weights.", show_default="0", rich_help_panel=SINGLE)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Rows to train on.", show_default="every row of every epoch", rich_help_panel=DATA),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="How often a row may be read.", show_default="1", rich_help_panel=DATA)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Rows of a step.", show_default="4096", rich_help_panel=DATA)
    ] = None,
    exclude_special_tokens: ExcludeSpecialTokens = False,
    keep_special_tokens: KeepSpecialTokens = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the order of the data.", show_default="0", rich_help_panel=DATA)
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations on held-out rows.", show_default="never", rich_help_panel=TRAINING
        ),
    ] = None,
    logger: Annotated[
        list[str] | None,
        typer.Option(
            help="Log to wandb, trackio or tensorboard besides metrics.jsonl. Repeat it for several.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="GB to train in, in several passes over the cache if need be.",
            show_default="most of what is free",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, then stop.", rich_help_panel=TRAINING)
    ] = False,
    from_saelens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take what is not given here from a training config of SAELens: JSON, YAML or Python.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the SAEs of a sweep file, or one SAE given by options or by a config of SAELens.

    Each batch is read once, and every SAE is stepped on it.
    """
    from actcache.store.cache import open_cache
    from trainer.commands.lines import plan_lines
    from trainer.training.plan import measured_seconds
    from trainer.training.sweep import plan
    from trainer.training.sweep import train as trained

    single = {
        "hook_name": hook,
        "hook_name_out": hook_out,
        "architecture": architecture,
        "preset": preset,
        "d_sae": d_sae,
        "k": k,
        "sparsity_coefficient": sparsity_coefficient,
        "lr": lr,
        "seed": sae_seed,
    }
    shared = {
        "tokens": tokens,
        "epochs": epochs,
        "batch_tokens": batch_tokens,
        "exclude_special_tokens": is_excluding(exclude_special_tokens, keep_special_tokens),
        "seed": seed,
        "eval_every": eval_every,
    }
    single, shared = _given(single), _given(shared)
    if from_saelens is not None and (sweep or config) is not None:
        raise ConfigError(f"train: --from-saelens says what to train, got {sweep or config} too; leave one out")
    named = None if from_saelens is not None else _sweep_config(sweep or config, single, shared)
    opened, device = open_cache(cache), resolved_device(device)
    sweep_config = named or saelens_sweep(cast(Path, from_saelens), opened, single, shared)
    memory_bytes = None if memory is None else _bytes(memory)
    planned = plan(opened, sweep_config, out, device=device, memory_bytes=memory_bytes)
    say_owner(out)
    say(*plan_lines(planned))
    if dry_run:
        seconds = measured_seconds(planned.configs, planned.batch_tokens, device)
        return say(f"about {seconds:,.0f} s of steps, by one of each kind on random rows")
    more = {"device": device, "memory_bytes": memory_bytes, "loggers": tuple(logger or ())}
    with closing(_TrainBar()) as progress:
        records = trained(opened, sweep_config, out, **more, progress=progress)
    for record in records:
        say(f"{record.folder}: {record.error or 'finished'}")
    if from_saelens is not None:
        say(*l0_lines(records))
    failed = [record.config.name for record in records if record.error]
    if failed:
        raise ActcacheError(f"train: {len(failed)} of {len(records)} SAEs diverged: {', '.join(failed)}")


def _bytes(memory: float) -> int:
    if not 0 < memory < math.inf:
        raise ConfigError(f"train: --memory must be above 0 GB, got {memory}")
    return max(1, int(memory * 1e9))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _sweep_config(path: Path | None, single: dict[str, Any], shared: dict[str, Any]) -> SweepConfig:
    """The sweep of a file, or of the one SAE that options give. Shared settings given as options replace the file's."""
    from trainer.config.sweep import SweepConfig

    if path is None and "hook_name" not in single:
        raise ConfigError("train: name a sweep file, or give --hook with --d-sae and --k or --sparsity-coefficient")
    if path is None:
        named = {} if "architecture" in single or "preset" in single else {"architecture": "topk"}
        return SweepConfig.from_dict({**shared, "runs": [single | named]})
    if single:
        raise ConfigError(f"train: {path} says what to train; leave out the options for one SAE: {', '.join(single)}")
    config = SweepConfig.from_yaml(path)
    return replace(config, train=replace(config.train, **shared))


class _TrainBar:
    """A progress bar over steps. It shows tokens/s, SAE*tokens/s and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._bar = tqdm(desc="train", unit="step", file=sys.stderr, disable=None)

    def __call__(self, progress: SweepProgress) -> None:
        self._bar.total = progress.n_steps
        self._bar.set_postfix_str(
            f"{progress.n_saes} SAEs, {progress.n_tokens / progress.seconds:,.0f} tok/s, "
            f"{progress.n_sae_tokens / progress.seconds:,.0f} SAE*tok/s, "
            f"waiting {progress.wait_seconds / progress.seconds:.1%}",
            refresh=False,
        )
        self._bar.update(progress.step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
