"""`MappedShards`: the shard files of one array, mapped when they are read. A process has one budget for all its arrays.

A mapped shard holds a descriptor: it is asked for the file's size before a chunk is read. So the budget depends on how
many descriptors the process may have.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence

from actcache.format.arrays import ArraySpec
from actcache.format.paths import shard_key
from actcache.format.records import ArrayRecord
from actcache.store.kept import CacheFiles
from actcache.store.shard_file import ShardFile

MOST_MAPPED = 4096  # Linux gives a process 65,530 maps in all (vm.max_map_count)
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what the system says when there are too many maps

# Every mapped shard of the process, the least recently used first: (number of the array, index of the shard) -> array.
# An array that is not used any more takes its maps along; what it has here goes as the least recently used.
_recent: OrderedDict[tuple[int, int], weakref.ref[MappedShards]] = OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count()


def _after_fork() -> None:
    """The child goes on with the maps of its parent, but a thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def mapped_shards_budget() -> int:
    """How many shards this process may keep mapped: half of its descriptors are for the rest of the program."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_MAPPED if descriptors == resource.RLIM_INFINITY else max(1, min(MOST_MAPPED, descriptors // 2))


class MappedShards:
    """The shard files of one array of a split, by index. Threads and forked processes may share it."""

    def __init__(self, files: CacheFiles, array: ArraySpec, records: Sequence[ArrayRecord], chunks_per_shard: int):
        """Nothing is mapped before it is asked for.

        Args:
            files: those of the split, below acts.zarr.
            array: the array.
            records: the record of each shard file, in order.
            chunks_per_shard: chunks of a whole shard.
        """
        self._files, self._array, self._records, self._chunks_per_shard = files, array, records, chunks_per_shard
        self._number = next(_numbers)
        self._mapped: dict[int, ShardFile] = {}  # after every step, each has its entry in _recent: a fork may come

    def __getitem__(self, index: int) -> ShardFile:
        """The shard, mapped. It stays mapped while anybody holds it. Raises CorruptShard and OSError as ShardFile."""
        key = (self._number, index)
        with _lock:
            if (file := self._mapped.get(index)) is not None:
                _recent.move_to_end(key)
                return file
        file = self._map(index)  # without the lock, for it may take a while; two threads may do it at once
        with _lock:
            _recent[key] = weakref.ref(self)
            _recent.move_to_end(key)
            file = self._mapped.setdefault(index, file)
            dropped = _drop(len(_recent) - mapped_shards_budget())
        del dropped  # unmaps, without the lock
        return file

    def __reduce__(self) -> tuple[type[MappedShards], tuple[CacheFiles, ArraySpec, Sequence[ArrayRecord], int]]:
        """Another process maps the files anew."""
        return MappedShards, (self._files, self._array, self._records, self._chunks_per_shard)

    def _map(self, index: int) -> ShardFile:
        n_chunks, n_bytes = self._chunks_per_shard, self._records[index].n_bytes
        while True:
            try:
                return self._files.read(shard_key(self._array, index), lambda path: ShardFile(path, n_chunks, n_bytes))
            except OSError as error:
                if error.errno not in SCARCE or not _recent:
                    raise
            with _lock:
                dropped = _drop((len(_recent) + 1) // 2)
            del dropped


def _drop(n_shards: int) -> list[ShardFile]:
    """Let go of the least recently used shards; they are unmapped when nobody holds them. The caller has the lock."""
    dropped: list[ShardFile] = []
    for number, index in list(itertools.islice(_recent, max(n_shards, 0))):
        owner = _recent[number, index]()
        if owner is not None and (file := owner._mapped.pop(index, None)) is not None:
            dropped.append(file)
        del _recent[number, index]
    return dropped
