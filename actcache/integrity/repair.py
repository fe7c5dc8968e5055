"""`repair`: rebuilds the damaged files of a cache from sound files, or by running the model.

Each thing is rebuilt after the things that it is made of: packed sequences, tokens, activations, partial statistics,
statistics, Zarr's metadata. If a rebuilt file has the checksum in the manifest, nothing else changes. Activations may
come out with other bytes, because another machine or another torch computes them. Then their records become new lines
of a journal, and manifest/cache.json is written last. After a kill at any point, the same call does the rest.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actcache.arguments import local_path
from actcache.errors import CacheLocked, CacheMismatch, ManifestError
from actcache.files import naming, write_atomically
from actcache.flow import SPLITS
from actcache.format.arrays import token_arrays
from actcache.format.codecs import codec, crc32c
from actcache.format.identity import is_imported
from actcache.format.manifest import Manifest, store_arrays
from actcache.format.paths import CACHE_MANIFEST, MANIFEST, PLAN, STORE, partials_key, statistics_key
from actcache.format.records import HookSpec
from actcache.format.seal import seal
from actcache.format.stats import ROW_FILTERS, Moments, chunk_moments
from actcache.harvesting.finalise import finished_manifest
from actcache.harvesting.loop import redo
from actcache.harvesting.provenance import compute_of, other_compute, refuse_other_model
from actcache.integrity.expected import ExpectedCache, Key, settled, twins
from actcache.integrity.problems import Problem
from actcache.integrity.rebuild_sequences import RebuiltSequences, SourceOf, remembered_dataset
from actcache.integrity.verify import (
    check_files,
    journal_problems,
    lost_lines,
    metadata_problems,
    partials_problems,
    statistics_problems,
    token_problems,
    verify,
    zarr_files,
)
from actcache.models.language_model import LanguageModel
from actcache.store.cache import Cache, read_manifest
from actcache.store.journal import Journal, active_writers, salvage, writers
from actcache.store.kept import CacheFiles, forget
from actcache.store.locks import exclusive, may_write, remove_abandoned
from actcache.store.shard import Shard
from actcache.store.shard_file import chunk_slices, write_shard
from actcache.store.statistics import partials_payload, statistics_payload
from actcache.store.zarr_metadata import native_arrays
from actcache.text.sources import Source

ModelLoader = Callable[[Mapping[str, Any]], LanguageModel]
Progress = Callable[[str, int, int], None]

logger = logging.getLogger("actcache")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """found: what was wrong.

    redone: the files that were written again. problems: what is wrong now, none on a sound disk.
    """

    path: str
    found: tuple[Problem, ...]
    redone: tuple[str, ...]
    problems: tuple[Problem, ...]


def repair(
    path: str | Path,
    load_model: ModelLoader,
    *,
    dataset: str | Source | SourceOf | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Rebuild what `verify` calls damaged, and change nothing that is sound. An unfinished harvest is finished as well.

    Meanwhile no other process can write the cache. A sound cache that this user may only read stays as it is.

    Args:
        path: the folder of the cache.
        load_model: gives the model that was harvested. It is called only if activations or documents have to be made
            again. Its argument says how they were computed: "model_dtype", "backend", "attention", "device", ...
        dataset: where the dataset is now: a path, a hub name or a source, or a function that tells it if it is needed.
            None takes what the cache remembers, which for a stranger's cache is what the stranger chose.
        progress: called with (what is being done, done, in all).

    Returns:
        what was wrong, what was written again, and what is still wrong.

    Raises:
        ManifestError: no manifest file tells what the cache should hold.
        CacheMismatch: the model or the dataset is not that of the cache, or its manifest files belong to two caches.
        CacheLocked: another process writes the cache.
        LocksMissing: the file system has no locks.
        DatasetError: the dataset is needed and cannot be found or read.
        ModelError: the model is needed and cannot be loaded.
        OSError: a file cannot be read or written, or this user may not write the cache, which needs it. What cannot be
            read is not written again, for it may be sound.
    """
    root = local_path(path)
    with naming(root):
        where = partial(remembered_dataset, root) if dataset is None else dataset
        return _repaired(root, load_model, where, progress)


