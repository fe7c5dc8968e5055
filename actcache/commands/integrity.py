"""`actcache info`, `verify`, `repair` and `relabel`: what a cache holds, whether it is sound, and how it becomes so."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actcache.commands.named_sources import note_named
from actcache.commands.remembered import ModelOfCache, dataset_of_cache
from actcache.commands.terminal import (
    DATA,
    MODEL,
    Adapter,
    AllowPickle,
    Bar,
    CachePath,
    Device,
    Json,
    Model,
    NoLock,
    StageBar,
    TrustRemoteCode,
    locking,
    print_json,
    say,
)
from actcache.errors import ManifestError

if TYPE_CHECKING:
    from actcache.integrity.spot_check import SampleReport


def info(cache: CachePath, as_json: Json = False) -> None:
    """Say what a cache holds."""
    from actcache.commands.lines import cache_facts, cache_lines
    from actcache.store.cache import open_cache

    opened = open_cache(cache)
    if as_json:
        print_json(cache_facts(opened))
    else:
        say(*cache_lines(opened))


def verify(
    cache: CachePath,
    as_json: Json = False,
    sampled: Annotated[
        bool,
        typer.Option("--sample-model", help="Also run some sequences through the model again.", rich_help_panel=MODEL),
    ] = False,
    model: Model = None,
    adapter: Adapter = None,
    sequences: Annotated[
        int, typer.Option(help="How many sequences to run through the model.", rich_help_panel=MODEL)
    ] = 16,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Read every byte of a cache and hold it against the manifest. The exit code is 1 if anything is wrong."""
    from actcache.integrity.verify import verify as checked

    with closing(Bar("verify", "chunk")) as progress:
        found = checked(cache, progress=progress)
    remembered = ModelOfCache(
        model=model, adapter=adapter, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    sample = _sample(cache, remembered, sequences) if sampled and not found.problems else None
    if as_json:
        print_json({**asdict(found), "sample": asdict(sample) if sample else None})
    if sampled and sample is None:
        say(f"{cache}: not sampled, for it is damaged")
    problems = [*found.problems, *(sample.problems if sample else ())]
    for line in (*problems, *found.notes, *(sample.notes if sample else ())):
        say(str(line))
    if problems:
        raise ManifestError(f"{cache}: {len(problems)} problems found; `actcache repair` rebuilds what is damaged")
    say(f"{cache}: {found.n_rows} rows in {found.n_chunks} chunks are sound")
    if sample:
        say(f"{cache}: {sample.n_rows} rows of {sample.n_sequences} sequences are what the model gives")


def _sample(root: Path, model: ModelOfCache, sequences: int) -> SampleReport:
    from actcache.integrity.spot_check import sample_model
    from actcache.store.cache import open_cache

    opened = open_cache(root)
    return sample_model(opened, model.load(root, opened.compute), sequences)


def repair(
    cache: CachePath,
    model: Model = None,
    adapter: Adapter = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Where the dataset is now.", show_default="as the cache remembers", rich_help_panel=DATA),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    no_lock: NoLock = False,
) -> None:
    """Rebuild what is damaged and nothing else. The model is loaded only if activations are damaged."""
    from actcache.integrity.repair import repair as repaired

    remembered = ModelOfCache(
        model=model, adapter=adapter, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    with locking(cache, no_lock), closing(StageBar()) as progress:
        load_model = partial(remembered.load, cache)
        done = repaired(cache, load_model, dataset=dataset or partial(dataset_of_cache, cache), progress=progress)
    if dataset is not None:
        note_named("dataset", dataset, None)
    for problem in done.found:
        say(str(problem))
    for path in done.redone:
        say(f"{path}: written anew")
    for problem in done.problems:
        say(f"still wrong: {problem}")
    if done.problems:
        raise ManifestError(f"{cache}: {len(done.problems)} problems are left; is the disk sound?")
    say(f"{cache} is sound")


def relabel(
    cache: CachePath,
    native: Annotated[
        bool,
        typer.Option("--native-bf16/--no-native-bf16", help="Call bfloat16 arrays bfloat16, or uint16 again."),
    ],
    no_lock: NoLock = False,
) -> None:
    """Change what zarr.json says of bfloat16 arrays, for other Zarr readers. No shard is touched."""
    from actcache.integrity.relabel import relabel as relabelled

    with locking(cache, no_lock):
        say(f"{cache}: {relabelled(cache, native)} zarr.json files changed")
