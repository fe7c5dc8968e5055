"""How well batches are mixed: ours against stored order, SAELens' mixing buffer, and the perfect permutation.

Order alone, in whole numbers: which token is served when, and which document it is from; no activation is read.
Ours: tokens scattered within shards, chunks permuted, groups of 64 chunks permuted jointly. SAELens: its own
`mixing_buffer` over the tokens in stored order, with as many rows in memory as our two groups. Bound: one permutation
of all tokens. Measured over the full batches of one epoch:

companions          other tokens of the same document in the batch, mean over the batch's tokens
distinct_documents  documents that a batch has tokens of
entropy_bits        Shannon entropy of the documents' shares of a batch

    actcache bench shuffle
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64

from actcache.format.arrays import MAX_SHARD_ROWS, chunk_rows
from actcache.format.scatter import shard_permutation
from actcache.loading.loader import GROUP_CHUNKS
from actcache.loading.order import EpochOrder
from benchmarks.measure import Say, machine

N_TOKENS, BATCH_TOKENS, SEED = 1 << 23, 4096, 0
SAELENS_LOAD_ROWS = 32 * 128  # its store_batch_size_prompts and context_size, as they are unless set


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How mixed the batches of an epoch are; each figure is a mean over batches of equal size."""

    companions: float
    distinct_documents: float
    entropy_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Documents of these lengths in tokens, one behind the other, in a cache of these sizes in rows."""

    name: str
    lengths: Int64[np.ndarray, " document"]
    shard_rows: int
    chunk_rows: int

    @property
    def n_tokens(self) -> int:
        """Rows of the cache."""
        return int(self.lengths.sum())


def run(say: Say) -> dict[str, Any]:
    """Measure every order on every geometry; returns what the JSON line says."""
    found = {geometry.name: _measured(geometry, say) for geometry in (equal_documents(), uneven_documents())}
    return {"bench": "shuffle", "batch_tokens": BATCH_TOKENS, "group_chunks": GROUP_CHUNKS, **found} | {
        "machine": machine()
    }


def equal_documents() -> Geometry:
    """2^23 tokens in documents of 1024, the largest shards, chunks of 4096 rows (256 channels of bfloat16)."""
    lengths = np.full(N_TOKENS // 1024, 1024)
    return Geometry(name="equal", lengths=lengths, shard_rows=MAX_SHARD_ROWS, chunk_rows=4096)


def uneven_documents() -> Geometry:
    """About 2^23 tokens in documents of log-normal length (median 400, mean 820), in a cache that is 768 wide."""
    rng = np.random.default_rng(SEED)
    lengths = np.ceil(rng.lognormal(np.log(400), 1.2, size=N_TOKENS // 820)).astype(np.int64)
    rows = chunk_rows(768, 2, MAX_SHARD_ROWS)
    return Geometry(name="uneven", lengths=lengths, shard_rows=MAX_SHARD_ROWS, chunk_rows=rows)


# --- the measure ---------------------------------------------------------------------------------------------------


def mixing(documents: Int[np.ndarray, " row"], batch_tokens: int) -> Mixing:
    """How mixed the full batches of an epoch are, whose rows are of these documents, in served order."""
    full = documents[: len(documents) // batch_tokens * batch_tokens].reshape(-1, batch_tokens)
    counts = [np.unique(batch, return_counts=True)[1] for batch in full]
    return Mixing(
        companions=float(np.mean([(n * (n - 1)).sum() / batch_tokens for n in counts])),
        distinct_documents=float(np.mean([len(n) for n in counts])),
        entropy_bits=float(np.mean([-(n / batch_tokens * np.log2(n / batch_tokens)).sum() for n in counts])),
    )


def ideal_companions(lengths: Int64[np.ndarray, " document"], batch_tokens: int) -> float:
    """What a permutation of all N tokens has in expectation: (b - 1)(L - 1)/(N - 1), its mean over tokens."""
    n_tokens = lengths.sum()
    return float((batch_tokens - 1) / (n_tokens - 1) * (lengths * (lengths - 1)).sum() / n_tokens)


def predicted_companions(geometry: Geometry, batch_tokens: int) -> float:
    """What the law says of our order: ideal + b * L / (k * S), its mean over tokens."""
    weighted_length = (geometry.lengths**2).sum() / geometry.n_tokens
    excess = batch_tokens * weighted_length / (GROUP_CHUNKS * geometry.shard_rows)
    return ideal_companions(geometry.lengths, batch_tokens) + float(excess)


# --- the orders ----------------------------------------------------------------------------------------------------


def our_order(n_tokens: int, *, shard_rows: int, chunk_rows: int, batch_tokens: int) -> Int64[np.ndarray, " row"]:
    """The tokens of one epoch as the loader serves them when it filters nothing; data seed and cache seed are SEED."""
    token = _stored_tokens(n_tokens, shard_rows)
    starts = np.arange(0, n_tokens, chunk_rows)
    kept = np.minimum(n_tokens - starts, chunk_rows).tolist()
    order = EpochOrder(kept, seed=SEED, epochs=1, batch_tokens=batch_tokens, group_chunks=GROUP_CHUNKS)
    served = []
    for group in range(-(-len(kept) // GROUP_CHUNKS)):
        joined = np.concatenate([token[starts[c] : starts[c] + chunk_rows] for c in order.chunks(0, group)])
        served.append(joined[order.rows(0, group)])
    return np.concatenate(served)


def _stored_tokens(n_tokens: int, shard_rows: int) -> np.ndarray:
    """Which token lies in each row of the cache."""
    token = np.empty(n_tokens, dtype=np.int64)
    for index, first in enumerate(range(0, n_tokens, shard_rows)):
        n_rows = min(shard_rows, n_tokens - first)
        scattered = shard_permutation(n_rows, seed=SEED, split="train", index=index)
        token[first + scattered] = np.arange(first, first + n_rows)
    return token


def _saelens_order(n_tokens: int, *, buffer_rows: int, batch_tokens: int) -> np.ndarray | None:
    """The tokens as SAELens' mixing buffer serves them, full batches only; None where it is not installed."""
    try:
        from sae_lens.training.mixing_buffer import mixing_buffer
    except ModuleNotFoundError:
        return None

    def loads() -> Iterator[torch.Tensor]:
        yield from torch.arange(n_tokens).unsqueeze(1).split(SAELENS_LOAD_ROWS)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return torch.cat(list(mixing_buffer(buffer_rows, batch_tokens, loads()))).squeeze(1).numpy()


