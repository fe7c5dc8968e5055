"""The loop against transformers' own numbers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.harvesting import loop
from actcache.harvesting.window import Window

BATCH_SIZE = 8


def transformers_outputs(model_dir: Path, token_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Block outputs by plain hooks on the transformers module; nothing of actcache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {}
    keep = {
        HOOKS[0]: model.model.layers[0],
        HOOKS[1]: model.model.layers[1].self_attn,
        HOOKS[2]: model.model.layers[1],
    }
    for name, module in keep.items():
        module.register_forward_hook(
            lambda m, args, out, name=name: found.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(torch.from_numpy(token_ids).long())
    return found


def oracle(model_dir: Path, group: zarr.Group, split: str, shard_rows: int) -> dict[str, torch.Tensor]:
    """hook -> [sequence, position, d_in] in bfloat16, from the same forward batches, which restart at each shard."""
    sequences = group[f"{split}/sequences/id"][:]
    per_shard = shard_rows // sequences.shape[1]
    batches = []
    for first in range(0, len(sequences), per_shard):
        shard = sequences[first : first + per_shard]
        batches += [shard[i : i + BATCH_SIZE] for i in range(0, len(shard), BATCH_SIZE)]
    outputs = [transformers_outputs(model_dir, batch) for batch in batches]
    return {name: torch.cat([out[name] for out in outputs]).bfloat16() for name in HOOKS}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_equal_transformers_bit_for_bit(tiny_cache, tiny_llama_dir, split):
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")
    expected = oracle(tiny_llama_dir, group, split, tiny_cache.manifest.shard_rows)
    sequence, position = group[f"{split}/tokens/sequence"][:], group[f"{split}/tokens/position"][:]
    assert np.array_equal(group[f"{split}/tokens/id"][:], group[f"{split}/sequences/id"][:][sequence, position])
    flat = sequence.astype(np.int64) * tiny_cache.context_size + position
    assert sorted(flat.tolist()) == list(range(tiny_cache.n_rows(split))), "every position once"
    for name in HOOKS:
        stored = torch.from_numpy(group[f"{split}/{name}/acts"][:]).view(torch.bfloat16)
        assert torch.equal(stored, expected[name][sequence, position])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_store_what_the_model_gave(tiny_model, tiny_texts, tmp_path, dtype):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype=dtype, tokens=1000, codec="raw")
    sequences = torch.from_numpy(cache.sequences("train")[:BATCH_SIZE])
    x = tiny_model.activations(sequences, [HOOKS[2]])[HOOKS[2]].to(getattr(torch, dtype))
    group = zarr.open_group(cache.path / "acts.zarr", mode="r")["train"]
    sequence, position = group["tokens/sequence"][:], group["tokens/position"][:]
    first = sequence < BATCH_SIZE
    assert np.array_equal(group[f"{HOOKS[2]}/acts"][:][first], x.numpy()[sequence[first], position[first]])


@pytest.mark.parametrize(("cores", "n_windows"), [(1, 1), (2, 2)])
def test_a_model_that_leaves_no_core_has_one_window_and_the_same_bytes(
    tiny_model, tiny_texts, tiny_cache, tmp_path, monkeypatch, cores, n_windows
):
    """torch runs on one thread here."""
    made = []
    monkeypatch.setattr(loop, "Window", lambda *args: made.append(Window(*args)) or made[-1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert len(made) == n_windows
    assert promised_files(cache.path) == promised_files(tiny_cache.path)


def test_the_log_tells_each_stage_busy_and_waiting(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (log,) = (root / "log").glob("harvest-*.json")
    seconds = json.loads(log.read_text())["seconds"]
    assert seconds["n_tokens"] == 992
    for stage in ("model", "encode", "write"):
        assert seconds[f"{stage}_busy"] > 0
        assert seconds[f"{stage}_wait"] >= 0
        assert seconds[f"{stage}_busy"] <= seconds["total"]
    assert np.isclose(seconds["copy_busy"], 0), "nothing is copied on a CPU"