def _repaired(
    root: Path, load_model: ModelLoader, dataset: str | Source | SourceOf, progress: Progress | None
) -> RepairReport:
    if not (root / MANIFEST).is_dir():
        raise ManifestError(f"{root}: not a cache (no folder {MANIFEST}); make one with `actcache harvest`")
    if not may_write(root) and not verify(root, progress=_stage(progress, "verify")).problems:
        return RepairReport(path=str(root), found=(), redone=(), problems=())
    with exclusive(root, "repairs it"):
        if slots := active_writers(root):
            raise CacheLocked(f"{root}: other processes write this cache ({writers(root, slots)}); wait for them")
        plan, manifest, found = twins(root)
        found += [lost_lines(journal, numbers) for journal, numbers in salvage(root).items()]
        with Journal(root, what="repairs it") as journal:
            remove_abandoned(root)
            plan, manifest, outdated = settled(root, plan, manifest)
            if manifest:
                forget(root, read_manifest(root).fingerprint)  # what a kill has kept would hide what is repaired
            expected = ExpectedCache(root, plan, manifest, journal)
            found += [*outdated, *_Rebuilding(expected, load_model, dataset, progress).run()]
    report = verify(root, progress=_stage(progress, "verify"))
    redone = tuple(dict.fromkeys(expected.redone))
    return RepairReport(path=str(root), found=tuple(found), redone=redone, problems=report.problems)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return partial(progress, name) if progress else None


