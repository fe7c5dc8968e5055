"""The harvest of three hooks against the bare forward pass to the same hook, on the same sequences and threads.

Bound: the transformers module run over the same batches, stopped after the last hook, nothing kept. Ours: the whole
`harvest` call, from the dataset to the finished cache. The model is a GPT-2 of six blocks, 512 wide (38 MFLOP per token
in the blocks), with random weights: speed does not depend on them.

    actcache bench harvest
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.cache import Cache
from actcache.harvester import harvest
from actcache.models import LanguageModel
from actcache.plan import HarvestConfig
from benchmarks.measure import Say, described, interleaved_seconds, machine, ratios
from benchmarks.stream import CONTEXT_SIZE, D_MODEL, random_documents, random_gpt2

N_LAYERS, BATCH_SIZE, N_SEQUENCES, REPEATS = 6, 32, 512, 7  # a shard of this cache is one batch
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (1, 3, 5))
MFLOP_PER_TOKEN = 2 * 12 * N_LAYERS * D_MODEL**2 / 1e6


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    model, dataset = random_gpt2(N_LAYERS), random_documents(N_SEQUENCES)
    with tempfile.TemporaryDirectory() as folder:
        outs = (Path(folder) / str(number) for number in count())
        config = HarvestConfig(hook_names=HOOKS, context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, holdout=0.0)
        cache = harvest(model, dataset, config, next(outs))
        _check(cache, model)
        bare = _bare_forward(model, torch.from_numpy(cache.sequences("train")))
        seconds = interleaved_seconds(
            {"bare": bare, "ours": lambda: harvest(model, dataset, config, next(outs))}, REPEATS
        )
    found = ratios(seconds["bare"], seconds["ours"])
    n_tokens = N_SEQUENCES * CONTEXT_SIZE
    rates = {f"{name}_tokens_per_second": n_tokens / float(np.median(s)) for name, s in seconds.items()}
    say(f"model: {MFLOP_PER_TOKEN:.0f} MFLOP per token, {len(HOOKS)} hooks, {n_tokens} tokens a run")
    say(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    say(described("harvest / bare forward", found))
    return {"bench": "harvest", "hooks": len(HOOKS), "ratio": found, **rates, "machine": machine()}


def _bare_forward(model: LanguageModel, sequences: torch.Tensor) -> Callable[[], None]:
    """The same batches with hooks that keep nothing, through the same early stop."""

    def run_bare() -> None:
        for batch in sequences.split(BATCH_SIZE):
            model.activations(batch, HOOKS[-1:])
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run_bare


def _check(cache: Cache, model: LanguageModel) -> None:
    """The stored rows of the first batch are the model's, in bfloat16."""
    rows = cache.manifest.shard_rows
    sequence = cache.token_reader("train", "sequence").read(0, rows)
    position = cache.token_reader("train", "position").read(0, rows)
    first = sequence < BATCH_SIZE
    x = model.activations(torch.from_numpy(cache.sequences("train")[:BATCH_SIZE]), HOOKS)
    for hook_name in HOOKS:
        stored = torch.from_numpy(cache.hook_reader("train", hook_name).read(0, rows)[first]).view(torch.bfloat16)
        assert torch.equal(stored, x[hook_name].bfloat16().cpu()[sequence[first], position[first]])
