import json

import numpy as np
import torch
import zarr
from support.tiny_caches import HOOKS


def test_harvest_from_python_takes_a_loaded_model(tiny_llama_dir, tiny_texts, tiny_cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import actcache

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    settings = {"context_size": 16, "holdout": 0.2, "batch_size": 8}
    cache = actcache.harvest(model, tokenizer, texts, HOOKS, tmp_path / "c", **settings)
    assert cache.identity["model"] == tiny_cache.identity["model"]
    ours, theirs = (zarr.open_group(c.path / "acts.zarr", mode="r")["train"] for c in (cache, tiny_cache))
    assert np.array_equal(ours[f"{HOOKS[1]}/acts"][:], theirs[f"{HOOKS[1]}/acts"][:])
