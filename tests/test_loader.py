import threading

import numpy as np
import pytest
import torch
from tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheMismatch, ConfigError, CorruptShard
from actcache.loader import Loader


def stored(cache, hook_name, split="train") -> torch.Tensor:
    return cache.hook_reader(split, hook_name).read(0, cache.n_rows(split))


def kept_rows(cache, split="train") -> list[int]:
    reader = cache.token_reader(split, "id")
    return np.flatnonzero(~np.isin(reader.read(0, reader.n_rows), cache.special_token_ids)).tolist()


def bits(batches) -> list[bytes]:
    return [b"".join(x.view(torch.uint16).numpy().tobytes() for x in batch.x.values()) for batch in batches]


@pytest.mark.parametrize("batch_tokens", [1, 100, 512, 10**6])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_row_once_an_epoch_with_its_own_values(tiny_cache, batch_tokens, split):
    with Loader(tiny_cache, HOOKS, split=split, batch_tokens=batch_tokens, epochs=2) as loader:
        batches = list(loader)
    assert [batch.step for batch in batches] == list(range(loader.n_steps))
    row = torch.cat([batch.row for batch in batches])
    expected = kept_rows(tiny_cache, split)
    n_rows = loader.n_rows
    assert sorted(row[:n_rows].tolist()) == sorted(row[n_rows:].tolist()) == expected
    for hook_name in HOOKS:
        x = torch.cat([batch.x[hook_name] for batch in batches])
        assert torch.equal(x, stored(tiny_cache, hook_name, split)[row])
    assert all(len(batch.row) == batch_tokens for batch in batches[:-1])


def test_special_tokens_are_kept_when_asked(tiny_cache):
    with Loader(tiny_cache, HOOKS[0], exclude_special_tokens=False) as loader:
        rows = torch.cat([batch.row for batch in loader])
    assert sorted(rows.tolist()) == list(range(tiny_cache.n_rows()))
    assert loader.n_rows > len(kept_rows(tiny_cache))


def test_resume_at_every_step(tiny_cache):
    settings = {"batch_tokens": 150, "seed": 7, "epochs": 2}
    whole = bits(Loader(tiny_cache, HOOKS[0], **settings))
    for step in range(len(whole) + 1):
        with Loader(tiny_cache, HOOKS[0], start_step=step, **settings) as resumed:
            assert bits(resumed) == whole[step:]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_concatenated_equal_one_rank(tiny_cache, world_size):
    settings = {"batch_tokens": 100, "seed": 1}
    whole = list(Loader(tiny_cache, HOOKS[0], **settings))
    ranks = [list(Loader(tiny_cache, HOOKS[0], rank=r, world_size=world_size, **settings)) for r in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.row for part in parts]), batch.row)
        assert torch.equal(torch.cat([part.x[HOOKS[0]] for part in parts]), batch.x[HOOKS[0]])


def test_seeds_and_epochs_have_orders_of_their_own(tiny_cache):
    orders = {tuple(torch.cat([b.row for b in Loader(tiny_cache, HOOKS[0], seed=s)]).tolist()) for s in range(3)}
    assert len(orders) == 3


def test_hooks_are_aligned_and_alone_or_together_give_the_same_rows(tiny_cache):
    together = list(Loader(tiny_cache, HOOKS, batch_tokens=64))
    for hook_name in HOOKS:
        alone = list(Loader(tiny_cache, hook_name, batch_tokens=64))
        assert all(torch.equal(a.x[hook_name], t.x[hook_name]) for a, t in zip(alone, together, strict=True))


def test_raw_caches_serve_the_same_batches(tiny_model, tiny_texts, tiny_cache, tmp_path):
    raw = harvest_tiny(tiny_model, tiny_texts, tmp_path / "raw", codec="raw")
    assert bits(Loader(raw, HOOKS)) == bits(Loader(tiny_cache, HOOKS))


def test_damage_is_an_error_at_the_batch_that_needs_it(tiny_model, tiny_texts, tmp_path):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    path = tmp_path / "c" / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c" / "2" / "0"
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard, match=r"chunk 0 \(rows 1024 to 1536\)"):
        list(Loader(cache, HOOKS[0]))


def test_closing_early_stops_the_threads(tiny_cache):
    before = set(threading.enumerate())
    with Loader(tiny_cache, HOOKS[0], batch_tokens=10) as loader:
        next(loader)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    "bad",
    [{"split": "test"}, {"batch_tokens": 0}, {"epochs": 0}, {"start_step": -1}, {"rank": 2, "world_size": 2}],
    ids=str,
)
def test_bad_arguments_are_named(tiny_cache, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Loader(tiny_cache, HOOKS[0], **bad)


def test_unknown_hook_and_empty_split_are_named(tiny_model, tiny_texts, tiny_cache, tmp_path):
    with pytest.raises(CacheMismatch, match="hook_attn_out"):
        Loader(tiny_cache, "blocks.7.hook_resid_post")
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", holdout=0.0)
    with pytest.raises(ConfigError, match="validation holds no rows"):
        Loader(cache, HOOKS[0], split="validation")
