"""The bfloat16 arrays of a finished cache under their own name in Zarr's metadata, or again as uint16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actcache.errors import CacheMismatch, ManifestError
from actcache.files import write_atomically
from actcache.flow import SPLITS
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import codec
from actcache.format.manifest import aligned_arrays
from actcache.format.paths import STORE
from actcache.store.cache import Cache, open_cache
from actcache.store.zarr_metadata import make_array


def relabel(path: str | Path, native: bool) -> int:
    """Have Zarr's metadata call the bfloat16 arrays of a finished cache "bfloat16" (native) or "uint16".

    Only data_type and fill_value of their zarr.json change; no shard does, and actcache itself reads either form, or a
    mixture: it goes by the manifest. Files are replaced whole, one by one: after a kill the same call does the rest.
    Returns the number of files changed, 0 if all are as asked.

    Raises:
        CacheMismatch: the cache has no bfloat16 array.
        ManifestError, CorruptShard: as `open_cache`, and if a zarr.json is of neither form; nothing is changed.
    """
    cache = open_cache(path)
    arrays = [array for array in aligned_arrays(cache.manifest) if array.dtype == "bfloat16"]
    if not arrays:
        dtype = cache.identity["dtype"]
        raise CacheMismatch(f"relabel: needs bfloat16 arrays; {cache.path} stores {dtype}, which has one name only")
    stale = [change for split in SPLITS for array in arrays for change in _changes(cache, split, array, native)]
    for file, content in stale:
        write_atomically(file, [content])
    return len(stale)


def _changes(cache: Cache, split: str, array: ArraySpec, native: bool) -> list[tuple[Path, bytes]]:
    """[(zarr.json of the array, its new bytes)], or nothing if it is as asked."""
    file = cache.path / STORE / split / array.path / "zarr.json"
    wanted, other = (_metadata(cache, split, array, form) for form in (native, not native))
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{file}: cannot be read ({type(error).__name__}); run `actcache verify`") from error
    if said not in (json.loads(wanted), json.loads(other)):
        raise ManifestError(f"{file}: does not describe what the manifest says is stored; run `actcache verify`")
    return [] if said == json.loads(wanted) else [(file, wanted)]


def _metadata(cache: Cache, split: str, array: ArraySpec, native: bool) -> bytes:
    made: dict[str, Any] = {}
    profile, shard_rows = codec(cache.identity["codec"]), cache.manifest.shard_rows
    make_array(made, array.path, array, profile, n_rows=cache.n_rows(split), shard_rows=shard_rows, native=native)
    return made[f"{array.path}/zarr.json"].to_bytes()
