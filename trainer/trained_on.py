"""The rows that a run was trained on, as config.json names them, and whether a cache holds them still.

A run depends on its hooks, the split and the rows that it read, and on no other hook of the cache. So the block `cache`
of config.json names these rows for each hook and split. When a cache grows, its whole shards stay as they are, and the
last, partial shard of a split is written anew with its rows in another order; the cache keeps the former one. What the
rows of the run were like on average, and how many there were, stands in the block too: a run of a cache that has grown
keeps to that.

Runs that were begun before this block named rows hold the fingerprint of the whole cache alone. Where that differs,
their scales and their total_variance can be compared with the statistics of the cache, to the last bit. Equal ones mean
that the values of the training rows are the same, for any other value would move a sum. That the order of the rows is
the same too, or that a larger cache has grown from the one they read, cannot be known.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.arguments import shown
from actcache.errors import CacheMismatch, ManifestError
from actcache.flow import SPLITS
from actcache.format.manifest import rows_fingerprint
from actcache.format.seal import MALFORMED
from actcache.store.cache import Cache, earlier_caches, open_cache
from trainer.config.presets import HookFacts
from trainer.config.settings import RowFilter, SAEConfig
from trainer.run_folder import CONFIG_FILE, finite, read_run_json, run_folders

logger = logging.getLogger("actcache")

State = Literal["same", "grown", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenHooks:
    """The hooks of a run as they were when it began, in place of a cache that has grown since.

    hooks: the facts of each hook, by name.
    """

    hooks: Mapping[str, HookFacts]

    @staticmethod
    def of(block: Mapping[str, Any]) -> "FrozenHooks":
        """The hooks of the block `cache` of a config.json."""
        names = HookFacts.__slots__
        return FrozenHooks(hooks={h: HookFacts(**{n: of[n] for n in names}) for h, of in block["hooks"].items()})

    def hook(self, hook_name: str) -> HookFacts:
        """The width of a hook. Raises CacheMismatch if the run has no such hook."""
        if hook_name not in self.hooks:
            raise CacheMismatch(f"train: the run was begun with {', '.join(self.hooks)}, got hook_name={hook_name!r}")
        return self.hooks[hook_name]

    def statistics(
        self, hook_name: str, *, split: str = "train", row_filter: RowFilter = "no_special_tokens"
    ) -> HookFacts:
        """The statistics of the rows that the run trains on, whatever the split and the filter."""
        return self.hook(hook_name)


def describer(cache: Cache, row_filter: RowFilter) -> Callable[[Iterable[str]], dict[str, Any]]:
    """Gives the block `cache` of config.json for the hooks of a run. Each hook is looked at once for all runs."""

    @functools.cache
    def described(hook_name: str) -> dict[str, Any]:
        splits = {split: _fingerprints(cache, split, hook_name, cache.n_rows(split)) for split in SPLITS}
        return asdict(_facts(cache, hook_name, row_filter)) | splits

    return lambda hook_names: {
        "path": str(cache.path.absolute()),
        "fingerprint": cache.fingerprint,
        "n_rows": {split: cache.n_rows(split) for split in SPLITS},
        "hooks": {hook_name: described(hook_name) for hook_name in hook_names},
    }


def _facts(cache: Cache, hook_name: str, row_filter: RowFilter) -> HookFacts:
    statistics = cache.statistics(hook_name, split="train", row_filter=row_filter)
    return HookFacts(
        d_in=cache.hook(hook_name).d_in,
        mean_norm=statistics.mean_norm,
        mean_square_norm=statistics.mean_square_norm,
        total_variance=statistics.total_variance,
    )


def _fingerprints(cache: Cache, split: str, hook_name: str, n_rows: int) -> dict[str, str]:
    """Of all rows, and of those of the whole shards among the first `n_rows`."""
    n_whole = n_rows // cache.manifest.shard_rows
    return {
        "rows": rows_fingerprint(cache.manifest, split, hook_name),
        "whole_shards": rows_fingerprint(cache.manifest, split, hook_name, n_whole),
    }


def names_rows(block: Mapping[str, Any]) -> bool:
    """Whether the block `cache` of a config.json names the rows of each hook. That of an older run does not."""
    return "hooks" in block


def rows_state(block: Mapping[str, Any], cache: Cache, split: str) -> State:
    """What became of the rows of a split that a run saw.

    Args:
        block: the block `cache` of its config.json, which names rows.
        cache: the cache.
        split: "train" or "validation".

    Returns:
        "same": the cache holds these rows, in this order. "grown": it has more rows, and all whole shards are the same.
        "other": these are other rows.

    Raises:
        CacheMismatch: the cache lacks a hook of the run.
    """
    n_rows = block["n_rows"][split]
    found = {hook_name: _fingerprints(cache, split, hook_name, n_rows) for hook_name in block["hooks"]}
    if all(found[hook_name]["rows"] == of[split]["rows"] for hook_name, of in block["hooks"].items()):
        return "same"
    whole = all(
        found[hook_name]["whole_shards"] == of[split]["whole_shards"] for hook_name, of in block["hooks"].items()
    )
    return "grown" if whole and cache.n_rows(split) > n_rows else "other"


def cache_with_rows(block: Mapping[str, Any], cache: Cache, splits: Iterable[str]) -> Cache | None:
    """The cache that holds the rows of a run in their order: this one, or one that it has grown from.

    Args:
        block: the block `cache` of its config.json, which names rows.
        cache: the cache.
        splits: the splits whose rows are to be the same.

    Returns:
        the cache; None if what growth replaced is not kept any more, or if it is another cache.
    """
    held = set(block["hooks"])
    for each in (cache, *earlier_caches(cache)):
        if held <= set(each.hook_names) and all(rows_state(block, each, split) == "same" for split in splits):
            return each
    return None


def cache_block(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The block `cache` of a run's config.json, checked as a whole; {} where there is none.

    Args:
        folder: of the run.
        config: what its config.json holds.

    Raises:
        ManifestError: the block holds something else than `describer` gives, or than an older program gave.
    """
    block = config.get("cache") or {}
    if not block:
        return {}
    _require(isinstance(block, dict), folder, "cache", "an object", block)
    _require(_is_path(block.get("path")), folder, "cache.path", "a path", block.get("path"))
    _require(isinstance(block.get("fingerprint"), str), folder, "cache.fingerprint", "a str", block.get("fingerprint"))
    if names_rows(block):
        counts, hooks = block.get("n_rows"), block["hooks"]
        are_counts = isinstance(counts, dict) and all(_is_count(counts.get(split)) for split in SPLITS)
        _require(are_counts, folder, "cache.n_rows", f"a count for {' and '.join(SPLITS)}", counts)
        _require(isinstance(hooks, dict) and len(hooks) > 0, folder, "cache.hooks", "an object of hooks", hooks)
        for hook_name, of in hooks.items():
            field = f"cache.hooks.{shown(hook_name)}"
            _require(_is_hook(of), folder, field, "what its rows were like, and their fingerprints", of)
    return block


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except ValueError:  # half a character
        return False


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_hook(of: object) -> bool:
    if not isinstance(of, dict) or not _is_count(of.get("d_in")):
        return False
    numbers = [of.get(name) for name in HookFacts.__slots__]
    parts = [of.get(split) for split in SPLITS]
    fingerprints = [part.get(key) for part in parts if isinstance(part, dict) for key in ("rows", "whole_shards")]
    return (
        all(finite(number) is not None for number in numbers)
        and len(fingerprints) == 2 * len(SPLITS)
        and all(isinstance(each, str) for each in fingerprints)
    )


