"""Audit a cache: every byte that a reader would trust is read and held against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from actcache.cache import STORE, Cache, read_manifest, sequence_reader, wrong_files
from actcache.codecs import codec
from actcache.errors import CorruptShard, ManifestError
from actcache.flow import SPLITS
from actcache.manifest import aligned_arrays
from actcache.order import shard_permutation
from actcache.reader import ArrayReader
from actcache.writer import make_array

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked and what is wrong; `problems` is empty for a sound cache."""

    path: str
    n_chunks: int
    n_rows: int
    problems: tuple[str, ...]


def verify(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check sizes, checksums, decoding, statistics, Zarr metadata, and that every row's token is the one it says.

    Every problem is listed, not only the first. progress: called with (chunks done, chunks in all).

    Raises ManifestError if there is no manifest that could be trusted to say what should be there.
    """
    cache = read_manifest(path)
    problems = list(wrong_files(cache))
    readers = [reader for split in SPLITS for reader in _readers(cache, split)]
    n_chunks = sum(reader.n_chunks for reader in readers)
    done = 0
    for reader in readers:
        for problem in _bad_chunks(reader):
            problems += [problem] if problem else []
            done += 1
            if progress:
                progress(done, n_chunks)
    problems += _bad_statistics(cache)
    problems += _bad_metadata(cache)
    if not problems:  # tokens of a damaged shard cannot be compared
        problems += [problem for split in SPLITS for problem in _bad_tokens(cache, split)]
    return VerifyReport(
        path=str(cache.path),
        n_chunks=n_chunks,
        n_rows=sum(cache.n_rows(split) for split in SPLITS),
        problems=tuple(dict.fromkeys(problems)),
    )


def _readers(cache: Cache, split: str) -> list[ArrayReader]:
    aligned = [cache.reader(split, array) for array in aligned_arrays(cache.manifest)]
    return aligned + [sequence_reader(cache.path, cache.manifest.plan, split, name) for name in ("id", "document")]


def _bad_chunks(reader: ArrayReader) -> Iterator[str | None]:
    buffer = reader.empty(1)
    for chunk in range(reader.n_chunks):
        try:
            reader.decode_into(chunk, buffer)
        except CorruptShard as error:
            yield str(error).split("; run `actcache verify`")[0]
        else:
            yield None


def _bad_statistics(cache: Cache) -> Iterator[str]:
    for split in SPLITS:
        for hook_name in cache.hook_names:
            try:
                cache.statistics(hook_name, split=split)
            except ManifestError as error:
                yield str(error)


def _bad_metadata(cache: Cache) -> Iterator[str]:
    """zarr.json of the root and of every row-aligned array as other Zarr readers see them; bfloat16 in either form."""
    try:
        group = zarr.open_group(cache.path / STORE, mode="r")
        if group.attrs.get("actcache") != cache.identity:
            yield f"{cache.path / STORE / 'zarr.json'}: says another identity than the manifest"
        for split in SPLITS:
            sizes = {"n_rows": cache.n_rows(split), "shard_rows": cache.manifest.shard_rows}
            for array in aligned_arrays(cache.manifest):
                path = f"{split}/{array.path}"
                said = group[path].metadata.to_dict()
                native = said.get("data_type") == "bfloat16"
                made = make_array({}, path, array, codec(cache.identity["codec"]), **sizes, native=native)
                wanted = made.metadata.to_dict()
                wrong = {key: said.get(key) for key in {**wanted, **said} if said.get(key) != wanted.get(key)}
                if wrong:
                    yield f"{path}: zarr.json must describe what the manifest says is stored, says {wrong}"
    except (KeyError, ValueError, TypeError, OSError, AttributeError) as error:
        yield f"{cache.path / STORE}: its metadata cannot be read by zarr ({type(error).__name__}: {error})"


def _bad_tokens(cache: Cache, split: str) -> Iterator[str]:
    """Rows whose token id, sequence or position is not what the permutation of their shard says."""
    sequences = sequence_reader(cache.path, cache.manifest.plan, split, "id")
    readers = [cache.token_reader(split, name) for name in ("id", "sequence", "position")]
    for shard in cache.manifest.shards[split]:
        flat = np.arange(shard.first_token, shard.first_token + shard.n_rows)
        sequence, position = np.divmod(flat, cache.context_size)
        token_ids = sequences.read(int(sequence[0]), int(sequence[-1]) + 1)[sequence - sequence[0], position]
        permutation = shard_permutation(shard.n_rows, seed=cache.identity["seed"], split=split, index=shard.index)
        stored = [reader.read(shard.first_token, shard.first_token + shard.n_rows) for reader in readers]
        for values, expected in zip(stored, (token_ids, sequence, position), strict=True):
            if not np.array_equal(values[permutation], expected):
                yield f"{split}: shard {shard.index} does not hold the tokens of its sequences"
                break
