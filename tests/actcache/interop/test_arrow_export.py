"""A split as SAELens' Arrow cache: its store reads every row, and it comes back to the last bit."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.arrow_caches import arrow_folder, column, config, in_token_order
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheLocked, CacheMismatch, DatasetError
from actcache.interop.arrow_export import export_cache
from actcache.interop.arrow_import import import_cache


class Killed(BaseException):
    pass


def store_of(path: Path, hook_name: str, d_in: int, context_size: int, n_tokens: int) -> Any:
    """SAELens' store over an Arrow cache, in reads of 4 sequences."""
    from sae_lens import ActivationsStore, CacheActivationsRunnerConfig

    settings = CacheActivationsRunnerConfig(
        dataset_path="in memory",
        model_name="in memory",
        model_batch_size=4,
        hook_name=hook_name,
        d_in=d_in,
        training_tokens=n_tokens,
        context_size=context_size,
        new_cached_activations_path=str(path),
        device="cpu",
    )
    return ActivationsStore.from_cache_activations(None, settings)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_saelens_store_reads_every_row_of_an_export(split, tiny_cache, tmp_path):
    out = export_cache(tiny_cache, tmp_path / "arrow", split=split)
    n_rows = tiny_cache.n_rows(split)
    for hook_name in HOOKS:
        store = store_of(out, hook_name, 32, tiny_cache.context_size, n_rows)
        expected = in_token_order(tiny_cache, split, hook_name).flatten(0, 1).float()
        n_reads = n_rows // (4 * tiny_cache.context_size)
        parts = [store.get_raw_llm_batch() for _ in range(n_reads)]
        assert torch.equal(torch.cat([x for x, _ in parts]), expected[: n_reads * 4 * tiny_cache.context_size])
        token_ids = torch.cat([ids for _, ids in parts])
        whole = torch.from_numpy(tiny_cache.sequences(split)).flatten()[: len(token_ids)]
        assert torch.equal(token_ids.long(), whole.long())


def test_saelens_trains_from_an_export(tiny_cache, tmp_path):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    out = export_cache(tiny_cache, tmp_path / "arrow")
    store = store_of(out, HOOKS[2], 32, tiny_cache.context_size, tiny_cache.n_rows())
    store.train_batch_size_tokens, store.n_batches_in_buffer = 64, 16
    settings = SAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        lr=1e-2,
        lr_end=1e-3,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=10,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4))
    x = in_token_order(tiny_cache, "train", HOOKS[2]).flatten(0, 1).float()
    with torch.no_grad():
        before = (sae(x) - x).square().sum()
    SAETrainer(cfg=settings, sae=sae, data_provider=store).fit()
    with torch.no_grad():
        assert (sae(x) - x).square().sum() < before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrow_to_cache_to_arrow_changes_no_bit(dtype, tmp_path):
    source = arrow_folder(tmp_path / "arrow", dtype=dtype)
    cache = import_cache(source, config(holdout=0.0), tmp_path / "cache")
    out = export_cache(cache, tmp_path / "back")
    there, back = (datasets.load_from_disk(str(path)) for path in (source, out))
    assert back.features == there.features.__class__({name: there.features[name] for name in back.column_names})
    for name in there.column_names:
        assert np.array_equal(column(source, name).view(np.uint8), column(out, name).view(np.uint8))


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_cache_to_arrow_to_cache_changes_no_value(codec, tiny_model, tiny_texts, tmp_path):
    """bfloat16 through float32 columns; of int8, the values that are read."""
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", codec=codec, tokens=1024)
    out = export_cache(cache, tmp_path / "arrow")
    back = import_cache(out, config(dtype="bfloat16", holdout=0.0), tmp_path / "back")
    assert np.array_equal(back.sequences("train"), cache.sequences("train"))
    for hook_name in HOOKS:
        assert torch.equal(in_token_order(back, "train", hook_name), in_token_order(cache, "train", hook_name))


def test_sequences_that_end_in_the_next_shard_are_whole(tiny_model, tiny_texts, tmp_path):
    """Contexts of 24 in shards of 128 rows: every shard begins inside a sequence but the first of three."""
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", context_size=24, batch_size=5, tokens=1200)
    assert cache.manifest.shard_rows % 24
    assert len(cache.manifest.shards["train"]) > 2
    calls: list[tuple[int, int]] = []
    out = export_cache(cache, tmp_path / "arrow", progress=lambda *call: calls.append(call))
    expected = in_token_order(cache, "train", HOOKS[0]).float().numpy()
    assert np.array_equal(column(out, HOOKS[0]).astype(np.float32), expected)
    assert np.array_equal(column(out, "token_ids"), cache.sequences("train"))
    assert calls[-1] == (cache.n_rows(), cache.n_rows())


def test_an_export_is_there_whole_or_not_at_all_and_once(tiny_cache, tmp_path):
    def kill(*_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        export_cache(tiny_cache, tmp_path / "arrow", progress=kill)
    assert not (tmp_path / "arrow").exists()
    out = export_cache(tiny_cache, tmp_path / "arrow")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrow"]
    assert {"dataset_info.json", "state.json"} < {path.name for path in out.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export_cache(tiny_cache, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(CacheMismatch, match=r"must be new or empty, it holds data-00000\.arrow"):
        export_cache(tiny_cache, out, split="validation")
    with pytest.raises(CacheMismatch, match="must be a folder, is a file"):
        export_cache(tiny_cache, out / "state.json")


def test_two_exports_into_one_folder_harm_nothing(tiny_cache, tmp_path):
    expected = written_files(export_cache(tiny_cache, tmp_path / "alone"))
    refused = []

    def begin_another(*_: int) -> None:
        with pytest.raises(CacheLocked, match=r"/arrow: another process is writing it; wait for it, or pass another"):
            export_cache(tiny_cache, tmp_path / "arrow", split="validation")
        refused.append(True)

    out = export_cache(tiny_cache, tmp_path / "arrow", progress=begin_another)
    assert refused
    assert written_files(out) == expected


def written_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_empty_split_has_nothing_to_export(tmp_path):
    cache = import_cache(arrow_folder(tmp_path / "arrow"), config(holdout=0.0), tmp_path / "cache")
    with pytest.raises(DatasetError, match=r"validation of .* holds no rows"):
        export_cache(cache, tmp_path / "out", split="validation")


def test_info_and_state_are_what_datasets_writes(tiny_cache, tmp_path):
    out = export_cache(tiny_cache, tmp_path / "arrow")
    rows = datasets.load_from_disk(str(out))
    rows.save_to_disk(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((path / "state.json").read_text()) for path in (out, tmp_path / "theirs"))
    assert set(ours) == set(theirs)
    for key in set(theirs) - {"_data_files", "_fingerprint"}:
        assert ours[key] == theirs[key]
    assert rows.features == datasets.load_from_disk(str(tmp_path / "theirs")).features
