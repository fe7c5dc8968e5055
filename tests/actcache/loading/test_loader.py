import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from support import naive_loader
from support.places import CHILD, SUPPORT
from support.tiny_caches import HOOKS, PROFILES, harvest_tiny
from support.tiny_models import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from actcache.errors import CacheMismatch, ConfigError
from actcache.flow import Batch
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import Loader
from actcache.loading.stream import hook_bytes
from actcache.models.load import wrap_model
from actcache.text.sources import LoadedDataset

ALL_FIELDS = ("id", "document", "sequence", "position")
EVERY_FILTER = {"positions": slice(2, None, 3), "max_norm_ratio": 1.2}


def rows(batches) -> list[int]:
    return [row for batch in batches for row in batch.row.tolist()]


def bits(batch: Batch) -> list[bytes]:
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in batch.x.values()]


@pytest.mark.parametrize("batch_tokens", [7, 512, 10**6])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_row_once_an_epoch_with_its_own_values(caches, profile, split, batch_tokens):
    cache = caches[profile]
    n_hooks = 2 if batch_tokens > 7 else 1
    with Loader(cache, HOOKS[:n_hooks], split=split, batch_tokens=batch_tokens, group_chunks=5) as loader:
        batches = list(loader)
    assert [batch.step for batch in batches] == list(range(loader.n_steps))
    assert all(len(batch.row) == batch_tokens for batch in batches[:-1])
    ids = naive_loader.array(cache, split, "tokens/id")
    assert sorted(rows(batches)) == np.flatnonzero(~np.isin(ids, cache.special_token_ids)).tolist()
    for hook_name in HOOKS[:n_hooks]:
        x = naive_loader.activations(cache, hook_name, split)
        for batch in batches:
            assert batch.x[hook_name].dtype == getattr(torch, cache.hook(hook_name).dtype)
            assert torch.equal(batch.x[hook_name], x[batch.row])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("group_chunks", [1, 5, 64])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_is_that_of_the_definition(tiny_cache, seed, group_chunks, split):
    expected, _ = naive_loader.served_rows(
        tiny_cache, HOOKS[:1], split=split, seed=seed, epochs=2, group_chunks=group_chunks
    )
    settings = {"split": split, "seed": seed, "epochs": 2, "group_chunks": group_chunks}
    with Loader(tiny_cache, HOOKS[0], batch_tokens=333, **settings) as loader:
        assert rows(loader) == expected.tolist()
        assert loader.n_rows * 2 == len(expected)


def test_seeds_have_orders_of_their_own(tiny_cache):
    assert len({tuple(rows(Loader(tiny_cache, HOOKS[0], seed=seed))) for seed in range(3)}) == 3


def test_hooks_are_aligned_and_alone_or_together_give_the_same_rows(tiny_cache):
    together = list(Loader(tiny_cache, HOOKS, batch_tokens=256))
    for hook_name in HOOKS:
        alone = list(Loader(tiny_cache, hook_name, batch_tokens=256))
        assert all(torch.equal(a.x[hook_name], t.x[hook_name]) for a, t in zip(alone, together, strict=True))


SHARED = {"seed": 7, "epochs": 2, "group_chunks": 5, "limit": 3601, "token_fields": ALL_FIELDS, **EVERY_FILTER}


@pytest.mark.parametrize("profile", ["lossless", "int8"])
def test_resume_at_every_step(caches, profile):
    settings = {"batch_tokens": 300, **SHARED}
    whole = list(Loader(caches[profile], HOOKS[:2], **settings))
    assert len(whole) == 13
    for step in range(len(whole) + 1):
        with Loader(caches[profile], HOOKS[:2], start_step=step, **settings) as resumed:
            batches = list(resumed)
        assert [batch.step for batch in batches] == list(range(step, len(whole)))
        assert [bits(batch) for batch in batches] == [bits(batch) for batch in whole[step:]]
        assert rows(batches) == rows(whole[step:])


