"""What every command of the command line can be tried on: a cache, runs, exports and imports, all of them small."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from unittest import mock

from support.command_line import actcache
from support.damages import flip
from support.tiny_caches import HOOKS

# lines as they are typed behind `actcache`; `words_of` puts the places in
HOOK = f"--hook {HOOKS[2]}"
HARVEST = "harvest --dataset {texts} --context-size 16 --holdout 0.2 --batch-size 8 --device cpu"
FINISHED_HARVEST = f"{HARVEST} --model {{model}} {HOOK} --tokens 1024"
GROWING_HARVEST = f"{HARVEST} --model {{model}} {HOOK} --tokens 1600"
TRAIN = f"{HOOK} --d-sae 32 --tokens 512 --batch-tokens 128 --device cpu"
NAMES = f"--model-name tiny_llama --hook-name {HOOKS[2]}"

Places = dict[str, Path]


def make_places(root: Path, model: Path, texts: Path) -> Places:
    """Make all below a folder; what a line calls it -> where it is.

    {run} has features and their words, {wordless} features without words, {plain} no features. In {damaged} every shard
    of activations is damaged, and {growing} was killed at the end of its growth.
    """
    from actcache.store.cache import open_cache
    from trainer.features.build import build_features

    runs = root / "runs"
    places = {"root": root, "runs": runs, "model": model, "texts": texts}
    places |= {name: root / name for name in ("cache", "damaged", "growing", "arrow", "back", "sae", "imported")}
    places |= {"run": runs / "topk-k4-d32", "wordless": runs / "topk-k2-d32", "plain": runs / "topk-k1-d32"}
    lines = [
        f"{FINISHED_HARVEST} --out {{cache}}",
        *(f"train {{cache}} {TRAIN} --k {k} --out {{runs}}" for k in (4, 2, 1)),
        "eval {runs} --device cpu",
        "features {run} --device cpu",
        "export {run} --out {sae}",
        f"import {{sae}} --out {{imported}} {NAMES}",
        "export-cache {cache} --out {arrow}",
        "import-cache {arrow} --model {model} --out {back}",
    ]
    for line in lines:
        actcache(*words_of(line, places))
    build_features(places["wordless"], open_cache(places["cache"]))
    shutil.copytree(places["cache"], places["growing"])
    with mock.patch("actcache.harvesting.run.finalise", side_effect=KeyboardInterrupt):
        actcache(*words_of(f"{GROWING_HARVEST} --out {{growing}}", places), code=130)
    shutil.copytree(places["cache"], places["damaged"])
    for shard in places["damaged"].glob("acts.zarr/*/*/acts/c/*/0"):
        flip(shard)
    return places


def words_of(line: str, places: Places) -> list[str]:
    """The words of a line, with the places put in. No path may have a blank."""
    return line.format(**places).split()


def commands_of(lines: Collection[str]) -> set[str]:
    """The commands that some lines give."""
    return {line.split()[0] for line in lines}


def all_commands() -> set[str]:
    """Every command that there is, but `bench`, which touches no cache and no run."""
    import cli

    return {name for functions in cli.COMMANDS.values() for name in functions} - {"bench"}
