"""A finished cache, opened for reading: its manifest, its statistics, its sequences and the readers of its arrays."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from actcache.arguments import local_path, one_of
from actcache.errors import CorruptShard, ManifestError
from actcache.files import NoFile, contents, file_bytes
from actcache.flow import SPLITS
from actcache.format.arrays import ArraySpec, hook_arrays, sequence_arrays, token_arrays
from actcache.format.codecs import codec
from actcache.format.manifest import Manifest, Plan, known_split, stored_files
from actcache.format.paths import CACHE_MANIFEST, KEPT, ORIGIN, PLAN, STORE, statistics_key
from actcache.format.records import HookSpec
from actcache.format.seal import MALFORMED, fingerprint, unseal
from actcache.format.stats import ROW_FILTERS, HookStatistics
from actcache.store.kept import CacheFiles, kept_fingerprints, refuse_another
from actcache.store.reader import ArrayReader, HookReader


class Cache:
    """A finished cache, made by `open_cache`. Threads and forked processes may share it.

    A split is "train" or "validation"; every method raises ConfigError for another one.

    It can be pickled: a process that gets it opens it by its path, and raises CacheMismatch if it is another one there.

    path: its folder. manifest: what manifest/cache.json holds. fingerprint: 16 hex digits that name this cache; ""
    where the manifest was not read from manifest/cache.json. files: where its files are.
    """

    def __init__(self, path: Path, manifest: Manifest, fingerprint: str):
        self.path, self.manifest, self.fingerprint = path, manifest, fingerprint
        self.files = CacheFiles(root=path, fingerprint=fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path.absolute(), self.fingerprint)

    @property
    def identity(self) -> dict[str, Any]:
        """Model, dataset, packing, dtype, codec, seed: everything that tells this cache from another."""
        return self.manifest.identity

    @property
    def origin(self) -> dict[str, Any]:
        """Where model and dataset were loaded from, as `read_origin` gives it."""
        return read_origin(self.path)

    @property
    def compute(self) -> dict[str, Any]:
        """How the activations of the first shard were computed: "device", "torch", "model_dtype", "batch_size", ..."""
        return next(shard.compute for split in SPLITS for shard in self.manifest.shards[split])

    @property
    def context_size(self) -> int:
        """Tokens in a sequence."""
        return self.identity["context_size"]

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of BOS, EOS, padding and the tokenizer's other special tokens."""
        return tuple(self.identity["special_token_ids"])

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Every hook of the cache."""
        return tuple(hook.hook_name for hook in self.manifest.hooks)

    def hook(self, hook_name: str) -> HookSpec:
        """Width and dtype of a hook.

        Raises CacheMismatch if the cache lacks it; the message lists the hooks there are.
        """
        return self.manifest.hook(hook_name)

    def n_rows(self, split: str = "train") -> int:
        """Rows of a split, one for each token; special tokens are included."""
        return self.manifest.n_rows(split)

    def reader(self, split: str, array: ArraySpec) -> ArrayReader:
        """A reader of an array of a split that has one entry for each row."""
        shards = self.manifest.shards[known_split(split)]
        return ArrayReader(
            self.files.below(f"{STORE}/{split}"),
            array,
            codec(self.identity["codec"]),
            [shard.arrays[array.path] for shard in shards],
            n_rows=self.n_rows(split),
            shard_rows=self.manifest.shard_rows,
        )

    def hook_reader(self, split: str, hook_name: str) -> HookReader:
        """A reader of the activations of one hook. Raises CacheMismatch if the cache lacks the hook."""
        hook = self.hook(hook_name)
        arrays = hook_arrays(hook, codec(self.identity["codec"]), self.manifest.chunk_rows)
        return HookReader(hook, [self.reader(split, array) for array in arrays])

    def token_reader(self, split: str, name: str) -> ArrayReader:
        """A reader of the "id", the "sequence" or the "position" of every row's token, int32.

        Raises ConfigError for another name.
        """
        arrays = {array.path.removeprefix("tokens/"): array for array in token_arrays(self.manifest.shard_rows)}
        return self.reader(split, arrays[one_of("cache", "name", name, arrays)])

    def sequences(self, split: str) -> Int32[np.ndarray, "sequence position"]:
        """Token ids of every packed sequence of a split, in order. Raises CorruptShard."""
        return self._sequences(split, "id")

    def documents(self, split: str) -> Int32[np.ndarray, "sequence position"]:
        """For every token of `sequences`, the index of its document in the dataset. Raises CorruptShard."""
        return self._sequences(split, "document")

    def statistics(
        self, hook_name: str, *, split: str = "train", row_filter: str = "no_special_tokens"
    ) -> HookStatistics:
        """Mean, variance, norms and geometric median of a hook's stored values, in float64.

        Args:
            hook_name: a hook of the cache.
            split: "train" or "validation".
            row_filter: "all", or "no_special_tokens" without the rows of special tokens.

        Raises:
            ConfigError: there is no such split or filter.
            CacheMismatch: the cache lacks the hook.
            ManifestError: the statistics are missing, damaged, or those of another cache.
            OSError: the file cannot be read.
        """
        hook = self.hook(hook_name)
        one_of("cache", "row_filter", row_filter, ROW_FILTERS)
        wanted = (self.n_rows(split), hook.d_in)
        return self.files.read(statistics_key(split, hook_name), partial(_statistics, row_filter, wanted))

    def sequence_reader(self, split: str, name: str) -> ArrayReader:
        """A reader of the packed sequences: their token "id"s, or for each token the index of its "document"."""
        return sequence_reader(self.files, self.manifest.plan, split, name)

    def _sequences(self, split: str, name: str) -> np.ndarray:
        reader = self.sequence_reader(split, name)
        return reader.read(0, reader.n_rows)


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache for reading; imports no language model.

    Raises:
        ManifestError: there is no cache, it is not finished, or its manifest is damaged or of another version.
        CorruptShard: a shard file is missing or has the wrong size.
        CacheMismatch: the cache was repaired meanwhile.
        OSError: a file cannot be read or looked at, which says nothing about its bytes.
    """
    cache = read_manifest(path)
    _check_identity(cache)
    for damage in wrong_files(cache):
        raise damage
    return cache


