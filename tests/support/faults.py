"""Damage on disk, and everything that a reader can be given of a cache: shared by the tests of faults in reading."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from actcache.errors import ActcacheError
from actcache.flow import SPLITS
from actcache.format.stats import ROW_FILTERS
from actcache.store.cache import Cache, open_cache

N_FLIPS = 120
SMALL = 200  # bytes; of a range up to this size every byte is damaged
Found = TypeVar("Found")


def flips(start: int, stop: int) -> list[tuple[int, int]]:
    """At least N_FLIPS different (byte, bit) of the bytes [start, stop), seeded; every byte of a small range."""
    rng = random.Random(f"{start}:{stop}")
    every = [(byte, rng.randrange(8)) for byte in range(start, stop)] if stop - start <= SMALL else []
    some = [(start + bit // 8, bit % 8) for bit in rng.sample(range(8 * (stop - start)), N_FLIPS)]
    return list(dict.fromkeys([*every, *some]))


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """One bit of the file is the other way round; its size, inode and every other byte stay as they are."""
    with open(path, "r+b", buffering=0) as file:
        whole = os.pread(file.fileno(), 1, byte)
        os.pwrite(file.fileno(), bytes([whole[0] ^ 1 << bit]), byte)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), whole, byte)


@contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Whatever happens to these files, they are as they were afterwards."""
    contents = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)


@contextmanager
def kept_folder(folder: Path, aside: Path) -> Iterator[None]:
    """Whatever happens in or to this folder, it is as it was afterwards; a copy lies `aside` meanwhile."""
    shutil.copytree(folder, aside)
    try:
        yield
    finally:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        aside.rename(folder)


def renames_that_stop(n: int) -> Callable[..., None]:
    """An os.replace that works n times. Then it raises KeyboardInterrupt, as if the process ended there."""
    left, replace = [n], os.replace

    def replace_or_stop(*paths: str | Path, **folders: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(*paths, **folders)

    return replace_or_stop


def answer(read: Callable[[], Found]) -> Found | ActcacheError:
    """What `read` gives, or the error of ours that it raises; every other error goes through."""
    try:
        return read()
    except ActcacheError as error:
        return error


def reads(cache: Cache) -> dict[str, Callable[[], bytes]]:
    """Name -> what a reader is given, as bytes: opening, and every row, token, sequence, document and statistic."""
    found: dict[str, Callable[[], bytes]] = {"open": lambda: open_cache(cache.path).fingerprint.encode()}
    for split in SPLITS:
        rows = cache.n_rows(split)
        for hook in cache.hook_names:
            found[f"{split} {hook}"] = lambda s=split, h=hook, n=rows: _bits(cache.hook_reader(s, h).read(0, n))
            for kind in ROW_FILTERS:
                found[f"{split} {hook} {kind}"] = lambda s=split, h=hook, k=kind: _statistics(cache, s, h, k)
        for name in ("id", "sequence", "position"):
            found[f"{split} {name}"] = lambda s=split, t=name, n=rows: cache.token_reader(s, t).read(0, n).tobytes()
        found[f"{split} sequences"] = lambda s=split: cache.sequences(s).tobytes()
        found[f"{split} documents"] = lambda s=split: cache.documents(s).tobytes()
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Everything that a reader can be given of the cache. Raises what reading raises."""
    return {name: read() for name, read in reads(open_cache(path)).items() if name != "open"}


def _bits(x: torch.Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


def _statistics(cache: Cache, split: str, hook_name: str, row_filter: str) -> bytes:
    """Every number; JSON keeps every bit of a float."""
    return json.dumps(cache.statistics(hook_name, split=split, row_filter=row_filter).to_json()).encode()


class Opened:
    """Which files are opened, by Python's own audit events. Make one of it: an audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self._paths: set[str] | None = None
        sys.addaudithook(self._hear)

    def by(self, read: Callable[[], object]) -> set[str]:
        """Absolute paths of the files that `read` opens."""
        paths: set[str] = set()
        self._paths = paths
        read()
        self._paths = None
        return paths

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and self._paths is not None and isinstance(arguments[0], str | os.PathLike):
            self._paths.add(os.path.abspath(arguments[0]))
