"""What a loader must serve, in plain numpy over zarr-python: of actcache, only the cache's own numbers are used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
import zarr

if TYPE_CHECKING:
    from actcache.store.cache import Cache


def permutation(n: int, *key: object) -> np.ndarray:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    keys = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(n)
    return np.array(sorted(range(n), key=lambda i: keys[i]), dtype=np.int64)


def array(cache: Cache, split: str, path: str) -> np.ndarray:
    return np.asarray(zarr.open_array(cache.path / "acts.zarr" / split / path, mode="r")[:])


def activations(cache: Cache, hook_name: str, split: str = "train") -> torch.Tensor:
    """Every row in the stored dtype, read with zarr-python."""
    if cache.identity["codec"] == "int8":
        q8, scale = (torch.from_numpy(array(cache, split, f"{hook_name}/{part}")) for part in ("q8", "scale"))
        scales = scale.view(torch.bfloat16).double().repeat_interleave(32, dim=1)[:, : q8.shape[1]]
        return (q8.double() * scales).to(getattr(torch, cache.identity["dtype"]))
    x = torch.from_numpy(array(cache, split, f"{hook_name}/acts"))
    return x.view(torch.bfloat16) if cache.identity["dtype"] == "bfloat16" else x


def token_fields(cache: Cache, split: str = "train") -> dict[str, np.ndarray]:
    """Every row's token id, sequence, position and document."""
    found = {name: array(cache, split, f"tokens/{name}") for name in ("id", "sequence", "position")}
    documents = array(cache, split, "sequences/document")
    found["document"] = np.array([documents[s, p] for s, p in zip(found["sequence"], found["position"], strict=True)])
    return found


def served_rows(
    cache: Cache,
    hook_names: Sequence[str],
    *,
    split: str = "train",
    seed: int = 0,
    epochs: int = 1,
    exclude_special_tokens: bool = True,
    positions: slice | None = None,
    max_norm_ratio: float | None = None,
    group_chunks: int = 64,
) -> tuple[np.ndarray, dict[str, int]]:
    """The row numbers of all epochs in order, and how many rows each filter is the first to drop."""
    tokens = token_fields(cache, split)
    n_rows, chunk_rows = len(tokens["id"]), cache.manifest.chunk_rows
    wanted = range(cache.context_size)[positions or slice(None)]
    large = np.zeros(n_rows, dtype=bool)
    for hook_name in hook_names if max_norm_ratio is not None else ():
        median = cache.statistics(hook_name, split=split).norm_quantile(0.5)
        large |= np.linalg.norm(activations(cache, hook_name, split).double().numpy(), axis=1) > max_norm_ratio * median
    drops = {
        "exclude_special_tokens": np.isin(tokens["id"], cache.special_token_ids) & exclude_special_tokens,
        "positions": np.array([position not in wanted for position in tokens["position"]]),
        "max_norm_ratio": large,
    }
    kept, dropped = np.ones(n_rows, dtype=bool), {}
    for name, drop in drops.items():
        dropped[name] = int((kept & drop).sum())
        kept &= ~drop
    rows = []
    for epoch in range(epochs):
        chunks = permutation(-(-n_rows // chunk_rows), "chunks", seed, epoch)
        for group, first in enumerate(range(0, len(chunks), group_chunks)):
            members = [
                np.arange(c * chunk_rows, min((c + 1) * chunk_rows, n_rows)) for c in chunks[first:][:group_chunks]
            ]
            joined = np.concatenate([rows_of_chunk[kept[rows_of_chunk]] for rows_of_chunk in members])
            rows.append(joined[permutation(len(joined), "rows", seed, epoch, group)])
    return np.concatenate(rows), dropped


def mixed_rows(
    streams: Sequence[np.ndarray], shares: Sequence[float], batch_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(cache, row) of every row of a mixture of these streams: a batch at a time, a row at a time, in fractions."""
    exact = [Fraction(share) for share in shares]
    given, line = [0] * len(streams), []
    for step in range(sum(map(len, streams)) // batch_tokens + 1):
        ends = [sum(exact[: i + 1]) / sum(exact) * (step + 1) * batch_tokens // 1 for i in range(len(exact))]
        counts = [int(end - start) - n for start, end, n in zip([0, *ends], ends, given, strict=False)]
        places = sorted((Fraction(2 * j + 1, 2 * n), cache) for cache, n in enumerate(counts) for j in range(n))
        for _, cache in places:
            if given[cache] == len(streams[cache]):
                return np.array([c for c, _ in line]), np.array([row for _, row in line])
            line.append((cache, streams[cache][given[cache]]))
            given[cache] += 1
    raise AssertionError("some stream must run out")