def _reopened(path: Path, fingerprint: str) -> Cache:
    """The cache that was pickled, also if it has grown since. Raises CacheMismatch if there is another one now."""
    cache = open_cache(path)
    if cache.fingerprint != fingerprint:
        cache = next((each for each in earlier_caches(cache) if each.fingerprint == fingerprint), cache)
    refuse_another(path, fingerprint, cache.fingerprint)
    return cache


def earlier_caches(cache: Cache) -> Iterator[Cache]:
    """The smaller caches that this one has grown from, if what growth replaced is still kept.

    Raises ManifestError for a kept manifest that is missing or damaged, OSError if one cannot be read.
    """
    for name in kept_fingerprints(cache.path):
        if name != cache.fingerprint:
            path = cache.path / KEPT / name / CACHE_MANIFEST
            try:
                yield _of_manifest(cache.path, path, contents(path))
            except NoFile as error:
                what, way_out = f"cannot be read ({error.strerror})", f"delete {path.parent.parent}"
                raise ManifestError(what, path=path, way_out=way_out) from error


def read_manifest(path: str | Path) -> Cache:
    """Open a cache by its manifest and look at no other file. Only a check of the whole cache needs this.

    Raises ManifestError if there is no cache, it is not finished, or its manifest cannot be trusted; OSError if it
    cannot be read.
    """
    root = local_path(path)
    try:
        sealed = contents(root / CACHE_MANIFEST)
    except NoFile as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise ManifestError(f"is no regular file ({error.strerror})", path=root / CACHE_MANIFEST) from error
        if file_bytes(root / PLAN) is not None:
            raise ManifestError("the harvest is unfinished", path=root, way_out="run the same command again") from None
        what, way_out = f"not a cache (no {CACHE_MANIFEST})", "make one with `actcache harvest`"
        raise ManifestError(what, path=root, way_out=way_out) from None
    return _of_manifest(root, root / CACHE_MANIFEST, sealed)


def _of_manifest(root: Path, path: Path, sealed: bytes) -> Cache:
    values = unseal(sealed, path)
    try:
        manifest = Manifest.from_json(values)
    except ManifestError as error:
        raise ManifestError(error.what, path=path) from error
    return Cache(root, manifest, fingerprint(sealed))


