"""An opened cache against zarr-python, and folders that are no cache, or not a whole one."""

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheMismatch, ConfigError, CorruptShard, ManifestError
from actcache.format.arrays import token_arrays
from actcache.format.manifest import rows_fingerprint
from actcache.interop.arrow_export import export_cache
from actcache.loading.loader import Loader
from actcache.loading.mixture import Mixture
from actcache.loading.stream import hook_bytes
from actcache.store.cache import Cache, open_cache, read_origin

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
    assert cache.identity["model"] == {**tiny_model.identity, "probe": tiny_model.probe()}
    assert (cache.compute["device"], cache.compute["batch_size"]) == ("cpu", 8)
    assert (cache.origin["model"], cache.origin["dataset"]["path"]) == (tiny_model.source, str(tiny_texts))
    with pytest.raises(CacheMismatch, match=r"got hook_name='blocks\.0\.hook_mlp_out'"):
        cache.hook_reader("train", "blocks.0.hook_mlp_out")


TAKE_A_SPLIT: dict[str, Callable[[Cache, str], object]] = {
    "n_rows": lambda cache, split: cache.n_rows(split),
    "Manifest.n_rows": lambda cache, split: cache.manifest.n_rows(split),
    "n_shards": lambda cache, split: cache.manifest.plan.n_shards(split),
    "rows_of": lambda cache, split: cache.manifest.plan.rows_of(split, 0),
    "rows_fingerprint": lambda cache, split: rows_fingerprint(cache.manifest, split, HOOKS[0]),
    "reader": lambda cache, split: cache.reader(split, token_arrays(cache.manifest.shard_rows)[0]),
    "hook_reader": lambda cache, split: cache.hook_reader(split, HOOKS[0]),
    "token_reader": lambda cache, split: cache.token_reader(split, "id"),
    "sequences": lambda cache, split: cache.sequences(split),
    "documents": lambda cache, split: cache.documents(split),
    "sequence_reader": lambda cache, split: cache.sequence_reader(split, "id"),
    "statistics": lambda cache, split: cache.statistics(HOOKS[0], split=split),
    "Loader": lambda cache, split: Loader(cache, HOOKS[0], split=split),
    "Mixture": lambda cache, split: Mixture([(cache, 1)], HOOKS[0], split=split),
    "hook_bytes": lambda cache, split: hook_bytes(cache, split, HOOKS[0], batch_rows=64),
    "export_cache": lambda cache, split: export_cache(cache, cache.path.with_name("exported"), split=split),
}


@pytest.mark.parametrize("call", TAKE_A_SPLIT.values(), ids=TAKE_A_SPLIT)
def test_a_split_that_no_cache_has_is_named(tiny_cache, call):
    for split in ("test", "Train", ""):
        with pytest.raises(ConfigError, match=f"^cache: split must be one of train, validation, got '{split}'$"):
            call(tiny_cache, split)


def test_a_row_filter_or_a_token_array_that_there_is_not_is_no_damage(tiny_cache):
    with pytest.raises(ConfigError, match="row_filter must be one of all, no_special_tokens, got 'special'"):
        tiny_cache.statistics(HOOKS[0], row_filter="special")
    with pytest.raises(ConfigError, match="name must be one of id, sequence, position, got 'document'"):
        tiny_cache.token_reader("train", "document")
    with pytest.raises(ConfigError, match="name must be one of id, document, got 'position'"):
        tiny_cache.sequence_reader("train", "position")


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


WRONG_ORIGINS = [None, [], 3, "x", {}, *({n: v} for n in ("model", "revision") for v in ([], 3, True, {"a": 1}))]


WRONG_DATASETS = ["x", [], {"path": float("inf")}, {"path": ["x"]}, {"path": "x", "more": 1e300}]


@pytest.mark.parametrize("wrong", [*WRONG_ORIGINS, *({"dataset": each} for each in WRONG_DATASETS)], ids=str)
def test_an_origin_of_other_types_is_asked_for(root, wrong):
    path = root / "log" / "origin.json"
    sound = json.loads(path.read_text()) if wrong else None
    path.write_text(json.dumps(sound | wrong if isinstance(wrong, dict) and sound else wrong))
    with pytest.raises(ManifestError, match="pass --model"):
        read_origin(root)


def test_an_origin_that_cannot_be_read_is_asked_for(root):
    assert read_origin(root) == json.loads((root / "log" / "origin.json").read_text())
    (root / "log" / "origin.json").unlink()
    with pytest.raises(ManifestError, match="pass --model"):
        read_origin(root)
