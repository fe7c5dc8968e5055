"""actcache: harvest a language model's activations once, read them back shuffled.

`open_cache` and `Loader` import no language model; `harvest` and `load_model` do, when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from actcache.cache import Cache, open_cache
from actcache.loader import Loader

if TYPE_CHECKING:
    from actcache.models import load_model
    from actcache.notebook import harvest

__all__ = ["Cache", "Loader", "harvest", "load_model", "open_cache"]

_LAZY = {"harvest": "actcache.notebook", "load_model": "actcache.models"}  # their modules import transformers


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
