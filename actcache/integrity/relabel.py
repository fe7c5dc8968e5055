"""`relabel`: switches the data type that Zarr's metadata gives for bfloat16 arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actcache.arguments import typed
from actcache.errors import CacheMismatch, ManifestError
from actcache.files import NoFile, contents, write_atomically
from actcache.flow import SPLITS
from actcache.format.arrays import ArraySpec
from actcache.format.codecs import codec
from actcache.format.manifest import aligned_arrays
from actcache.format.paths import STORE
from actcache.store.cache import Cache, open_cache
from actcache.store.locks import exclusive
from actcache.store.zarr_metadata import make_array


def relabel(path: str | Path, native: bool) -> int:
    """Let Zarr's metadata call the bfloat16 arrays of a finished cache "bfloat16" (native) or "uint16".

    Only data_type and fill_value in zarr.json change; no shard does. actcache goes by the manifest, so it reads either
    form, and a mixture of both. Each file is replaced as a whole. After a kill, the same call does the rest. A cache
    that grows, gets a hook or is repaired keeps its form.

    Returns:
        the number of files that were changed.

    Raises:
        CacheMismatch: the cache has no bfloat16 array.
        ManifestError: as for `open_cache`; also if the cache grows, or if a zarr.json has neither form. Then nothing is
            changed.
        CorruptShard: as for `open_cache`.
        LocksMissing, OSError: as for `exclusive`, if a file has to change.
    """
    typed("relabel", "native", native, bool)
    cache = _opened(path)
    if not _stale(cache, native):
        return 0
    with exclusive(cache.path):  # a harvest that finalises would write these files too
        stale = _stale(_opened(path), native)
        for file, content in stale:
            write_atomically(file, [content])
    return len(stale)


def _opened(path: str | Path) -> Cache:
    """The cache. Raises ManifestError if it grows, for its zarr.json may be those of the larger one already."""
    cache = open_cache(path)
    if cache.files.are_kept:
        raise ManifestError(
            "its growth is unfinished", path=cache.path, way_out="run the same `actcache harvest` first"
        )
    return cache


def _stale(cache: Cache, native: bool) -> list[tuple[Path, bytes]]:
    """[(zarr.json, its new bytes)] of every bfloat16 array that is not as asked. Raises as `relabel` does."""
    arrays = [array for array in aligned_arrays(cache.manifest) if array.dtype == "bfloat16"]
    if not arrays:
        dtype = cache.identity["dtype"]
        raise CacheMismatch(f"relabel: needs bfloat16 arrays; {cache.path} stores {dtype}, which has one name only")
    return [change for split in SPLITS for array in arrays for change in _changes(cache, split, array, native)]


def _changes(cache: Cache, split: str, array: ArraySpec, native: bool) -> list[tuple[Path, bytes]]:
    """[(zarr.json of the array, its new bytes)]; empty if the file is as asked."""
    file = cache.path / STORE / split / array.path / "zarr.json"
    wanted, other = (_metadata(cache, split, array, form) for form in (native, not native))
    try:
        said = json.loads(contents(file))
    except (NoFile, ValueError, RecursionError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise ManifestError(what, path=file, way_out="run `actcache verify`") from error
    if said not in (json.loads(wanted), json.loads(other)):
        raise ManifestError(f"{file}: does not describe what the manifest says is stored; run `actcache verify`")
    return [] if said == json.loads(wanted) else [(file, wanted)]


def _metadata(cache: Cache, split: str, array: ArraySpec, native: bool) -> bytes:
    made: dict[str, Any] = {}
    profile, shard_rows = codec(cache.identity["codec"]), cache.manifest.shard_rows
    make_array(made, array.path, array, profile, n_rows=cache.n_rows(split), shard_rows=shard_rows, native=native)
    return made[f"{array.path}/zarr.json"].to_bytes()
