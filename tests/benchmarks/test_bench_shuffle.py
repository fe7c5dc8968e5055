import itertools
import math

import numpy as np
import pytest
import torch
from support.tiny_caches import HOOKS

from actcache.format.scatter import shard_permutation
from actcache.loading.loader import GROUP_CHUNKS, Loader
from actcache.loading.order import EpochOrder
from benchmarks.bench_shuffle import Geometry, ideal_companions, mixing, our_order, predicted_companions


def by_definition(batch: list[int]) -> tuple[float, int, float]:
    """(companions, distinct documents, entropy in bits) of one batch of document numbers, pair by pair."""
    pairs = sum(a == b for i, a in enumerate(batch) for j, b in enumerate(batch) if i != j)
    shares = [batch.count(document) / len(batch) for document in set(batch)]
    return pairs / len(batch), len(set(batch)), -sum(p * math.log2(p) for p in shares)


@pytest.mark.parametrize("batch_tokens", [1, 4, 7, 30])
def test_mixing_equals_the_definition(batch_tokens):
    documents = np.random.default_rng(0).integers(0, 9, size=30)
    n_full = len(documents) // batch_tokens * batch_tokens
    batches = [documents[i : i + batch_tokens].tolist() for i in range(0, n_full, batch_tokens)]
    companions, distinct, entropy = np.mean([by_definition(batch) for batch in batches], axis=0)
    found = mixing(documents, batch_tokens)
    assert found.companions == pytest.approx(companions, rel=1e-12)
    assert found.distinct_documents == pytest.approx(distinct, rel=1e-12)
    assert found.entropy_bits == pytest.approx(entropy, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lengths", [(2, 2, 2), (3, 3), (3, 2, 1), (6,)])
@pytest.mark.parametrize("batch_tokens", [2, 3, 4])
def test_ideal_is_the_mean_over_all_permutations(lengths, batch_tokens):
    document = np.repeat(np.arange(len(lengths)), lengths)
    orders = [mixing(document[list(p)], batch_tokens).companions for p in itertools.permutations(range(6))]
    assert ideal_companions(np.array(lengths), batch_tokens) == pytest.approx(np.mean(orders), rel=1e-12)


def test_ideal_and_law_of_equal_documents():
    geometry = Geometry(name="equal", lengths=np.full(64, 32), shard_rows=256, chunk_rows=16)
    ideal = (8 - 1) * (32 - 1) / (64 * 32 - 1)
    assert ideal_companions(geometry.lengths, 8) == pytest.approx(ideal, rel=1e-12)
    assert predicted_companions(geometry, 8) == pytest.approx(ideal + 8 * 32 / (GROUP_CHUNKS * 256), rel=1e-12)


def test_our_order_is_the_loaders(tiny_cache):
    n_rows, sizes = tiny_cache.n_rows(), tiny_cache.manifest
    assert n_rows % sizes.shard_rows, "the last shard is not full"
    with Loader(tiny_cache, HOOKS[0], batch_tokens=100, exclude_special_tokens=False) as loader:
        rows = torch.cat([batch.row for batch in loader]).numpy()
    sequence, position = (tiny_cache.token_reader("train", name).read(0, n_rows) for name in ("sequence", "position"))
    served = (sequence.astype(np.int64) * tiny_cache.context_size + position)[rows]
    ours = our_order(n_rows, shard_rows=sizes.shard_rows, chunk_rows=sizes.chunk_rows, batch_tokens=100)
    assert np.array_equal(served, ours)


def test_our_order_over_several_groups_is_the_batches_in_turn():
    n_tokens, shard_rows, chunk_rows, batch_tokens = 5003, 512, 16, 100  # 313 chunks in 5 groups; every last one short
    stored = {}
    for index, first in enumerate(range(0, n_tokens, shard_rows)):
        n_rows = min(shard_rows, n_tokens - first)
        for t, row in enumerate(shard_permutation(n_rows, seed=0, split="train", index=index).tolist()):
            stored[first + row] = first + t
    kept = [min(chunk_rows, n_tokens - first) for first in range(0, n_tokens, chunk_rows)]
    order = EpochOrder(kept, seed=0, epochs=1, batch_tokens=batch_tokens, group_chunks=GROUP_CHUNKS)
    served = []
    starts = range(0, n_tokens, batch_tokens)
    for part in itertools.chain.from_iterable(order.span(s, min(s + batch_tokens, n_tokens)) for s in starts):
        chunks = order.chunks(part.epoch, part.group).tolist()
        joined = [c * chunk_rows + r for c in chunks for r in range(kept[c])]
        served += [stored[joined[j]] for j in order.rows(part.epoch, part.group)[part.start : part.stop].tolist()]
    ours = our_order(n_tokens, shard_rows=shard_rows, chunk_rows=chunk_rows, batch_tokens=batch_tokens)
    assert ours.tolist() == served
    assert sorted(served) == list(range(n_tokens))
