"""Reading whole chunks: ours against the bare codec and against other readers of the same store.

Bound: the codec decoding the same bytes from memory into one reused buffer (raw: a copy of them), on one thread.
Others: zarr-python, tensorstore without its cache, zarr-python on the zarrs pipeline, chunk by chunk; and a
np.memmap of the plain rows, copied out. Ours also on two threads, by CPU second. Rows: the bundled model's stream,
then Gaussians of other widths; chunks are taken in a shuffled order; the page cache is warm. Last, a cold pass of
the Loader: bytes that the process reads from the disk over the bytes that are stored.

    actcache bench read
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from actcache.format.arrays import chunk_rows, hook_arrays
from actcache.format.codecs import codec
from actcache.format.dtypes import storage_view
from actcache.format.paths import STORE, shard_key
from actcache.format.records import HookSpec
from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from actcache.store.kept import CacheFiles
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import write_shard
from actcache.store.zarr_metadata import write_metadata
from benchmarks.measure import (
    Cost,
    Say,
    bytes_read,
    described,
    forget,
    installed,
    interleaved_costs,
    machine,
    one_torch_thread,
    ratios,
)
from benchmarks.stream import bundled_rows, random_stream

D_INS, ROW_BYTES, REPEATS = (64, 512, 768, 2304, 4096), 64 << 20, 9
TRAINED_HOOK, TRAINED_TOKENS = "blocks.3.hook_resid_post", 1 << 17
PROFILES, N_SHARDS = ("lossless", "fast", "raw"), 2
COLD_TOKENS = 1 << 17


def run(say: Say) -> dict[str, Any]:
    """Measure every profile on every stream; returns what the JSON line says."""
    result: dict[str, Any] = {"bench": "read", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        root = Path(folder)
        trained = bundled_rows(root / "trained", [TRAINED_HOOK], TRAINED_TOKENS)[0].x.bfloat16()
        streams = {"bundled 128": trained} | {f"gaussian {d_in}": _gaussian(d_in) for d_in in D_INS}
        for stream, x in streams.items():
            for profile in PROFILES:
                name = f"{profile}, {stream}"
                result[name] = _measured(_Store(root / name, x, profile), name, say)
        result["cold"] = _read_amplification(random_stream(root / "cold", COLD_TOKENS), say)
    return result


def _gaussian(d_in: int) -> Tensor:
    n_rows = 1 << (ROW_BYTES // (2 * d_in)).bit_length() - 1
    return torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(d_in)).bfloat16()


class _Store:
    """Rows written as one sharded array, and the order in which its chunks are read."""

    def __init__(self, folder: Path, x: Tensor, profile: str):
        self.folder, self.codec = folder, codec(profile)
        shard_rows = len(x) // N_SHARDS
        rows = chunk_rows(x.shape[1], 2, shard_rows)
        hook = HookSpec(hook_name="hook", d_in=x.shape[1], dtype="bfloat16")
        (self.array,) = hook_arrays(hook, self.codec, rows)
        self.chunks = list(storage_view(x).reshape(-1, rows, x.shape[1]))
        self.order = np.random.default_rng(0).permutation(len(self.chunks)).tolist()
        write_metadata(folder, {}, {self.array.path: (self.array, len(x), shard_rows)}, self.codec)
        per_shard = len(self.chunks) // N_SHARDS
        records = [
            write_shard(
                folder / shard_key(self.array, shard),
                self.array,
                self.codec,
                self.chunks[shard * per_shard : (shard + 1) * per_shard],
                shard_rows,
            )
            for shard in range(N_SHARDS)
        ]
        self.n_bytes = sum(record.n_bytes for record in records)
        self.reader = ArrayReader(
            CacheFiles(root=folder), self.array, self.codec, records, n_rows=len(x), shard_rows=shard_rows
        )

    @property
    def row_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    def slice(self, chunk: int) -> slice:
        return slice(chunk * self.array.chunk_rows, (chunk + 1) * self.array.chunk_rows)


# --- readers: each gives a chunk ------------------------------------------------------------------------------------

Read = Callable[[int], np.ndarray]


def _ours(store: _Store) -> Read:
    buffer = store.reader.empty(1)

    def read(chunk: int) -> np.ndarray:
        store.reader.decode_into(chunk, buffer)
        return buffer

    return read


def _codec(store: _Store) -> Read:
    stored = [memoryview(bytes(store.codec.encode(chunk)[0])) for chunk in store.chunks]
    buffer = store.reader.empty(1)

    def read(chunk: int) -> np.ndarray:
        store.codec.decode_into(stored[chunk], buffer)
        return buffer

    return read


def _zarr_python(store: _Store) -> Read:
    array = zarr.open_array(store.folder / store.array.path, mode="r")
    return lambda chunk: np.asarray(array[store.slice(chunk)])


def _zarrs(store: _Store) -> Read:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return _zarr_python(store)


def _tensorstore(store: _Store) -> Read:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": f"file://{store.folder / store.array.path}/"}
    array: Any = tensorstore.open(spec).result()
    return lambda chunk: array[store.slice(chunk)].read().result()


def _memmap(store: _Store) -> Read:
    path = store.folder / "rows.bin"
    np.concatenate(store.chunks).tofile(path)
    rows = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, store.chunks[0].shape[1])
    buffer = store.reader.empty(1)

    def read(chunk: int) -> np.ndarray:
        np.copyto(buffer, rows[store.slice(chunk)])
        return buffer

    return read


READERS = {
    "ours": _ours,
    "codec": _codec,
    "zarr_python": _zarr_python,
    "zarrs": _zarrs,
    "tensorstore": _tensorstore,
    "memmap": _memmap,
}


# --- the run -------------------------------------------------------------------------------------------------------


def _measured(store: _Store, name: str, say: Say) -> dict[str, Any]:
    absent = {peer for peer in ("tensorstore", "zarrs") if not installed(peer, say)}
    reads = {reader: make(store) for reader, make in READERS.items() if reader not in absent}
    for reader, read in reads.items():
        for chunk in store.order:
            assert np.array_equal(read(chunk), store.chunks[chunk]), f"{reader} reads other rows"
    passes: dict[str, Callable[[], object]] = {
        reader: lambda read=read: [read(chunk) for chunk in store.order] and None for reader, read in reads.items()
    }
    with ThreadPoolExecutor(2) as pool:
        halves = [(_ours(store), store.order[number::2]) for number in range(2)]
        passes["ours_2_threads"] = lambda: list(pool.map(_read_all, halves))
        costs = interleaved_costs(passes, REPEATS)
    return _described(store, name, costs, say)


def _read_all(half: tuple[Read, Sequence[int]]) -> None:
    read, chunks = half
    for chunk in chunks:
        read(chunk)


def _described(store: _Store, name: str, costs: Mapping[str, Sequence[Cost]], say: Say) -> dict[str, Any]:
    walls = {reader: [cost.wall for cost in spent] for reader, spent in costs.items()}
    rates = {reader: store.row_bytes / 1e9 / statistics.median(wall) for reader, wall in walls.items()}
    found = {f"ours_over_{peer}": ratios(walls[peer], walls["ours"]) for peer in walls if not peer.startswith("ours")}
    found["two_threads_by_cpu"] = ratios(
        [cost.cpu for cost in costs["ours"]], [cost.cpu for cost in costs["ours_2_threads"]]
    )
    found["two_threads_by_wall"] = ratios(walls["ours"], walls["ours_2_threads"])
    say(f"{name}: {store.row_bytes / 1e6:.0f} MB, {store.row_bytes / store.n_bytes:.3f}x smaller on disk")
    say("  GB/s of rows: " + ", ".join(f"{reader} {rate:.2f}" for reader, rate in rates.items()))
    for key, ratio in found.items():
        say("  " + described(key.replace("_", " "), ratio))
    return {"ratio_on_disk": store.row_bytes / store.n_bytes, "gb_per_s": rates, **found}


def _read_amplification(cache: Cache, say: Say) -> dict[str, float]:
    """One epoch of shuffled batches with none of the cache's pages in memory: bytes from the disk over bytes stored."""
    files = [path for path in (cache.path / STORE / "train").rglob("*") if path.is_file()]
    forget(files)
    read = [path for path in files if "sequences" not in path.parts]
    stored = sum(path.stat().st_size for path in read if "position" not in path.parts and "sequence" not in path.parts)
    before = bytes_read()
    with Loader(cache, cache.hook_names) as loader:
        for _ in loader:
            pass
    found = {"stored_mb": stored / 1e6, "read_mb": (bytes_read() - before) / 1e6}
    found["read_amplification"] = found["read_mb"] / found["stored_mb"]
    say(f"cold epoch: {found['read_mb']:.2f} MB read, {found['stored_mb']:.2f} MB stored")
    return found
