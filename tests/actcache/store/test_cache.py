"""An opened cache against zarr-python, and folders that are no cache, or not a whole one."""

import json
import shutil

import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheMismatch, CorruptShard, ManifestError
from actcache.store.cache import open_cache, read_origin

MANIFEST = "manifest/cache.json"


@pytest.fixture
def root(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache.path, tmp_path / "c")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_it_reads_is_what_zarr_reads(tiny_cache, split):
    cache = open_cache(tiny_cache.path)
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")[split]
    n_rows = cache.n_rows(split)
    for hook_name in cache.hook_names:
        stored = group[f"{hook_name}/acts"]
        assert stored.shape == (n_rows, cache.hook(hook_name).d_in)
        theirs = torch.from_numpy(stored[:]).view(torch.bfloat16)
        assert torch.equal(cache.hook_reader(split, hook_name).read(0, n_rows), theirs)
    for name in ("id", "sequence", "position"):
        assert np.array_equal(cache.token_reader(split, name).read(0, n_rows), group[f"tokens/{name}"][:])
    assert np.array_equal(cache.sequences(split), group["sequences/id"][:])
    assert np.array_equal(cache.documents(split), group["sequences/document"][:])


def test_what_it_says_of_itself(tiny_cache, tiny_model, tiny_texts):
    cache = open_cache(tiny_cache.path)
    assert cache.hook_names == tuple(sorted(HOOKS))
    assert (cache.context_size, cache.identity["codec"], cache.identity["dtype"]) == (16, "lossless", "bfloat16")
    assert set(cache.special_token_ids) == set(tiny_model.tokenizer.all_special_ids)
    assert cache.identity["model"] == tiny_model.identity
    assert (cache.compute["device"], cache.compute["batch_size"]) == ("cpu", 8)
    assert (cache.origin["model"], cache.origin["dataset"]["path"]) == (tiny_model.source, str(tiny_texts))
    with pytest.raises(CacheMismatch, match=r"got hook_name='blocks\.0\.hook_mlp_out'"):
        cache.hook_reader("train", "blocks.0.hook_mlp_out")


def test_what_is_no_cache_is_refused(root, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        with pytest.raises(ManifestError, match="not a cache"):
            open_cache(path)
    (root / MANIFEST).unlink()
    with pytest.raises(ManifestError, match="unfinished; run the same command again"):
        open_cache(root)
    (root / MANIFEST).mkdir()
    with pytest.raises(ManifestError, match="no regular file"):
        open_cache(root)


def test_a_changed_byte_of_the_manifest_is_found(root):
    damaged = bytearray((root / MANIFEST).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (root / MANIFEST).write_bytes(damaged)
    with pytest.raises(ManifestError, match="its checksum does not match its bytes"):
        open_cache(root)


@pytest.mark.parametrize(
    "key", [f"train/{HOOKS[0]}/acts/c/1/0", "validation/sequences/id/c/0/0", "train/tokens/id/c/0"]
)
def test_a_shard_that_is_cut_or_gone_is_found_at_once(root, key):
    path = root / "acts.zarr" / key
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptShard, match=f"must be {len(whole)} bytes long, is {len(whole) - 1} bytes"):
        open_cache(root)
    path.unlink()
    with pytest.raises(CorruptShard, match="is missing or no file"):
        open_cache(root)


def test_parts_of_two_caches_are_told_apart(root, tiny_model, tiny_texts, tmp_path):
    other = harvest_tiny(tiny_model, tiny_texts, tmp_path / "other", seed=1, tokens=640).path
    key = f"stats/train/{HOOKS[0]}.json"
    own = (root / key).read_bytes()
    shutil.copy(other / key, root / key)
    with pytest.raises(ManifestError, match="another cache's statistics"):
        open_cache(root).statistics(HOOKS[0])
    (root / key).write_bytes(own)
    assert open_cache(root).statistics(HOOKS[0]).n_rows > 0
    shutil.copy(other / "acts.zarr" / "zarr.json", root / "acts.zarr" / "zarr.json")
    with pytest.raises(ManifestError, match="two caches were mixed"):
        open_cache(root)


def test_an_origin_that_cannot_be_read_is_asked_for(root):
    assert read_origin(root) == json.loads((root / "log" / "origin.json").read_text())
    (root / "log" / "origin.json").unlink()
    with pytest.raises(ManifestError, match="pass --model"):
        read_origin(root)
