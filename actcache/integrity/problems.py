"""`Problem`: one thing that is wrong with a cache; and `StoredArray`, which finds the problems of an array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actcache.errors import CorruptShard
from actcache.flow import SPLITS
from actcache.format.arrays import ArraySpec, sequence_arrays
from actcache.format.manifest import aligned_arrays
from actcache.format.paths import STORE, shard_key
from actcache.store.cache import Cache
from actcache.store.kept import CacheFiles
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import ShardFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where.

    path: the file. split, array, shard: what the file holds. array is a path below the split; for statistics it is the
    name of the hook. chunk: number of the chunk within the shard; None if the whole file is wrong. rows: (start, stop)
    within the split; for sequence arrays these are numbers of sequences. message: what is wrong.
    """

    path: str
    split: str | None = None
    array: str | None = None
    shard: int | None = None
    chunk: int | None = None
    rows: tuple[int, int] | None = None
    message: str

    def __str__(self) -> str:
        shard = [] if self.shard is None else [f"shard {self.shard}"]
        chunk = [] if self.chunk is None else [f"chunk {self.chunk}"]
        rows = [] if self.rows is None else [f"rows {self.rows[0]} to {self.rows[1]}"]
        where = ", ".join([*shard, *chunk, *rows])
        return ": ".join([self.path, *([where] if where else []), self.message])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """One sharded array of a split. files: those of the split. reader: reads the array."""

    files: CacheFiles
    split: str
    array: ArraySpec
    shard_rows: int
    reader: ArrayReader

    @property
    def n_shards(self) -> int:
        """Number of shards of the array."""
        return len(self.reader.records)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.files.path(shard_key(self.array, shard))

    def rows(self, shard: int) -> tuple[int, int]:
        """(start, stop): the rows of a shard, counted within the split."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.reader.n_rows)

    def problems(self, shard: int) -> Iterator[Problem | None]:
        """For each chunk of a shard its problem, or None. A problem of the whole file comes in place of the first.

        Raises OSError if the file cannot be read, for then nobody can tell.
        """
        n_chunks = len(self.reader.records[shard].checksums)
        problem = partial(Problem, path=str(self.path(shard)), split=self.split, array=self.array.path, shard=shard)
        try:
            self.files.read(shard_key(self.array, shard), partial(self._mapped, shard))
        except CorruptShard as error:
            yield problem(rows=self.rows(shard), message=error.what)
            yield from [None] * (n_chunks - 1)
            return
        buffer = self.reader.empty(1)
        for number in range(n_chunks):
            chunk = shard * self._chunks_per_shard + number
            try:
                self.reader.decode_into(chunk, buffer)
            except CorruptShard as error:
                start = chunk * self.array.chunk_rows
                rows = (start, start + self.reader.rows_of(chunk))
                yield problem(chunk=number, rows=rows, message=error.what)
            else:
                yield None

    def _mapped(self, shard: int, path: Path) -> ShardFile:
        return ShardFile(path, self._chunks_per_shard, self.reader.records[shard].n_bytes)

    @property
    def _chunks_per_shard(self) -> int:
        return self.shard_rows // self.array.chunk_rows


def stored_arrays(cache: Cache) -> list[StoredArray]:
    """Every sharded array of both splits."""
    return [stored for split in SPLITS for stored in _stored_arrays(cache, split)]


def _stored_arrays(cache: Cache, split: str) -> Iterator[StoredArray]:
    files, shard_rows = cache.files.below(f"{STORE}/{split}"), cache.manifest.shard_rows
    for array in aligned_arrays(cache.manifest):
        reader = cache.reader(split, array)
        yield StoredArray(files=files, split=split, array=array, shard_rows=shard_rows, reader=reader)
    for name, array in zip(("id", "document"), sequence_arrays(cache.context_size), strict=True):
        reader = cache.sequence_reader(split, name)
        yield StoredArray(files=files, split=split, array=array, shard_rows=array.chunk_rows, reader=reader)
