import numpy as np
import pytest
import torch
from support.surroundings import address_space

from actcache.flow import ActivationBatch
from actcache.format.codecs import codec, stored_tensors
from actcache.format.records import HookSpec
from actcache.harvesting.window import Window, window_bytes, windows_that_fit


def test_rows_are_scattered_over_their_shard(tiny_cache):
    reader = tiny_cache.token_reader("train", "sequence")
    sequence = reader.read(0, tiny_cache.manifest.shard_rows)
    assert (np.diff(sequence) == 0).mean() < 0.2


@pytest.mark.parametrize("codec_name", ["raw", "int8"])
def test_what_a_window_takes(codec_name):
    hooks = [HookSpec(hook_name=f"blocks.{i}.hook_resid_post", d_in=40 + i, dtype="bfloat16") for i in range(2)]
    window = Window(hooks, codec(codec_name), 20, torch.device("cpu"))
    held = sum(part.nbytes for parts in window.stored.values() for part in parts)
    assert window_bytes(hooks, codec(codec_name), 20) == held


def test_there_are_as_many_windows_as_fit():
    with address_space(512 << 20):
        assert windows_that_fit(2, 150 << 20) == 2
        assert windows_that_fit(2, 300 << 20) == windows_that_fit(1, 300 << 20) == 1
        assert windows_that_fit(0, 0) == 0
        with pytest.raises(MemoryError, match=r"^gathering the rows of a shard may take 0\.60 GB$"):
            windows_that_fit(2, 510 << 20)


@pytest.mark.parametrize("codec_name", ["raw", "int8"])
@pytest.mark.parametrize("per_batch", [1, 2, 5])
def test_every_token_of_the_shard_lies_where_the_permutation_says(codec_name, per_batch):
    """Sequences of 6 tokens, a shard of tokens 8 to 28: the first and the last batch reach beyond it."""
    hook = HookSpec(hook_name="blocks.0.hook_resid_post", d_in=40, dtype="float32")
    x = torch.randn(5, 6, 40, generator=torch.Generator().manual_seed(0))
    permutation = torch.from_numpy(np.random.default_rng(0).permutation(20))
    window = Window([hook], codec(codec_name), 20, torch.device("cpu"))
    for first in range(0, 5, per_batch):
        batch = ActivationBatch(hook_name=hook.hook_name, x=x[first : first + per_batch], first_token=6 * first)
        if batch.first_token + batch.x.flatten(0, 1).shape[0] > 8 and batch.first_token < 28:
            window.add(batch, 8, permutation)
    expected = torch.empty(20, 40)
    for token, row in enumerate(permutation.tolist()):
        expected[row] = x.flatten(0, 1)[8 + token]
    for found, part in zip(
        window.stored[hook.hook_name], stored_tensors(expected, "float32", codec(codec_name)), strict=True
    ):
        assert found.dtype == part.dtype
        assert torch.equal(found, part)
