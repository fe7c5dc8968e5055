"""`verify`: reads every byte that a reader would trust, and compares it with the manifest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.buffer import cpu

from actcache.arguments import shown
from actcache.errors import CorruptShard, LocksMissing, ManifestError
from actcache.files import PARTIAL_SUFFIX, NoFile, contents, files_below, naming
from actcache.flow import SPLITS
from actcache.format.arrays import hook_arrays, token_arrays
from actcache.format.codecs import codec
from actcache.format.manifest import Plan, store_arrays, stored_files
from actcache.format.paths import CACHE_MANIFEST, MANIFEST, PLAN, STORE, partials_key, shard_key, statistics_key
from actcache.format.records import HookSpec, ShardRecord, merge_records
from actcache.format.seal import MALFORMED, unseal
from actcache.format.stats import ROW_FILTERS, HookStatistics
from actcache.integrity.problems import Problem, StoredArray, stored_arrays
from actcache.store.cache import Cache, read_manifest
from actcache.store.journal import active_writers, damaged_lines, read_journals
from actcache.store.shard import Shard
from actcache.store.statistics import checked_contents, merged_moments
from actcache.store.zarr_metadata import make_store, memory_store

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked. problems: what is wrong, empty for a sound cache. notes: what is odd but misleads no reader."""

    path: str
    n_chunks: int
    n_rows: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def verify(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Read a whole cache and compare it with its manifest. Every problem is listed, not only the first.

    Shard files are checked for their size, their index, and the checksum and decoding of every chunk. The token arrays
    must hold the tokens of the packed sequences. Partial statistics, statistics, every zarr.json, manifest/plan.json
    and the journals must be there, be sound, and agree with manifest/cache.json. Files that no manifest names are
    noted.

    Args:
        path: the folder of the cache.
        progress: called with (chunks done, chunks in all).

    Raises:
        ManifestError: manifest/cache.json cannot be trusted to tell what should be there.
        CacheMismatch: the cache has grown meanwhile.
        OSError: a file cannot be read, so nobody can tell whether it is sound.
    """
    with naming(Path(path)):
        cache = read_manifest(path)
        problems = (*check_files(cache, progress=progress), *_twin_problems(cache))
        if problems:
            cache.files.refuse_another()
        return VerifyReport(
            path=str(cache.path),
            n_chunks=sum(stored.reader.n_chunks for stored in stored_arrays(cache)),
            n_rows=sum(cache.n_rows(split) for split in SPLITS),
            problems=problems,
            notes=tuple(_strays(cache)),
        )


def check_files(cache: Cache, *, progress: Progress | None = None) -> tuple[Problem, ...]:
    """Every problem of a cache except those of manifest/plan.json and of the journals."""
    problems = _chunk_problems(cache, progress)
    problems += partials_problems(cache)
    problems += statistics_problems(cache)
    problems += metadata_problems(cache)
    problems += token_problems(cache)
    return tuple(problems)


def is_growing(cache: Cache, plan: Plan) -> bool:
    """Whether the plan is that of a growth of the cache which is unfinished."""
    return cache.files.are_kept and sum(map(plan.n_rows, SPLITS)) > sum(map(cache.n_rows, SPLITS))


def agrees(line: ShardRecord | None, shard: ShardRecord) -> bool:
    """Whether a journal's record of a shard gives each file the size and checksum that manifest/cache.json gives it."""
    return (
        line is not None
        and (line.first_token, line.n_rows) == (shard.first_token, shard.n_rows)
        and all(line.arrays.get(path) == array for path, array in shard.arrays.items())
        and all(line.partials.get(key) == checksum for key, checksum in shard.partials.items())
    )


def zarr_files(cache: Cache, *, native: Collection[str] = ()) -> dict[str, Any]:
    """For every zarr.json that the manifest implies: path below acts.zarr -> buffer. native: as for `make_store`."""
    attributes, profile = {"actcache": cache.identity}, codec(cache.identity["codec"])
    return make_store(attributes, store_arrays(cache.manifest), profile, native=native)


def _chunk_problems(cache: Cache, progress: Progress | None) -> list[Problem]:
    arrays = stored_arrays(cache)
    n_chunks = sum(stored.reader.n_chunks for stored in arrays)
    problems: list[Problem] = []
    n_done = 0
    for stored in arrays:
        for shard in range(stored.n_shards):
            for problem in stored.problems(shard):
                problems += [problem] if problem else []
                n_done += 1
                if progress:
                    progress(n_done, n_chunks)
    return problems


def partials_problems(cache: Cache) -> Iterator[Problem]:
    """Partial statistics that are missing or damaged. Problem.array is the name of the hook."""
    for split in SPLITS:
        for shard in cache.manifest.shards[split]:
            for hook_name in cache.hook_names:
                key = partials_key(split, shard.index, hook_name)
                try:
                    cache.files.read(key, functools.partial(checked_contents, shard.partials.get(key)))
                except CorruptShard as error:
                    where = {"path": str(error.path), "split": split, "array": hook_name, "shard": shard.index}
                    yield Problem(**where, message=error.what)


def statistics_problems(cache: Cache) -> Iterator[Problem]:
    """Statistics that cannot be read or are not those of the partial ones. Problem.array is the name of the hook."""
    for split in SPLITS:
        for hook in cache.manifest.hooks:
            if message := _wrong_statistics(cache, split, hook):
                path = cache.files.path(statistics_key(split, hook.hook_name))
                yield Problem(path=str(path), split=split, array=hook.hook_name, message=message)


def _wrong_statistics(cache: Cache, split: str, hook: HookSpec) -> str | None:
    """What is wrong with the statistics of a hook, or None.

    The median is not checked. If partial statistics are damaged, only reading is checked.
    """
    try:
        found = {name: cache.statistics(hook.hook_name, split=split, row_filter=name) for name in ROW_FILTERS}
        moments = merged_moments(cache, split, hook)
    except ManifestError as error:
        return error.what
    except CorruptShard:  # listed as a problem of its own
        return None
    expected = {name: HookStatistics.of(moments[name], found[name].geometric_median) for name in ROW_FILTERS}
    same = all(expected[name].to_json() == found[name].to_json() for name in ROW_FILTERS)
    return None if same else "is not what the partial statistics of its shards come to"


def metadata_problems(cache: Cache) -> Iterator[Problem]:
    """Every zarr.json that does not describe its array. bfloat16 arrays may have either data type."""
    files = zarr_files(cache)
    native = functools.cache(lambda: zarr_files(cache, native=store_arrays(cache.manifest)))
    for key in sorted(files):
        node = key.removesuffix("zarr.json").rstrip("/")
        if message := _wrong_metadata(cache, node, files, native):
            split, _, array = node.partition("/")
            path = cache.files.path(f"{STORE}/{key}")
            yield Problem(path=str(path), split=split or None, array=array or None, message=message)


def _wrong_metadata(cache: Cache, node: str, files: dict[str, Any], native: Callable[[], dict[str, Any]]) -> str | None:
    key = f"{node}/zarr.json".removeprefix("/")
    try:
        found = cache.files.read(f"{STORE}/{key}", contents)
    except NoFile as error:
        return f"cannot be read ({error.strerror})"
    if found == files[key].to_bytes():
        return None
    try:  # from memory: what zarr cannot read then is the bytes' fault alone
        said = _node_metadata({"zarr.json": cpu.Buffer.from_bytes(found)}, "")
    except MALFORMED as error:
        return f"the metadata cannot be read by zarr ({type(error).__name__}: {error})"
    form = native() if said.get("data_type") == "bfloat16" else files
    wanted = _node_metadata(form, node)
    wrong = {key: said.get(key) for key in {**wanted, **said} if said.get(key) != wanted.get(key)}
    return f"must describe what the manifest says is stored, says {shown(wrong)}" if wrong else None


def _node_metadata(files: dict[str, Any], node: str) -> dict[str, Any]:
    """The metadata of a group or an array, as zarr reads it. files: path below the store -> buffer."""
    return zarr.open(memory_store(files), path=node, mode="r", zarr_format=3).metadata.to_dict()


def token_problems(cache: Cache) -> Iterator[Problem]:
    """Token arrays that do not hold the tokens of the packed sequences, scattered by the permutation of their shard."""
    names = {array.path for array in token_arrays(cache.manifest.shard_rows)}
    tokens = [stored for stored in stored_arrays(cache) if stored.array.path in names]
    for split in SPLITS:
        for shard in cache.manifest.shards[split]:
            try:
                expected = Shard.of(cache.files, cache.manifest.plan, split, shard.index, ()).token_columns
            except CorruptShard:  # listed as a problem of its own
                continue
            for stored, values in zip((s for s in tokens if s.split == split), expected, strict=True):
                yield from _wrong_tokens(stored, shard, values)


def _wrong_tokens(stored: StoredArray, shard: ShardRecord, expected: np.ndarray) -> Iterator[Problem]:
    start, stop = stored.rows(shard.index)
    try:
        wrong = np.flatnonzero(stored.reader.read(start, stop) != expected)
    except CorruptShard:  # listed as a problem of its own
        return
    if len(wrong):
        yield Problem(
            path=str(stored.path(shard.index)),
            split=stored.split,
            array=stored.array.path,
            shard=shard.index,
            rows=(start, stop),
            message=f"does not hold the tokens of its sequences, first in row {start + int(wrong[0])}",
        )


def _twin_problems(cache: Cache) -> Iterator[Problem]:
    """Problems of manifest/plan.json and of the journals, which must agree with manifest/cache.json."""
    path = cache.path / PLAN
    try:
        plan = Plan.from_json(unseal(contents(path), path))
        if replace(plan, hooks=()) != cache.manifest.plan and not is_growing(cache, plan):
            yield Problem(path=str(path), message=f"says another plan than {CACHE_MANIFEST}")
    except ManifestError as error:
        yield Problem(path=str(path), message=error.what)
    except NoFile as error:
        yield Problem(path=str(path), message=f"cannot be read ({error.strerror})")
    damaged = damaged_lines(cache.path)
    for journal, numbers in damaged.items():
        yield lost_lines(journal, numbers)
    if not damaged:
        yield from journal_problems(cache)


def lost_lines(journal: Path, numbers: Sequence[int]) -> Problem:
    """The problem of a journal with damaged lines."""
    return Problem(path=str(journal), message=f"cannot be read in line {', '.join(map(str, numbers))}")


def journal_problems(cache: Cache) -> Iterator[Problem]:
    """Shards that the journals describe in another way than manifest/cache.json, or not at all.

    Raises ManifestError.
    """
    lines = merge_records(read_journals(cache.path))
    for split in SPLITS:
        for shard in cache.manifest.shards[split]:
            line = lines.get((split, shard.index))
            grown = line is not None and line.n_rows > shard.n_rows and cache.files.are_kept
            if not grown and not agrees(line, shard):
                yield Problem(
                    path=str(cache.path / MANIFEST / "writer-00.jsonl"),
                    split=split,
                    shard=shard.index,
                    message=f"the journals do not say of the shard what {CACHE_MANIFEST} says",
                )


def _strays(cache: Cache) -> Iterator[str]:
    """A note for each file in acts.zarr that no manifest names. No reader looks at these files."""
    if cache.files.are_kept:
        yield f"{cache.path}: grows, and the harvest is unfinished; what was finished before is what was checked"
        return
    if _may_be_written(cache) or damaged_lines(cache.path):
        return  # a shard is written before the line that describes it
    known = {*stored_files(cache.manifest), *zarr_files(cache), *_journalled_files(cache)}
    for path in files_below(cache.path / STORE):
        if path.relative_to(cache.path / STORE).as_posix() in known:
            continue
        whose = "a killed writer left it" if path.name.endswith(PARTIAL_SUFFIX) else "no manifest speaks of it"
        yield f"{path}: {whose}"


def _may_be_written(cache: Cache) -> bool:
    """Whether processes write the cache; True too where the file system has no locks to tell by."""
    try:
        return bool(active_writers(cache.path))
    except LocksMissing:
        return True


def _journalled_files(cache: Cache) -> Iterator[str]:
    """Shard files that the journals name; hooks that are still being added have them."""
    profile = codec(cache.identity["codec"])
    for record in read_journals(cache.path):
        for hook in record.hooks:
            for array in hook_arrays(hook, profile, cache.manifest.chunk_rows):
                yield f"{record.split}/{shard_key(array, record.index)}"