@pytest.mark.parametrize(("world_size", "batch_tokens"), [(2, 300), (3, 301), (7, 300), (5, 3)])
def test_ranks_concatenated_equal_one_rank(tiny_cache, world_size, batch_tokens):
    """Also where a rank gets no row of a batch, and where it skips whole groups."""
    settings = {"batch_tokens": batch_tokens, **SHARED, "group_chunks": 1}
    settings["limit"] = min(SHARED["limit"], 100 * batch_tokens)
    whole = list(Loader(tiny_cache, HOOKS[0], **settings))
    ranks = [list(Loader(tiny_cache, HOOKS[0], rank=r, world_size=world_size, **settings)) for r in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.x[HOOKS[0]] for part in parts]), batch.x[HOOKS[0]])
        for name in ("row", "token_id", "document", "sequence", "position"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        sizes = [len(part.row) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("limit", [0, 1, 100, 101, 8999, 10**6])
def test_a_limit_ends_the_stream_of_all_epochs(tiny_cache, limit):
    whole, _ = naive_loader.served_rows(tiny_cache, HOOKS[:1], epochs=2)
    with Loader(tiny_cache, HOOKS[0], batch_tokens=100, epochs=2, limit=limit) as loader:
        assert rows(loader) == whole[:limit].tolist()
        assert loader.n_steps == -(-min(limit, len(whole)) // 100)


@pytest.mark.parametrize("asked", [ALL_FIELDS, ("document",), ("position", "id"), ()], ids=str)
def test_token_fields_are_those_of_the_rows(tiny_cache, asked):
    expected = naive_loader.token_fields(tiny_cache)
    names = {"id": "token_id", "document": "document", "sequence": "sequence", "position": "position"}
    for batch in Loader(tiny_cache, HOOKS[0], batch_tokens=1000, group_chunks=5, token_fields=asked):
        for name, values in expected.items():
            found = getattr(batch, names[name])
            if name in asked:
                assert np.array_equal(found.numpy(), values[batch.row.numpy()])
            else:
                assert found is None
        assert batch.cache is None


HOLDS = {
    "list": lambda x: x,
    "slice": lambda x: x[3:5],
    "one row": lambda x: x[-1],
    "transposed": lambda x: x.T,
    "float()": lambda x: x.float(),
    "bits": lambda x: x.view(torch.uint8),
    "numpy": lambda x: x.view(torch.uint8).numpy()[1:],
    "numpy of a slice": lambda x: x[2:9].view(torch.uint8).numpy().reshape(-1)[5:],
    "memoryview": lambda x: memoryview(x.view(torch.uint8).numpy()),
    "storage": lambda x: x.untyped_storage(),
    "dlpack": lambda x: torch.from_dlpack(x),
    "detached": lambda x: x.detach(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "saved for backward": lambda x: torch.ones(x.shape[1], dtype=x.dtype, requires_grad=True) * x,
}


def contents(held) -> bytes:
    if isinstance(held, torch.Tensor):
        return held.detach().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8).set_(held).numpy().tobytes()
    return bytes(held)


@pytest.mark.parametrize("how", HOLDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_caller_holds_is_never_overwritten(caches, profile, how):
    """Whatever refers to a batch's memory; the batch itself is let go."""
    with Loader(caches[profile], HOOKS[0], batch_tokens=64, epochs=2, limit=6400) as loader:
        held, as_served = [], []
        for batch in loader:
            held.append(HOLDS[how](batch.x[HOOKS[0]]))
            as_served.append(contents(held[-1]))
            del batch
    assert len(held) == 100
    assert [contents(kept) for kept in held] == as_served


def test_a_gradient_of_an_earlier_batch_is_its_own(caches):
    weight = torch.ones(caches["float32"].hook(HOOKS[0]).d_in, requires_grad=True)
    batches = iter(Loader(caches["float32"], HOOKS[0], batch_tokens=64))
    first = next(batches).x[HOOKS[0]]
    expected = first.sum(dim=0)
    loss = (weight * first).sum()
    del first
    for batch in batches:
        del batch
    loss.backward()
    assert torch.equal(weight.grad, expected)


def wide_cache(out: Path, n_rows: int):
    """A raw cache of an embedding, 512 wide, which costs its model nothing."""
    tokenizer = make_tokenizer()
    config = GPT2Config(n_embd=512, n_layer=1, n_head=1, n_positions=128, vocab_size=len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    model = wrap_model(GPT2LMHeadModel(config).eval(), tokenizer, name="wide")
    documents = [[2 + (row * 7 + i) % 300 for i in range(127)] for row in range(n_rows // 128)]
    source = LoadedDataset(Dataset.from_dict({"input_ids": documents}))
    asked = HarvestConfig(hook_names=("blocks.0.hook_resid_pre",), context_size=128, holdout=0.0, codec="raw")
    return harvest(model, source, asked, out)


def peak_memory(cache) -> tuple[int, int]:
    """(anonymous bytes at the peak of an epoch, bytes that Loader's docstring allows), in a process of its own."""
    script = SUPPORT / "peak_memory.py"
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(script), str(cache.path), "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, env={**CHILD, **settings}, check=False)
    assert done.returncode == 0, done.stderr
    peak, allowed = done.stdout.split()
    return int(peak), int(allowed)


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Of a cache and of one four times its size, both of more than two groups."""
    small, large = (wide_cache(tmp_path / str(n_rows), n_rows) for n_rows in (16_384, 65_536))
    assert small.n_rows() > 2 * 2 * small.manifest.chunk_rows
    (small_peak, _), (large_peak, allowed) = peak_memory(small), peak_memory(large)
    noise = 4 << 20  # interpreter, allocator and thread stacks
    larger_groups = 3 * 2 * (large.manifest.chunk_rows - small.manifest.chunk_rows) * 1024
    group = 2 * large.manifest.chunk_rows * 1024  # whether all three are there at once is a matter of timing
    assert large_peak - small_peak < larger_groups + group + noise, "the larger cache has 48 MiB more"
    assert large_peak < allowed + noise
    planned = hook_bytes(large, "train", large.manifest.hooks[0].hook_name, batch_rows=1024, group_chunks=2)
    assert large_peak < planned + noise
    assert planned < 1.2 * allowed


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "test"},
        {"batch_tokens": 0},
        {"epochs": 0},
        {"seed": -1},
        {"start_step": -1},
        {"limit": -1},
        {"rank": 2, "world_size": 2},
        {"group_chunks": 0},
        {"max_norm_ratio": 0.0},
        {"max_norm_ratio": float("nan")},
        {"positions": slice(16, None)},
        {"token_fields": ("text",)},
        {"hook_names": ()},
    ],
    ids=str,
)
def test_bad_arguments_are_named(tiny_cache, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Loader(tiny_cache, **{"hook_names": HOOKS[0], **bad})


def test_unknown_hook_and_empty_split_are_named(tiny_model, tiny_texts, tiny_cache, tmp_path):
    with pytest.raises(CacheMismatch, match="hook_attn_out"):
        Loader(tiny_cache, "blocks.7.hook_resid_post")
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", holdout=0.0, hook_names=HOOKS[:1])
    with pytest.raises(ConfigError, match="validation holds no rows"):
        Loader(cache, HOOKS[0], split="validation")
