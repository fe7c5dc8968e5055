"""`actcache eval`, and the options that other commands share with it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actcache.commands.remembered import ModelOfCache
from actcache.commands.terminal import (
    DATA,
    Adapter,
    AllowPickle,
    Bar,
    Device,
    Json,
    Model,
    TrustRemoteCode,
    print_json,
    say,
    say_owner,
)
from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.store.cache import Cache

RememberedCache = Annotated[
    Path | None, typer.Option(help="The cache.", show_default="as the run remembers", rich_help_panel=DATA)
]
ExcludeSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--exclude-special-tokens",
        help="Leave out the rows of BOS, EOS, ... This is the default.",
        rich_help_panel=DATA,
    ),
]
KeepSpecialTokens = Annotated[
    bool, typer.Option("--keep-special-tokens", help="Keep the rows of BOS, EOS, ...", rich_help_panel=DATA)
]


def cache_of(cache: Path | None, runs: Path) -> Cache:
    """The cache that is named, or else that which a run, or the first run of a folder, remembers; that is said."""
    from actcache.store.cache import open_cache
    from trainer.trained_on import open_trained_on

    if cache is not None:
        return open_cache(cache)
    remembered = open_trained_on(runs)
    say(f"{runs}: was trained on the cache {remembered.path}")
    return remembered


def evaluate(
    runs: Annotated[Path, typer.Argument(metavar="RUN|RUNS", help="One run, or a folder of runs.")],
    cache: RememberedCache = None,
    model: Model = None,
    adapter: Adapter = None,
    exclude_special_tokens: ExcludeSpecialTokens = False,
    keep_special_tokens: KeepSpecialTokens = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Evaluate on the held-out split, with the model in the loop. Writes eval.json beside each run."""
    from trainer.commands.lines import evaluation_lines

    opened = cache_of(cache, runs)
    excludes = is_excluding(exclude_special_tokens, keep_special_tokens) is not False  # by default they are left out
    remembered = ModelOfCache(
        model=model, adapter=adapter, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    rows = evaluated(runs, opened, remembered, exclude_special_tokens=excludes)
    if as_json:
        print_json({"runs": rows})
    else:
        say(*evaluation_lines([*rows, *_diverged(runs)]))


def _diverged(runs: Path) -> list[dict[str, Any]]:
    """A row of the table for each run that diverged in training, and so was not evaluated."""
    from trainer.run_folder import read_runs

    failed = [run for run in read_runs(runs) if run.error is not None and not run.evaluation]
    return [{"name": run.name, "architecture": run.sae.get("architecture"), "diverged": True} for run in failed]


def is_excluding(exclude: bool, keep: bool) -> bool | None:
    """Whether rows of special tokens are left out; None if neither option was given.

    There are two options in place of one with two names, because --help would cut such names at 80 columns.
    """
    if exclude and keep:
        raise ConfigError("--exclude-special-tokens and --keep-special-tokens exclude each other; give one of them")
    return not keep if exclude or keep else None


def evaluated(
    runs: Path, cache: Cache, model: ModelOfCache, *, exclude_special_tokens: bool = True
) -> list[dict[str, Any]]:
    """Evaluate runs with a progress bar. Returns what each eval.json says.

    Args:
        runs: one run, or a folder of runs.
        cache: the cache to evaluate on.
        model: the language model; the SAEs run on its device.
        exclude_special_tokens: leave the rows of special tokens out.
    """
    from trainer.evaluation.evaluate import check_writable, evaluate_runs

    say_owner(runs)
    say_owner(cache.path)  # losses are kept there
    check_writable(runs)  # before the model is loaded
    language_model = model.load(cache.path, cache.compute)
    with closing(Bar("evaluate", "tok")) as progress:
        return evaluate_runs(
            runs, cache, language_model, exclude_special_tokens=exclude_special_tokens, progress=progress
        )
