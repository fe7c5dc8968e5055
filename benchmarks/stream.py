"""A cache of a 512-wide stream that costs seconds to make: one block of a random GPT-2 over random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from actcache.bundled import bundled_model_path
from actcache.cache import Cache
from actcache.harvester import harvest
from actcache.models import LanguageModel, wrap_model
from actcache.plan import HarvestConfig
from actcache.tokens import LoadedDataset

D_MODEL, CONTEXT_SIZE, HOOK = 512, 128, "blocks.0.hook_resid_post"


def random_gpt2(n_layers: int) -> LanguageModel:
    """A GPT-2 of random weights, 512 wide, with the bundled tokenizer; on CUDA if there is one."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    config = GPT2Config(
        n_embd=D_MODEL,
        n_layer=n_layers,
        n_head=8,
        n_positions=CONTEXT_SIZE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # pyright: ignore[reportArgumentType]: transformers' stub loses `self`
    return wrap_model(model, tokenizer, name=f"random-gpt2-{D_MODEL}x{n_layers}")


def random_documents(n_sequences: int) -> LoadedDataset:
    """Documents of token ids, each of which fills one sequence behind its BOS."""
    ids = np.random.default_rng(0).integers(1, 256, size=(n_sequences, CONTEXT_SIZE - 1))
    return LoadedDataset(Dataset.from_dict({"input_ids": ids.tolist()}))


def random_stream(out: Path, n_tokens: int) -> Cache:
    """Harvest HOOK of a one-block model, in the train split alone."""
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0)
    return harvest(random_gpt2(1), random_documents(n_tokens // CONTEXT_SIZE), config, out)