class _Rebuilding:
    """The steps of one repair, in their order."""

    def __init__(
        self,
        expected: ExpectedCache,
        load_model: ModelLoader,
        dataset: str | Source | SourceOf,
        progress: Progress | None,
    ):
        self._expected, self._root, self._plan = expected, expected.root, expected.plan
        self._load_model, self._progress = load_model, progress
        self._sequences = RebuiltSequences(expected, dataset, self._model)
        self._codec, self._shard_rows = codec(self._plan.identity["codec"]), self._plan.identity["shard_rows"]
        self._loaded: tuple[dict[str, Any], LanguageModel] | None = None

    def run(self) -> list[Problem]:
        """Rebuild what is damaged, each thing after the things that it is made of; returns what was wrong."""
        cache = self._expected.cache()
        found = [
            self._expected.in_words(problem)
            for problem in check_files(cache, progress=_stage(self._progress, "verify"))
        ]
        damaged = {problem.path for problem in found}
        found += journal_problems(cache) if self._expected.believed else []
        self._expected.put(self._root / PLAN, seal(self._plan.to_json()))
        self._sequences.restore_ids(damaged)
        self._restore_tokens(damaged | {problem.path for problem in token_problems(self._expected.cache())})
        self._restore_hooks(damaged)
        self._restore_partials()
        self._restore_manifest()
        self._sequences.restore_documents(damaged)  # last: nothing is made from documents
        return found

    # --- tokens ---

    def _restore_tokens(self, damaged: set[str]) -> None:
        """Rebuild damaged token arrays from the packed sequences. damaged: paths of the damaged files."""
        arrays = token_arrays(self._shard_rows)
        for key, held in self._expected.held.items():
            if not damaged.isdisjoint(str(self._expected.path(key, array.path)) for array in arrays):
                columns = Shard.of(CacheFiles(root=self._root), self._plan, *key, ()).token_columns
                written = {
                    array.path: write_shard(
                        self._expected.path(key, array.path),
                        array,
                        self._codec,
                        (column[rows] for rows in chunk_slices(array, held.n_rows)),
                        self._shard_rows,
                    )
                    for array, column in zip(arrays, columns, strict=True)
                    if str(self._expected.path(key, array.path)) in damaged
                }
                self._expected.record(self._expected.line(key, arrays=written))

    # --- activations and statistics ---

    def _restore_hooks(self, damaged: set[str]) -> None:
        """Rebuild damaged activations by the model, from the same forward batches.

        One run for each way of computing.
        """
        for compute, shards in self._damaged_hooks(damaged):
            model = self._model(compute)
            if other := other_compute(compute, compute_of(model, compute["batch_size"])):
                logger.warning("%s: was computed with another %s; bytes may differ in the last bit", self._root, other)
            redo(
                self._root,
                self._plan,
                model,
                [(*key, tuple(hooks), self._expected.revision(key)) for key, hooks in shards.items()],
                self._expected.held,
                compute["batch_size"],
                self._expected.record,
                progress=_stage(self._progress, "harvest"),
            )

    def _damaged_hooks(self, damaged: set[str]) -> Iterator[tuple[dict[str, Any], dict[Key, list[HookSpec]]]]:
        """For each way of computing: (how it computed, shard -> hooks with a damaged array)."""
        shards_by_compute: dict[str, dict[Key, list[HookSpec]]] = defaultdict(lambda: defaultdict(list))
        for key in self._expected.held:
            for hook in self._expected.hooks:
                if not damaged.isdisjoint(
                    str(self._expected.path(key, array)) for array in self._expected.arrays_of(hook)
                ):
                    compute = json.dumps(self._expected.compute(key, hook), sort_keys=True)
                    shards_by_compute[compute][key].append(hook)
        return ((json.loads(compute), shards) for compute, shards in shards_by_compute.items())

    def _model(self, compute: dict[str, Any]) -> LanguageModel:
        """The model, loaded as it ran then. Only the last one stays loaded. Raises CacheMismatch for another model."""
        if is_imported(self._plan.identity["model"]):
            raise CacheMismatch(
                f"{self._root}: was imported, and does not know which weights its activations are of; import it again "
                "into another folder"
            )
        how = {key: value for key, value in compute.items() if key != "batch_size"}
        if self._loaded is None or self._loaded[0] != how:
            self._loaded = None
            model = self._load_model(compute)
            refuse_other_model(self._root, self._plan.identity, model)
            self._loaded = how, model
        return self._loaded[1]

    def _restore_partials(self) -> None:
        """Rebuild damaged partial statistics from the stored rows, chunk by chunk as at the harvest."""
        cache = self._expected.cache()
        for problem in list(partials_problems(cache)):
            assert problem.split is not None, "a partial is of a hook of a shard of a split"
            assert problem.shard is not None, "a partial is of a hook of a shard of a split"
            key, hook = (problem.split, problem.shard), cache.hook(problem.array or "")
            payload = partials_payload(self._moments(cache, key, hook))
            name = partials_key(*key, hook.hook_name)
            write_atomically(self._root / name, [payload])
            self._expected.record(self._expected.line(key, hooks=(hook,), partials={name: crc32c(payload)}))

    def _moments(self, cache: Cache, key: Key, hook: HookSpec) -> dict[str, Moments]:
        """Row filter -> the moments of a hook in a shard, from its stored rows."""
        reader, ids = cache.hook_reader(key[0], hook.hook_name), cache.token_reader(key[0], "id")
        special = np.array(cache.special_token_ids, dtype=np.int32)
        moments = {row_filter: Moments.empty(hook.d_in) for row_filter in ROW_FILTERS}
        first = self._expected.held[key].first_token
        for rows in chunk_slices(reader.arrays[0].array, self._expected.held[key].n_rows):
            start, stop = first + rows.start, first + rows.stop
            is_special = np.isin(ids.read(start, stop), special)
            for row_filter, found in chunk_moments(reader.read_stored(start, stop), hook.dtype, is_special).items():
                moments[row_filter] = moments[row_filter].merge(found)
        return moments

    # --- what makes the cache finished ---

    def _restore_manifest(self) -> None:
        """Write statistics, Zarr's metadata, journals and, last, manifest/cache.json, each only if it is not right."""
        manifest = finished_manifest(self._plan, list(self._expected.held.values()))
        cache = Cache(self._root, manifest, fingerprint="")
        wrong = {problem.path for problem in statistics_problems(cache)}
        for split in SPLITS:
            for hook in manifest.hooks:
                path = self._root / statistics_key(split, hook.hook_name)
                if str(path) in wrong or self._has_changed(manifest, split, hook):
                    self._expected.put(path, statistics_payload(cache, split, hook))
        files = zarr_files(cache, native=native_arrays(self._root / STORE, store_arrays(manifest)))
        for problem in sorted(metadata_problems(cache), key=lambda problem: problem.path, reverse=True):
            key = Path(problem.path).relative_to(self._root / STORE).as_posix()
            self._expected.put(Path(problem.path), files[key].to_bytes())
        self._expected.restore_lines(manifest)
        if manifest != self._expected.believed:
            self._expected.put(self._root / CACHE_MANIFEST, seal(manifest.to_json()))

    def _has_changed(self, manifest: Manifest, split: str, hook: HookSpec) -> bool:
        """Whether the stored values may have changed since the statistics of a hook were made."""
        if self._expected.believed is None:
            return True
        arrays = self._expected.arrays_of(hook)
        return any(
            then.partials[name] != now.partials[name] or any(then.arrays[a] != now.arrays[a] for a in arrays)
            for then, now in zip(self._expected.believed.shards[split], manifest.shards[split], strict=True)
            for name in (partials_key(split, now.index, hook.hook_name),)
        )
