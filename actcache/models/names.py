"""One name for one model: TransformerLens' short names and former names of the hub stand for the name of today."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

# names from before the hub had owners; it leads them on to these
MOVED = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")}
MOVED |= {"openai-gpt": "openai-community/openai-gpt", "distilgpt2": "distilbert/distilgpt2"}


def same_name(one: str | None, other: str | None) -> bool:
    """Whether two names mean one model, such as "gpt2-small", "gpt2" and "openai-community/gpt2"."""
    return one == other or (one is not None and other is not None and canonical_name(one) == canonical_name(other))


def canonical_name(name: str) -> str:
    """The hub name of today that a name stands for; any other name is its own."""
    official = _aliases().get(name, name)
    return MOVED.get(official, official)


def short_name(name: str) -> str:
    """TransformerLens' own name of a model, as "gpt2-small", which Neuronpedia goes by; else the name without owner."""
    canonical = canonical_name(name)
    short = (alias for alias, official in _aliases().items() if MOVED.get(official, official) == canonical)
    return next(short, name.rstrip("/").rpartition("/")[2])


@functools.cache
def _aliases() -> dict[str, str]:
    """TransformerLens' short name -> the name that it loads. The table is read alone: all of it takes seconds."""
    package = importlib.util.find_spec("transformer_lens")
    assert package is not None, "TransformerLens is a dependency"
    assert package.origin is not None, "a package that is installed has a place"
    table = importlib.util.spec_from_file_location("_names", Path(package.origin).parent / "supported_models.py")
    assert table is not None, "a path was given"
    assert table.loader is not None, "the path ends in .py"
    module = importlib.util.module_from_spec(table)
    table.loader.exec_module(module)
    return {alias: official for official, aliases in module.MODEL_ALIASES.items() for alias in aliases}
