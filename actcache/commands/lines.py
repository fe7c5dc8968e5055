"""What the commands print about a cache: JSON values for programs, lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actcache.flow import SPLITS
from actcache.format.manifest import stored_files
from actcache.store.cache import Cache

if TYPE_CHECKING:
    from actcache.harvesting.estimate import Estimate


def estimate_line(found: Estimate) -> str:
    """The rows and bytes that a harvest would take, and the seconds in the model if they were measured."""
    time_left = "" if found.seconds is None else f", about {found.seconds:,.0f} s in the model"
    free = f"{found.free_bytes / 1e9:,.3g} GB free"
    return f"to harvest: {found.n_rows:,} rows, at most about {found.n_bytes / 1e9:,.3g} GB ({free}){time_left}"


def cache_facts(cache: Cache) -> dict[str, Any]:
    """What a cache holds, and where it comes from, as JSON values."""
    identity = cache.identity
    return {
        "path": str(cache.path),
        "fingerprint": cache.fingerprint,
        "model": identity["model"],
        "dataset": identity["dataset"],
        "hooks": {name: cache.hook(name).d_in for name in cache.hook_names},
        "rows": {split: cache.n_rows(split) for split in SPLITS},
        "context_size": cache.context_size,
        "dtype": identity["dtype"],
        "codec": identity["codec"],
        "shard_rows": cache.manifest.shard_rows,
        "stored_bytes": sum(stored_files(cache.manifest).values()),
        "origin": cache.origin,
    }


def cache_lines(cache: Cache) -> list[str]:
    """The facts of a cache as lines for a person."""
    facts = cache_facts(cache)
    rows = ", ".join(f"{count:,} {split}" for split, count in facts["rows"].items())
    hooks = ", ".join(f"{name} [{d_in}]" for name, d_in in facts["hooks"].items())
    return [
        f"cache        {facts['path']} ({facts['fingerprint']})",
        f"model        {facts['model']['name']}",
        f"dataset      {facts['dataset']['name']}",
        f"hooks        {hooks}",
        f"rows         {rows}; {facts['context_size']} tokens a sequence",
        f"stored       {facts['stored_bytes']:,} bytes, {facts['dtype']}, {facts['codec']}",
    ]
