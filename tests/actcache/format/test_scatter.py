import hashlib

import numpy as np
import pytest

from actcache.format.scatter import _stable_argsort, shard_permutation


def test_the_permutation_is_frozen():
    """Old caches are scattered by it."""
    assert shard_permutation(8, seed=42, split="train", index=3).tolist() == [6, 7, 2, 3, 5, 4, 0, 1]


@pytest.mark.parametrize("n", [1, 2, 1000, 70_000])
def test_permutations_are_the_stable_argsort_of_the_raw_stream(n):
    digest = hashlib.sha256(b"scatter:3:validation:5").digest()
    keys = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(n)
    expected = np.argsort(keys, kind="stable")
    assert np.array_equal(shard_permutation(n, seed=3, split="validation", index=5), expected)


@pytest.mark.parametrize("bits", [0, 3, 20, 34, 40, 64])
def test_equal_keys_keep_their_order(bits):
    """Keys that differ in their lowest, middle or highest bits only, many of them equal."""
    rng = np.random.default_rng(bits)
    few = rng.integers(0, 50, size=5000, dtype=np.uint64)
    for keys in (few << np.uint64(64 - 6), few << np.uint64(30), few, few | (few << np.uint64(bits % 58))):
        assert np.array_equal(_stable_argsort(keys), np.argsort(keys, kind="stable"))
