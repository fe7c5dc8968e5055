"""Feeding shuffled batches: ours against a copy of as many bytes, and against SAELens' cached feed.

Bound: np.copyto of the same bytes, once. Ours: an epoch of the Loader over a raw and over a lossless bfloat16 cache,
special tokens kept, 4,096 rows a batch, after a first epoch in which its two groups get their memory. SAELens: an
ActivationsStore over the same rows in its Arrow format (float32, in token order), whose mixing buffer has as many rows
as two of our groups (at most half of the cache). `bench shuffle` tells how well either of them shuffles.

    actcache bench feed
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.flow import Batch
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import GROUP_CHUNKS, Loader
from actcache.store.cache import Cache
from benchmarks.measure import Cost, Say, described, installed, interleaved_costs, machine, ratios
from benchmarks.peers import saelens_store
from benchmarks.stream import CONTEXT_SIZE, random_documents, random_gpt2

WIDTHS_AND_TOKENS = ((512, 1 << 17), (512, 1 << 19), (768, 1 << 18), (2304, 1 << 17))  # one to four groups of 64 chunks
BATCH_TOKENS, REPEATS = 4096, 7
HOOK, CODECS = "blocks.0.hook_resid_pre", ("raw", "lossless")  # the embedding: its model costs next to nothing


def run(say: Say) -> dict[str, Any]:
    """Measure every width, one of them at four times the rows as well; returns what the JSON line says."""
    result: dict[str, Any] = {"bench": "feed", "batch_tokens": BATCH_TOKENS, "machine": machine()}
    for d_model, n_tokens in WIDTHS_AND_TOKENS:
        with tempfile.TemporaryDirectory() as folder:
            result[f"d_in {d_model}, {n_tokens} rows"] = _measured(d_model, n_tokens, Path(folder), say)
    return result


def _measured(d_model: int, n_tokens: int, root: Path, say: Say) -> dict[str, Any]:
    caches = {name: _cache(root / name, d_model, n_tokens, name) for name in CODECS}
    x = caches["raw"].hook_reader("train", HOOK).read(0, caches["raw"].n_rows())
    rows, copy = x.view(torch.uint16).numpy(), np.empty((len(x), d_model), dtype=np.uint16)
    feeds: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(copy, rows)}
    for name, cache in caches.items():
        _check(cache, x)
        loader = _loader(cache, epochs=REPEATS + 2)
        batches = iter(loader)  # one pass, of which each measurement takes an epoch
        feeds[name] = lambda loader=loader, batches=batches: _served(loader, batches, len(x) // BATCH_TOKENS)
    costs = interleaved_costs(feeds, REPEATS)
    served = dict.fromkeys(feeds, len(x))
    if installed("sae_lens", say):
        buffer_rows = min(2 * GROUP_CHUNKS * caches["raw"].manifest.chunk_rows, len(x) // 2)
        saelens = saelens_store(root / "arrow", caches["raw"], batch_tokens=BATCH_TOKENS, buffer_rows=buffer_rows)
        n_batches = buffer_rows // 2 // BATCH_TOKENS  # what it serves between two refills
        costs |= interleaved_costs({"SAELens": lambda: _drained(islice(saelens, n_batches))}, 3)
        served["SAELens"] = n_batches * BATCH_TOKENS
    return _described(d_model, costs, served, say)


def _cache(out: Path, d_model: int, n_tokens: int, codec: str) -> Cache:
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0, codec=codec)
    return harvest(random_gpt2(1, d_model), random_documents(n_tokens // CONTEXT_SIZE), config, out)


def _loader(cache: Cache, epochs: int = 1) -> Loader:
    return Loader(cache, HOOK, batch_tokens=BATCH_TOKENS, epochs=epochs, exclude_special_tokens=False)


def _served(loader: Loader, batches: Iterator[Batch], n_batches: int) -> None:
    """Take so many batches, and wait for the group that is decoded ahead: else it is done in another's time."""
    _drained(islice(batches, n_batches))
    loader._stream.opened().wait_until_idle()


def _drained(batches: Any) -> None:
    for _ in batches:
        pass


def _check(cache: Cache, x: torch.Tensor) -> None:
    """Batches hold every row once, as the model gave it."""
    seen = torch.zeros(len(x), dtype=torch.int64)
    for batch in _loader(cache):
        seen[batch.row] += 1
        assert torch.equal(batch.x[HOOK], x[batch.row])
    assert (seen == 1).all()


def _described(
    d_model: int, costs: Mapping[str, Sequence[Cost]], served: Mapping[str, int], say: Say
) -> dict[str, Any]:
    row_bytes = 2 * d_model
    walls = {name: [cost.wall / served[name] for cost in spent] for name, spent in costs.items()}
    rates = {name: 1 / statistics.median(wall) for name, wall in walls.items()}
    found: dict[str, Any] = {f"{name}_over_memcpy": ratios(walls["memcpy"], walls[name]) for name in CODECS}
    say(f"{d_model} wide, {served['memcpy']} rows: rows/s (GB/s as bfloat16)")
    say("  " + ", ".join(f"{name} {rate:,.0f} ({rate * row_bytes / 1e9:.2f})" for name, rate in rates.items()))
    for key, ratio in found.items():
        say("  " + described(key.replace("_", " "), ratio))
    if "SAELens" in rates:
        found |= {f"{name}_over_saelens": rates[name] / rates["SAELens"] for name in CODECS}
        say("  of SAELens' rows/s: " + ", ".join(f"{name} {found[f'{name}_over_saelens']:.1f}x" for name in CODECS))
    return {"rows_per_second": rates, **found}
