"""actcache: harvest a language model's activations once, read them back shuffled.

Each name is imported when it is first asked for: zarr-python imports this package for its data type alone and must not
wait for torch, and `open_cache` and `Loader` need no language model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.cache import Cache, open_cache
    from actcache.loader import Loader
    from actcache.mixture import Mixture
    from actcache.models import load_model
    from actcache.notebook import harvest

__all__ = ["Cache", "Loader", "Mixture", "harvest", "load_model", "open_cache"]

_HOMES = {
    "Cache": "actcache.cache",
    "Loader": "actcache.loader",
    "Mixture": "actcache.mixture",
    "harvest": "actcache.notebook",
    "load_model": "actcache.models",
    "open_cache": "actcache.cache",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