# --- the run -------------------------------------------------------------------------------------------------------


def _measured(geometry: Geometry, say: Say) -> dict[str, Any]:
    document = np.repeat(np.arange(len(geometry.lengths)), geometry.lengths)
    ideal = ideal_companions(geometry.lengths, BATCH_TOKENS)
    predicted = predicted_companions(geometry, BATCH_TOKENS)
    say(
        f"{geometry.name}: {geometry.n_tokens:,} tokens of {len(geometry.lengths):,} documents, "
        f"S {geometry.shard_rows}, C {geometry.chunk_rows}, k {GROUP_CHUNKS}, b {BATCH_TOKENS}"
    )
    say(f"  companions: ideal {ideal:.3f}, ours by the law ideal + b*L/(k*S) {predicted:.3f}")
    orders = {}
    for name, tokens in _orders(geometry):
        if tokens is None:
            say(f"  {name}: left out, sae-lens is not installed")
            continue
        _check(tokens, geometry, name)
        found = mixing(document[tokens], BATCH_TOKENS)
        orders[name] = {**asdict(found), "over_ideal": found.companions / ideal}
        say(
            f"  {name}: {found.companions:.3f} companions ({found.companions / ideal:.2f}x ideal), "
            f"{found.distinct_documents:.0f} documents and {found.entropy_bits:.2f} bits a batch"
        )
    sizes = {name: getattr(geometry, name) for name in ("n_tokens", "shard_rows", "chunk_rows")}
    law = {"ideal_companions": ideal, "predicted_companions": predicted}
    return {**sizes, "documents": len(geometry.lengths), **law, "orders": orders}


def _orders(geometry: Geometry) -> Iterator[tuple[str, np.ndarray | None]]:
    n_tokens = geometry.n_tokens
    sizes = {"shard_rows": geometry.shard_rows, "chunk_rows": geometry.chunk_rows, "batch_tokens": BATCH_TOKENS}
    buffer_rows = 2 * GROUP_CHUNKS * geometry.chunk_rows
    yield "ours", our_order(n_tokens, **sizes)
    yield "stored_order", np.arange(n_tokens)
    yield "saelens_buffer", _saelens_order(n_tokens, buffer_rows=buffer_rows, batch_tokens=BATCH_TOKENS)
    yield "perfect", np.random.default_rng(SEED).permutation(n_tokens)


def _check(tokens: np.ndarray, geometry: Geometry, name: str) -> None:
    """Every token is served once; SAELens' buffer never serves what does not fill a last batch."""
    times = np.bincount(tokens, minlength=geometry.n_tokens)
    n_whole = geometry.n_tokens // BATCH_TOKENS * BATCH_TOKENS
    assert len(times) == geometry.n_tokens, name
    assert times.max() == 1, name
    assert times.sum() == (n_whole if name == "saelens_buffer" else geometry.n_tokens), name
