"""The permutation that scatters the rows of a shard: the same for all of its hooks."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64


def keyed_permutation(n: int, *key: object) -> Int64[np.ndarray, " n"]:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8")
    return _stable_argsort(np.random.Philox(key=words).random_raw(n))


def shard_permutation(n_rows: int, *, seed: int, split: str, index: int) -> Int64[np.ndarray, " n_rows"]:
    """Where each token of a shard is stored: token `first + t` lies in row `first + permutation[t]`.

    The stable argsort of the raw 64-bit stream of Philox, keyed by the first 16 bytes (two little-endian words) of
    sha256("scatter:{seed}:{split}:{index}"). The same for all hooks.
    """
    return keyed_permutation(n_rows, "scatter", seed, split, index)


def _stable_argsort(keys: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """np.argsort(keys, kind="stable") in a third of the time: radix sorts of the upper half, then the few ties."""
    upper = (keys >> np.uint64(32)).astype(np.uint32)
    order = np.argsort(upper.astype(np.uint16), kind="stable")  # numpy sorts 16-bit integers by radix
    order = order[np.argsort((upper >> np.uint32(16)).astype(np.uint16)[order], kind="stable")]
    in_order = upper[order]
    equal = in_order[1:] == in_order[:-1]
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))  # whole runs of equal upper halves
    order[tied] = order[tied][np.argsort(keys[order[tied]], kind="stable")]
    return order
