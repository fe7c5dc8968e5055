import numpy as np


def test_rows_are_scattered_over_their_shard(tiny_cache):
    reader = tiny_cache.token_reader("train", "sequence")
    sequence = reader.read(0, tiny_cache.manifest.shard_rows)
    assert (np.diff(sequence) == 0).mean() < 0.2
