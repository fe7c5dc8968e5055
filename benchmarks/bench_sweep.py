"""A sweep of eight TopK SAEs (512 -> 4096, k 32, batch 4096) from a cache that is read once.

Bound: the eight steps on one batch that stays in memory, nothing read. Ours: `trainer.sweep`, from the loader, with its
metrics and checkpoints. Baseline: eight sweeps of one SAE each, reading the cache eight times.

    actcache bench sweep
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from actcache.cache import Cache
from benchmarks.bench_train import BATCH_TOKENS, D_SAE, K, our_step, sae_config, scaled_batches
from benchmarks.measure import Say, described, interleaved_seconds, machine, ratios
from benchmarks.stream import HOOK, random_stream
from trainer.sweep import train
from trainer.sweep_file import SweepConfig

N_SAES, STEPS, REPEATS, N_TOKENS = 8, 4, 5, 32_768


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        cache = random_stream(Path(folder) / "cache", N_TOKENS)
        outs = (Path(folder) / f"runs-{number}" for number in count())
        _check(cache, next(outs), next(outs))
        seconds = interleaved_seconds(
            {
                "resident": _resident(cache),
                "sweep": lambda: train(cache, _sweep(range(N_SAES)), next(outs)),
                "alone": lambda: [train(cache, _sweep([seed]), next(outs)) for seed in range(N_SAES)],
            },
            REPEATS,
        )
    found = {
        "sweep_over_resident": ratios(seconds["resident"], seconds["sweep"]),
        "sweep_over_alone": ratios(seconds["alone"], seconds["sweep"]),
    }
    n_sae_tokens = N_SAES * STEPS * BATCH_TOKENS
    rates = {f"{name}_sae_tokens_per_second": n_sae_tokens / float(np.median(s)) for name, s in seconds.items()}
    say(f"{N_SAES} topk SAEs, {STEPS} steps each, with checkpoints and export")
    say(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    say(described("resident steps / sweep", found["sweep_over_resident"]))
    say(described("speed over one SAE at a time", found["sweep_over_alone"]))
    return {"bench": "sweep", "saes": N_SAES, **found, **rates, "machine": machine()}


def _sweep(seeds: range | list[int]) -> SweepConfig:
    run = {"architecture": "topk", "hook_name": HOOK, "d_sae": D_SAE, "k": K, "lr": 1e-4}
    return SweepConfig.from_dict(
        {
            "batch_tokens": BATCH_TOKENS,
            "tokens": STEPS * BATCH_TOKENS,
            "runs": [{"name": f"seed-{seed}", "seed": seed, **run} for seed in seeds],
        }
    )


def _resident(cache: Cache) -> Callable[[], None]:
    config = sae_config(cache)
    x = next(scaled_batches(cache, config))
    steps = [our_step(config) for _ in range(N_SAES)]

    def run_resident() -> None:
        for _ in range(STEPS):
            for step in steps:
                step(x)

    return run_resident


def _check(cache: Cache, together: Path, alone: Path) -> None:
    """An SAE of the sweep ends equal to the same one trained alone."""
    train(cache, _sweep(range(N_SAES)), together)
    train(cache, _sweep([3]), alone)
    ours, theirs = (load_file(runs / "seed-3" / "sae" / "sae_weights.safetensors") for runs in (together, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
