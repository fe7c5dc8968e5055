"""Reading a cache: whole chunks against the bare codec and zarr-python, and shuffled batches against memcpy.

The rows are the bundled model's residual stream. Bound of chunks: numcodecs decoding the same bytes from memory into
one reused buffer (lossless), or a copy of them (raw). Bound of batches: a copy of as many bytes. Warm page cache.

    actcache bench read
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from actcache.bundled import bundled_model_path, write_documents
from actcache.cache import STORE, Cache
from actcache.codecs import CODECS, codec
from actcache.harvester import harvest
from actcache.loader import Loader
from actcache.models import load_model
from actcache.plan import HarvestConfig
from actcache.tokens import DatasetSource
from benchmarks.measure import Say, described, interleaved_seconds, machine, ratios

HOOK, N_TOKENS, REPEATS, BATCH_TOKENS = "blocks.3.hook_resid_post", 400_000, 7, 4096


def run(say: Say) -> dict[str, Any]:
    """Measure both profiles; returns what the JSON line says."""
    result: dict[str, Any] = {"bench": "read", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = DatasetSource(path=str(write_documents(root / "documents.jsonl")))
        model = load_model(bundled_model_path(), device="cpu")
        for name in CODECS:
            config = HarvestConfig(hook_names=(HOOK,), tokens=N_TOKENS, codec=name)
            result[name] = _measured(harvest(model, source, config, root / name), name, say)
    return result


def _measured(cache: Cache, name: str, say: Say) -> dict[str, Any]:
    _check(cache)
    reader = cache.hook_reader("train", HOOK)
    buffer = reader.empty(1)
    x = reader.read(0, reader.n_rows)
    copy = np.empty_like(x)
    contenders: dict[str, Callable[[], object]] = {
        "codec": _bare_codec(cache, x, name),
        "chunks": lambda: [reader.decode_into(chunk, buffer) for chunk in range(reader.n_chunks)],
        "zarr_python": _zarr_chunks(cache),
        "memcpy": lambda: np.copyto(copy, x),
        "batches": lambda: [batch for batch in _loader(cache)],
    }
    seconds = interleaved_seconds(contenders, REPEATS)
    gigabytes = {f"{key}_gb_per_s": x.nbytes / 1e9 / float(np.median(s)) for key, s in seconds.items()}
    found = {
        "chunks_over_codec": ratios(seconds["codec"], seconds["chunks"]),
        "chunks_over_zarr_python": ratios(seconds["zarr_python"], seconds["chunks"]),
        "batches_over_memcpy": ratios(seconds["memcpy"], seconds["batches"]),
    }
    stored = sum(s.arrays[f"{HOOK}/acts"].n_bytes for s in cache.manifest.shards["train"])
    say(f"{name}: {x.nbytes / 1e6:.0f} MB in {stored / 1e6:.0f} MB ({x.nbytes / stored:.3f}x)")
    say("  GB/s of decoded rows: " + ", ".join(f"{key[:-9]} {rate:.2f}" for key, rate in gigabytes.items()))
    for key, ratio in found.items():
        say("  " + described(key.replace("_over_", " / "), ratio))
    return {"compression_ratio": x.nbytes / stored, **gigabytes, **found}


def _loader(cache: Cache) -> Loader:
    return Loader(cache, HOOK, batch_tokens=BATCH_TOKENS, exclude_special_tokens=False)


def _check(cache: Cache) -> None:
    """Batches hold the rows that zarr-python reads, each once."""
    x = np.asarray(zarr.open_array(cache.path / STORE / "train" / HOOK / "acts", mode="r")[:])
    seen = np.zeros(len(x), dtype=np.int64)
    for batch in _loader(cache):
        rows = batch.row.numpy()
        seen[rows] += 1
        assert np.array_equal(batch.x[HOOK].view(torch.uint16).numpy(), x[rows])
    assert (seen == 1).all()


def _bare_codec(cache: Cache, x: np.ndarray, name: str) -> Callable[[], object]:
    """Decode the encoded chunks from memory, back to back, into one buffer."""
    rows = cache.manifest.chunk_rows
    whole = [x[start : start + rows] for start in range(0, len(x) - rows + 1, rows)]
    stored = [memoryview(bytes(codec(name).encode(chunk)[0])) for chunk in whole]
    buffer = np.empty_like(whole[0])
    return lambda: [codec(name).decode_into(payload, buffer) for payload in stored]


def _zarr_chunks(cache: Cache) -> Callable[[], object]:
    array = zarr.open_array(cache.path / STORE / "train" / HOOK / "acts", mode="r")
    rows = cache.manifest.chunk_rows
    return lambda: [array[start : start + rows] for start in range(0, array.shape[0], rows)]
