"""`actcache import-cache` and `export-cache`: SAELens' caches become caches, and the reverse."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from actcache.commands.terminal import (
    CACHE,
    DATA,
    MODEL,
    OUTPUT,
    Bar,
    CachePath,
    NoLock,
    Out,
    locking,
    require_room_for,
    say,
)


def import_cache(
    source: Annotated[
        Path, typer.Argument(metavar="ARROW_DIR", help="The folder in which SAELens cached activations.")
    ],
    out: Out,
    model: Annotated[
        str,
        typer.Option(
            help="The model it was made with: a Hugging Face name or a local directory.", rich_help_panel=MODEL
        ),
    ],
    special_token: Annotated[
        list[int] | None,
        typer.Option(
            help="The id of BOS, EOS, ..., whose rows training leaves out. Repeat it for several.",
            rich_help_panel=DATA,
        ),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="How rows are compressed: lossless, fast, raw or int8.", rich_help_panel=CACHE)
    ] = "lossless",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Rows are stored as bfloat16, float16 or float32.", show_default="as they are", rich_help_panel=CACHE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows and of the holdout.", rich_help_panel=CACHE)] = 0,
    holdout: Annotated[
        float, typer.Option(help="Share of sequences that go to the validation split.", rich_help_panel=DATA)
    ] = 0.01,
    no_lock: NoLock = False,
) -> None:
    """Make a cache of one that SAELens wrote with its CacheActivationsRunner."""
    require_room_for("transformers")
    from actcache.commands.lines import cache_lines
    from actcache.interop.arrow_import import ArrowImport
    from actcache.interop.arrow_import import import_cache as imported

    special = tuple(special_token or ())
    config = ArrowImport(model=model, special_token_ids=special, codec=codec, dtype=dtype, seed=seed, holdout=holdout)
    with locking(out, no_lock), closing(Bar("import", "tok")) as progress:
        cache = imported(source, config, out, progress=progress)
    say(f"{out} is finished" if progress.touched else f"{out} was already there, nothing was done")
    say(*cache_lines(cache))


def export_cache(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="The folder to write.", rich_help_panel=OUTPUT)],
    split: Annotated[str, typer.Option(help="The split: train or validation.", rich_help_panel=DATA)] = "train",
) -> None:
    """Write a split for SAELens' training, as `new_cached_activations_path` of its CacheActivationsRunnerConfig."""
    from actcache.interop.arrow_export import export_cache as exported
    from actcache.store.cache import open_cache

    with closing(Bar("export", "tok")) as progress:
        written = exported(open_cache(cache), out, split=split, progress=progress)
    say(f"export-cache: {written}")