def read_origin(root: Path) -> dict[str, Any]:
    """{"model", "revision", "dataset"}: where the model and the dataset were loaded from.

    Two equal caches may have different origins. "dataset" holds the fields of a DatasetSource, or is None if the
    dataset was in memory. There are "adapter" and "adapter_revision" too if the model had one. Raises ManifestError if
    the file is missing or malformed, OSError if it cannot be read.
    """
    try:
        origin = json.loads(contents(root / ORIGIN))
        kinds = {"model": str | None, "revision": str | None, "dataset": dict | None}
        if "adapter" in origin:
            kinds |= {"adapter": str, "adapter_revision": str | None}
        fields = (origin["dataset"] or {}).values()
        if not all(isinstance(origin[name], kind) for name, kind in kinds.items()) or not all(
            isinstance(field, str | bool | None) for field in fields
        ):
            raise ValueError("a value is of another type")
        return {name: origin[name] for name in kinds}
    except (NoFile, *MALFORMED) as error:
        what = f"unreadable ({type(error).__name__})"
        raise ManifestError(what, path=root / ORIGIN, way_out="pass --model") from error


def sequence_reader(files: CacheFiles, plan: Plan, split: str, name: str) -> ArrayReader:
    """A reader of the packed sequences, which are stored before the first activation.

    Args:
        files: of the cache, finished or not.
        plan: its plan.
        split: "train" or "validation".
        name: "id" for token ids, "document" for the index of each token's document.

    Raises:
        ConfigError: there is no such split or array.
    """
    record = plan.sequences[known_split(split)]
    arrays = {array.path.removeprefix("sequences/"): array for array in sequence_arrays(plan.identity["context_size"])}
    array = arrays[one_of("cache", "name", name, arrays)]
    return ArrayReader(
        files.below(f"{STORE}/{split}"),
        array,
        codec(plan.identity["codec"]),
        record.arrays[array.path],
        n_rows=record.n_sequences,
        shard_rows=array.chunk_rows,
    )


def wrong_files(cache: Cache) -> Iterator[CorruptShard]:
    """An error for each shard file that is missing or has the wrong size. Raises OSError if that cannot be told.

    Reading a truncated file through a memory map kills the process (SIGBUS). Other Zarr readers read a missing shard as
    zeros.
    """
    files = cache.files.below(STORE)
    for key, n_bytes in stored_files(cache.manifest).items():
        if file_bytes(cache.path / STORE / key) != n_bytes:
            try:
                files.read(key, partial(_check_size, n_bytes, cache.path))
            except CorruptShard as damage:
                yield damage


def _check_size(n_bytes: int, root: Path, path: Path) -> None:
    size = file_bytes(path)
    if size != n_bytes:
        found = "is missing or no file" if size is None else f"is {size} bytes long"
        what, way_out = f"must be {n_bytes} bytes long, {found}", f"run `actcache verify {root}`"
        raise CorruptShard(what, path=path, way_out=way_out)


def _statistics(row_filter: str, wanted: tuple[int, int], path: Path) -> HookStatistics:
    try:
        values = unseal(contents(path), path)
        every, found = (HookStatistics.from_json(values[name]) for name in ("all", row_filter))
    except (NoFile, *MALFORMED) as error:
        what = f"cannot be read as statistics ({type(error).__name__}: {error})"
        raise ManifestError(what, path=path, way_out="run `actcache repair`") from error
    got = (every.n_rows, len(found.mean))
    if wanted != got or found.n_rows > every.n_rows:
        what = f"must be of (rows, d_in) = {wanted}, is of {got}"
        raise ManifestError(what, path=path, way_out="another cache's statistics?")
    return found


def _check_identity(cache: Cache) -> None:
    metadata = cache.path / STORE / "zarr.json"
    try:
        identity = json.loads(contents(metadata))["attributes"]["actcache"]
        same = identity == cache.identity
    except (NoFile, *MALFORMED) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise ManifestError(what, path=metadata, way_out="run `actcache repair`") from error
    if not same:
        raise ManifestError(f"{metadata}: says another identity than {CACHE_MANIFEST}; two caches were mixed")
