"""A TopK step (512 -> 4096, k 32, batch 4096) against a plain torch step of the same maths, and fed by the loader.

Plain: dense autograd of the same loss, the same decoder projection and renormalisation, torch's fused Adam, on the same
batch in memory. The loader's batches come from a lossless cache of a random model's stream and special tokens are
dropped; the bound is the same step on one batch that stays in memory.

    actcache bench train
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.cache import Cache
from actcache.loader import Loader
from benchmarks.measure import Say, described, interleaved_seconds, machine, ratios
from benchmarks.stream import HOOK, random_stream
from trainer.config import SAEConfig
from trainer.kernels import Workspace
from trainer.optimiser import remove_parallel_gradient_, unit_norm_rows_
from trainer.sweep_file import SweepConfig
from trainer.train import StepOutcome, TrainState, initial_state, train_step

D_SAE, K, BATCH_TOKENS, REPEATS, STEPS, N_TOKENS = 4096, 32, 4096, 9, 3, 131_072


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        cache = random_stream(Path(folder) / "cache", N_TOKENS)
        config = sae_config(cache)
        x = next(scaled_batches(cache, config))
        _check(config, x)
        feed = scaled_batches(cache, config)
        seconds = interleaved_seconds(
            {
                "plain": _repeated(plain_step(config), lambda: x),
                "resident": _repeated(our_step(config), lambda: x),
                "fed": _repeated(our_step(config), lambda: next(feed)),
            },
            REPEATS,
        )
    found = {
        "ours_over_plain": ratios(seconds["plain"], seconds["resident"]),
        "fed_over_resident": ratios(seconds["resident"], seconds["fed"]),
    }
    rates = {f"{name}_tokens_per_second": STEPS * BATCH_TOKENS / float(np.median(s)) for name, s in seconds.items()}
    say(f"topk {x.shape[1]} -> {D_SAE}, k {K}, batch {BATCH_TOKENS}")
    say(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    say(described("speed over the plain step", found["ours_over_plain"]))
    say(described("step on a resident batch / step from the loader", found["fed_over_resident"]))
    return {"bench": "train", **found, **rates, "machine": machine()}


def sae_config(cache: Cache, name: str = "topk", lr: float = 1e-4, seed: int = 0) -> SAEConfig:
    """The benched SAE, resolved on a cache."""
    run = {"name": name, "architecture": "topk", "hook_name": HOOK, "d_sae": D_SAE, "k": K, "lr": lr, "seed": seed}
    return SweepConfig.from_dict({"runs": [run]}).expand(cache, training_tokens=10_000_000)[0]


def scaled_batches(cache: Cache, config: SAEConfig) -> Iterator[Tensor]:
    """Full batches for ever, as a training loop gets them: float32, multiplied by the input scale."""
    while True:
        for batch in Loader(cache, HOOK, batch_tokens=BATCH_TOKENS):
            if len(batch.row) == BATCH_TOKENS:
                yield batch.x[HOOK].float().mul_(config.input_scale)


def our_step(config: SAEConfig) -> Callable[[Tensor], StepOutcome]:
    """One step of ours on a fresh state."""
    state, workspace = _state(config), Workspace()
    return lambda x: train_step(state, x, workspace)


def plain_step(config: SAEConfig) -> Callable[[Tensor], float]:
    """One dense autograd step of the same maths on a fresh state; latents never die here, so AuxK is nothing."""
    state = _state(config)
    weights = state.weights

    def step(x: Tensor) -> float:
        pre_acts = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
        top = pre_acts.topk(K, sorted=False)
        feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        x_hat = feature_acts @ weights["W_dec"] + weights["b_dec"]
        loss = (x_hat - x).square().sum() / len(x) / config.total_variance
        loss.backward()
        remove_parallel_gradient_(weights["W_dec"])
        state.optimiser.step()
        state.optimiser.zero_grad(set_to_none=True)
        unit_norm_rows_(weights["W_dec"])
        return loss.item()

    return step


def _state(config: SAEConfig) -> TrainState:
    return initial_state(config, torch.zeros(config.d_in))


def _repeated(step: Callable[[Tensor], object], batch: Callable[[], Tensor]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(STEPS):
            step(batch())

    return steps


def _check(config: SAEConfig, x: Tensor) -> None:
    """Three steps of both give the same loss, to float32 rounding of sums over d_in * batch terms."""
    ours, plain = our_step(config), plain_step(config)
    for _ in range(3):
        mine = ours(x).loss.total.item()
        theirs = plain(x)
        assert abs(mine - theirs) <= 1e-4 * theirs, (mine, theirs)
