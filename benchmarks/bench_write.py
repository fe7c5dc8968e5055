"""Writing shards, from rows in memory to durable files: ours against the bare codec, the disk, and other writers.

Bounds: the codec alone, which encodes the same chunks and keeps nothing, and the disk alone, which writes the encoded
bytes and fsyncs. Others: zarr-python, tensorstore, and zarr-python on the zarrs pipeline where that is installed, into
sharded arrays of the very same metadata; and a np.memmap of the plain rows, flushed. Every file is fsynced. Two shards
are written one after the other, then at once by two threads. Other writers keep threads of their own, which only the
CPU seconds show. The rows are Gaussian in bfloat16; for int8 everybody but the memmap begins by quantising them.

    actcache bench write
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from actcache.format.arrays import ArraySpec, chunk_rows, hook_arrays
from actcache.format.codecs import CODECS, Codec, stored_tensors
from actcache.format.dtypes import storage_view
from actcache.format.paths import shard_key
from actcache.format.records import HookSpec
from actcache.store.shard_file import chunk_slices, write_shard
from actcache.store.zarr_metadata import write_metadata
from benchmarks.measure import Cost, Say, interleaved_costs, machine, one_torch_thread, ratios

D_INS, N_SHARDS, SHARD_BYTES, REPEATS = (64, 512, 768, 4096), 2, 16 << 20, 3
HOOK, DTYPE = "hook", "bfloat16"
ZARRS = "zarrs.ZarrsCodecPipeline"
Write = Callable[[int], object]  # one shard, by its number


def run(say: Say) -> dict[str, Any]:
    """Measure every profile at every width on one and two threads; returns what the JSON line says."""
    found = {}
    with one_torch_thread():
        for d_in in D_INS:
            for name, codec in CODECS.items():
                with tempfile.TemporaryDirectory() as folder:
                    found[f"{name}.{d_in}"] = _measured(Task(d_in, codec), Path(folder), say)
    return {"bench": "write", "shards": N_SHARDS, "writes": found, "machine": machine()}


class Task:
    """Rows of one width to be written by one profile, and the arrays that hold them."""

    def __init__(self, d_in: int, codec: Codec):
        self.codec = codec
        self.shard_rows = 1 << (SHARD_BYTES // (2 * d_in)).bit_length() - 1
        self.chunk_rows = chunk_rows(d_in, 2, self.shard_rows)
        self.x = torch.randn(N_SHARDS * self.shard_rows, d_in, generator=torch.Generator().manual_seed(d_in)).bfloat16()
        self.arrays = hook_arrays(HookSpec(hook_name=HOOK, d_in=d_in, dtype=DTYPE), codec, self.chunk_rows)

    def rows(self, shard: int) -> Tensor:
        """The rows of one shard."""
        return self.x[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def parts(self, shard: int) -> list[np.ndarray]:
        """What each array stores of a shard; int8 is made here, chunk by chunk, and everything else is a view."""
        rows = self.rows(shard)
        if not self.codec.quantised:
            return [storage_view(rows)]
        chunks = [stored_tensors(chunk, DTYPE, self.codec) for chunk in rows.split(self.chunk_rows)]
        return [storage_view(torch.cat(part)) for part in zip(*chunks, strict=True)]

    def chunks(self, array: ArraySpec, part: np.ndarray) -> list[np.ndarray]:
        """The inner chunks of a shard of one array."""
        return [part[rows] for rows in chunk_slices(array, self.shard_rows)]

    def make_store(self, folder: Path) -> None:
        """Write the metadata of every array; no shard yet."""
        shapes = {array.path: (array, len(self.x), self.shard_rows) for array in self.arrays}
        write_metadata(folder, {}, shapes, self.codec)


# --- writers -------------------------------------------------------------------------------------------------------


def _ours(task: Task, folder: Path) -> Write:
    task.make_store(folder)

    def write(shard: int) -> None:
        for array, part in zip(task.arrays, task.parts(shard), strict=True):
            chunks = task.chunks(array, part)
            write_shard(folder / shard_key(array, shard), array, task.codec, chunks, task.shard_rows)

    return write


def _codec(task: Task, folder: Path) -> Write:
    def write(shard: int) -> None:
        for array, part in zip(task.arrays, task.parts(shard), strict=True):
            for chunk in task.chunks(array, part):
                task.codec.encode(chunk)

    return write


def _disk(task: Task, folder: Path) -> Write:
    """The bytes of the files of `_ours`, already there."""
    write_first = _ours(task, folder)
    for shard in range(N_SHARDS):
        write_first(shard)
    files = [[(folder / shard_key(array, shard)).read_bytes() for array in task.arrays] for shard in range(N_SHARDS)]

    def write(shard: int) -> None:
        for number, payload in enumerate(files[shard]):
            with open(folder / f"{shard}.{number}", "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())

    return write


def _memmap(task: Task, folder: Path) -> Write:
    def write(shard: int) -> None:
        rows = storage_view(task.rows(shard))
        file = np.memmap(folder / str(shard), dtype=rows.dtype, mode="w+", shape=rows.shape)
        file[:] = rows
        file.flush()

    return write


def _zarr_python(task: Task, folder: Path) -> Write:
    """zarr-python leaves the fsync to whoever wants it."""
    task.make_store(folder)
    arrays = [zarr.open_array(folder / array.path, mode="r+") for array in task.arrays]
    write_slice = _into_slices(task, arrays)

    def write(shard: int) -> None:
        write_slice(shard)
        for array in task.arrays:
            _fsync(folder / shard_key(array, shard))

    return write


def _zarrs(task: Task, folder: Path) -> Write:
    with zarr.config.set({"codec_pipeline.path": ZARRS}):
        return _zarr_python(task, folder)


def _tensorstore(task: Task, folder: Path) -> Write:
    """It fsyncs, and renames into place, as ours does."""
    import tensorstore

    task.make_store(folder)
    specs = [{"driver": "zarr3", "kvstore": f"file://{folder / array.path}/"} for array in task.arrays]
    return _into_slices(task, [tensorstore.open(spec).result() for spec in specs])


def _into_slices(task: Task, arrays: list[Any]) -> Write:
    def write(shard: int) -> None:
        for array, part in zip(arrays, task.parts(shard), strict=True):
            array[shard * task.shard_rows : (shard + 1) * task.shard_rows] = part

    return write


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SHARDED = {"ours": _ours, "zarr_python": _zarr_python, "tensorstore": _tensorstore, "zarrs": _zarrs}
OTHERS = {"codec": _codec, "disk": _disk, "memmap": _memmap}


# --- the run -------------------------------------------------------------------------------------------------------


def _measured(task: Task, root: Path, say: Say) -> dict[str, Any]:
    writes = {name: make(task, _made(root / name)) for name, make in _contenders().items()}
    for write in writes.values():
        _all_shards(write, map)()
    _check(task, root)
    found = {}
    with ThreadPoolExecutor(N_SHARDS) as pool:
        for threads, each in ((1, map), (N_SHARDS, pool.map)):
            costs = interleaved_costs({name: _all_shards(write, each) for name, write in writes.items()}, REPEATS)
            rates = _rates(costs, task.x.nbytes / 1e9)
            say(f"{task.codec.name}, {task.x.shape[1]} wide, threads {threads}: GB/s of rows (CPU seconds a GB)")
            say("  " + ", ".join(_line(name, rates[name]) for name in writes))
            found[f"{threads}_threads"] = rates
    return found


def _contenders() -> dict[str, Callable[[Task, Path], Write]]:
    """All writers but those that are not installed."""
    absent = {name for name in ("tensorstore", "zarrs") if importlib.util.find_spec(name) is None}
    return {name: make for name, make in {**SHARDED, **OTHERS}.items() if name not in absent}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _all_shards(write: Write, each: Callable[[Write, range], Iterable[object]]) -> Callable[[], object]:
    """Write every shard, as `each` maps over them."""
    return lambda: list(each(write, range(N_SHARDS)))


def _rates(costs: Mapping[str, list[Cost]], gigabytes: float) -> dict[str, Any]:
    """Median speed and CPU of each, and how fast ours is against every other, pair by pair."""
    walls = {name: [cost.wall for cost in each] for name, each in costs.items()}
    rates: dict[str, Any] = {
        name: {
            "gb_per_s": gigabytes / statistics.median(walls[name]),
            "cpu_seconds_per_gb": statistics.median(cost.cpu for cost in each) / gigabytes,
        }
        for name, each in costs.items()
    }
    return rates | {f"ours_over_{name}": ratios(walls[name], walls["ours"]) for name in walls if name != "ours"}


def _line(name: str, found: dict[str, Any]) -> str:
    return f"{name} {found['gb_per_s']:.2f} ({found['cpu_seconds_per_gb']:.2f})"


def _check(task: Task, root: Path) -> None:
    """zarr-python reads the rows back from what each sharded writer left, and the memmap's files hold them."""
    stored = [np.concatenate(parts) for parts in zip(*map(task.parts, range(N_SHARDS)), strict=True)]
    for name in SHARDED.keys() & _contenders().keys():
        for array, part in zip(task.arrays, stored, strict=True):
            assert np.array_equal(zarr.open_array(root / name / array.path, mode="r")[:], part), (name, array.path)
    rows = storage_view(task.x)
    plain = [np.fromfile(root / "memmap" / str(shard), dtype=rows.dtype) for shard in range(N_SHARDS)]
    assert np.array_equal(np.concatenate(plain), rows.reshape(-1))
