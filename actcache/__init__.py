"""actcache: harvest a language model's activations once, read them back shuffled.

Each name is imported when it is first asked for. zarr-python imports this package for its bfloat16 data type alone and
must not wait for torch. `open_cache` and `Loader` must not wait for transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache.lazy import lazily

if TYPE_CHECKING:
    from actcache.harvesting.notebook import harvest
    from actcache.loading.loader import Loader
    from actcache.loading.mixture import Mixture
    from actcache.models.live import live_model
    from actcache.models.load import load_model
    from actcache.store.cache import Cache, open_cache

__version__ = "0.1.0"
__all__ = ["Cache", "Loader", "Mixture", "harvest", "live_model", "load_model", "open_cache"]

__getattr__ = lazily(
    __name__,
    {
        "Cache": "actcache.store.cache",
        "Loader": "actcache.loading.loader",
        "Mixture": "actcache.loading.mixture",
        "harvest": "actcache.harvesting.notebook",
        "live_model": "actcache.models.live",
        "load_model": "actcache.models.load",
        "open_cache": "actcache.store.cache",
    },
)