def _require(is_so: bool, folder: Path, field: str, must: str, got: object) -> None:
    if not is_so:
        what = f"{field} must be {must}, got {shown(got)}"
        raise ManifestError(what, path=folder / CONFIG_FILE, way_out="restore the file, or pass --cache")


def remembered_cache(runs: Path) -> Path:
    """The cache that the first run of a folder was trained on, as its config.json says.

    Raises:
        ManifestError: no run there names a cache, or a config.json is malformed.
    """
    for folder in run_folders(runs):
        if block := cache_block(folder, read_run_json(folder, CONFIG_FILE)):
            return Path(block["path"])
    raise ManifestError(f"{runs} holds no run that remembers its cache; train first, or pass --cache or --model")


def open_trained_on(runs: Path) -> Cache:
    """Open the cache that a run, or the first run of a folder, remembers.

    It is that of every run there, or has grown from it: then a warning says by how much.

    Raises:
        ManifestError: no run there names a cache, or a config.json is malformed.
        CacheMismatch: a run was trained on other rows than the cache holds now.
        ManifestError, CorruptShard: as `open_cache`.
    """
    cache = open_cache(remembered_cache(runs))
    for folder in run_folders(runs):
        config = read_run_json(folder, CONFIG_FILE)
        if block := cache_block(folder, config):
            _check_rows(folder, config, block, cache)
    return cache


def _check_rows(run: Path, config: Mapping[str, Any], block: Mapping[str, Any], cache: Cache) -> None:
    if not names_rows(block):
        same = block.get("fingerprint") == cache.fingerprint or _has_the_statistics(config, cache)
        state: State = "same" if same else "other"
    else:
        state = rows_state(block, cache, "train")
    if state == "other":
        raise CacheMismatch(
            f"{run}: was trained on other rows than {cache.path} holds now (cache fingerprint "
            f"{block.get('fingerprint')} then, {cache.fingerprint} now); pass the cache that it was trained on, or "
            f"--cache {cache.path} to use this one all the same"
        )
    if names_rows(block) and (n_rows := cache.n_rows("validation")) != block["n_rows"]["validation"]:
        logger.warning(
            "%s: the validation split of %s has grown since, from %s to %s rows",
            *(run, cache.path, f"{block['n_rows']['validation']:,}", f"{n_rows:,}"),
        )


def _has_the_statistics(config: Mapping[str, Any], cache: Cache) -> bool:
    """Whether the scales and the variance of a run are to the bit what the statistics of the cache give."""
    try:
        sae = SAEConfig(**config["sae"])
        row_filter = "no_special_tokens" if config["train"]["exclude_special_tokens"] else "all"
        hooks = (*sae.inputs, *sae.outputs)
        facts = {hook.hook_name: _facts(cache, hook.hook_name, row_filter) for hook in hooks}
        scales = [facts[hook.hook_name].scale(sae.normalize_activations) for hook in hooks]
        variance = sum(facts[hook.hook_name].total_variance * hook.scale**2 for hook in sae.outputs)
    except MALFORMED:  # of a program that is neither this one nor an older one, or numbers that are too large
        return False
    return scales == [hook.scale for hook in hooks] and variance == sae.total_variance
