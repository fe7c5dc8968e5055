import numpy as np
import pytest
import zarr

from actcache.store.shard import Shard


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_shard_knows_the_tokens_that_are_stored(tiny_cache, split):
    """Its columns, worked out before any is written, are what zarr-python reads afterwards."""
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")[split]
    plan, rows = tiny_cache.manifest.plan, 0
    for index in range(plan.n_shards(split)):
        shard = Shard.of(tiny_cache.files, plan, split, index, tiny_cache.manifest.hooks)
        stored = slice(rows, rows + shard.n_rows)
        assert shard.first_token == rows
        for name, column in zip(("id", "sequence", "position"), shard.token_columns, strict=True):
            assert np.array_equal(column, group[f"tokens/{name}"][stored]), name
        rows += shard.n_rows
    assert rows == tiny_cache.n_rows(split)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_forward_batches_are_the_sequences_of_the_shard_in_order(tiny_cache, batch_size):
    plan = tiny_cache.manifest.plan
    for index in range(plan.n_shards("train")):
        shard = Shard.of(tiny_cache.files, plan, "train", index, tiny_cache.manifest.hooks)
        batches = list(shard.token_batches(batch_size))
        assert all(len(batch.token_ids) == batch_size for batch in batches[:-1])
        assert [batch.first_sequence for batch in batches] == [
            shard.first_sequence + batch_size * number for number in range(len(batches))
        ]
        first, n = shard.first_sequence, len(shard.sequences)
        expected = tiny_cache.sequences("train")[first : first + n]
        assert np.array_equal(np.concatenate([batch.token_ids for batch in batches]), expected)
        assert first * tiny_cache.context_size <= shard.first_token
        assert (first + n) * tiny_cache.context_size >= shard.first_token + shard.n_rows


def test_flat_tokens_are_those_of_the_shard_each_once(tiny_cache):
    shard = Shard.of(tiny_cache.files, tiny_cache.manifest.plan, "train", 1, tiny_cache.manifest.hooks)
    assert sorted(shard.flat_tokens.tolist()) == list(range(shard.first_token, shard.first_token + shard.n_rows))
    for token in (0, 5, shard.n_rows - 1):
        assert shard.flat_tokens[shard.permutation[token]] == shard.first_token + token
