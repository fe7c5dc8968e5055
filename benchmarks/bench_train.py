"""Training steps (512 -> 4096, batch 4096, float32) against plain torch, SAELens, dictionary_learning and sparsify.

topk, k 32. Ours on one batch in memory and from the loader. plain: dense autograd of the same loss and update with
torch's fused Adam; embedding_bag: the same with that as its decoder. saelens: its SAETrainer, on the batch in memory,
with its sparse activations, and from its ActivationsStore over an Arrow cache of the same rows, as its cached training
runs. All start at the same weights and take the same 20 batches before they are timed, after which the mean squared
errors must agree within 1 %; `peers` says how the updates are made equal. No latent dies in these steps, so AuxK only
counts; a second comparison calls a latent dead that did not fire in the batch before, where both pay for AuxK.

With the pre-activations ranked in bfloat16 (encoder_dtype): against float32 and SAELens, and what either explains after
100 steps.

standard and jumprelu, in memory: against SAELens where 3 % of the latents are active, and against our own dense path
where more are. The encoder's biases, or the thresholds, put the share there.

How a topk step grows with d_sae, k and the batch: ours alone.

    actcache bench train
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from benchmarks.measure import Say, described, installed, interleaved_seconds, machine, ratios
from benchmarks.peers import (
    Step,
    comparable,
    dictionary_learning_step,
    saelens_step,
    saelens_store,
    saelens_trainer,
    sparsify_step,
)
from benchmarks.stream import HOOK, random_stream
from trainer.config.settings import SAEConfig
from trainer.config.sweep import SweepConfig
from trainer.kernels.active import Workspace
from trainer.sae import architectures
from trainer.training.optimizer import remove_parallel_gradient_, unit_norm_rows_
from trainer.training.step import TrainState, initial_state, train_step

D_SAE, K, BATCH_TOKENS, N_TOKENS = 4096, 32, 4096, 131_072
WARM_UP_STEPS, REPEATS, STEPS = 20, 5, 4
GROUP_STEPS = N_TOKENS // BATCH_TOKENS  # all rows of the cache, which are one group of the loader
SAME_START = 1e-4  # of a float32 sum over d_in * batch squares, in any order
SAME_END = 0.01
FEW_STEPS = 3  # taken and checked before what is not measured against the peers, and where AuxK makes steps long
BFLOAT16_STEPS = 100
SPARSE_SHARE, DENSER_SHARES = 0.03, (0.12, 0.2)  # of the latents, active; from 1/8 on ours is dense too
GROWTH: dict[str, dict[str, Any]] = {
    "d_sae": {},
    "d_sae x4": {"d_sae": 4 * D_SAE},
    "d_sae x16": {"d_sae": 16 * D_SAE},
    "k 16": {"k": 16},
    "k 64": {"k": 64},
    "k 128": {"k": 128},
    "batch / 4": {"batch": BATCH_TOKENS // 4},
    "batch x4": {"batch": 4 * BATCH_TOKENS},
}
GROWTH_REPEATS = 3
PENALISED_LR = 1e-6  # so small that the share of active latents stays where it is put
PENALISED = {"standard": 5.0, "jumprelu": 1e-3}  # the sparsity coefficient


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        cache = random_stream(Path(folder) / "cache", N_TOKENS)
        found: dict[str, Any] = {
            "topk": _topk(cache, Path(folder), say),
            "topk, bfloat16 encoder": _bfloat16(cache, say),
        }
        if installed("sae_lens", say):
            found["topk, AuxK at work"] = _aux_k(cache, say)
        for architecture in PENALISED:
            found[architecture] = _penalised(cache, architecture, say)
        found["growth"] = _growth(cache, say)
    return {"bench": "train", **found, "machine": machine()}


def sae_config(cache: Cache, architecture: str = "topk", **changes: Any) -> SAEConfig:
    """The benched SAE, resolved on a cache."""
    run = {"name": architecture, "architecture": architecture, "hook_name": HOOK, "d_sae": D_SAE, "lr": 1e-4}
    own = {"k": K} if architecture == "topk" else {"sparsity_warm_up_steps": 0}
    if architecture == "jumprelu":
        own |= {"lr_warm_up_steps": 0}
    sweep = SweepConfig.from_dict({"runs": [run | own | changes]})
    return sweep.expand(cache, training_tokens=10_000_000)[0]


def scaled_batches(cache: Cache, config: SAEConfig) -> Iterator[Tensor]:
    """Full batches for ever, as a training loop gets them: float32, multiplied by the input scale."""
    while True:
        for batch in Loader(cache, HOOK, batch_tokens=BATCH_TOKENS):
            if len(batch.row) == BATCH_TOKENS:
                yield batch.x[HOOK].float().mul_(config.input_scale)


def fresh_state(config: SAEConfig) -> TrainState:
    """The state before the first step, b_dec at 0."""
    return initial_state(config, torch.zeros(config.d_in))


def our_step(state: TrainState) -> Step:
    """One step of ours."""
    workspace = Workspace()
    return lambda x: train_step(state, x, workspace).loss.mse.item()


def plain_step(state: TrainState, decode: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """One autograd step of the same maths; latents never die here, so AuxK is nothing.

    decode: from (values [batch, k], latents [batch, k], W_dec) to x_hat less b_dec.
    """
    weights, config, k = state.weights, state.config, state.config.k
    assert k is not None

    def step(x: Tensor) -> float:
        pre_acts = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
        top = pre_acts.topk(k, sorted=False)
        x_hat = decode(top.values.relu(), top.indices, weights["W_dec"]) + weights["b_dec"]
        mse = (x_hat - x).square().sum() / len(x)
        (mse / config.total_variance).backward()
        remove_parallel_gradient_(weights["W_dec"])
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        unit_norm_rows_(weights["W_dec"])
        return mse.item()

    return step


def dense_decode(values: Tensor, latents: Tensor, W_dec: Tensor) -> Tensor:
    """By a dense product."""
    return values.new_zeros(len(values), len(W_dec)).scatter(1, latents, values) @ W_dec


def bag_decode(values: Tensor, latents: Tensor, W_dec: Tensor) -> Tensor:
    """By torch's embedding_bag."""
    return embedding_bag(latents, W_dec, per_sample_weights=values, mode="sum")


def _topk(cache: Cache, folder: Path, say: Say) -> dict[str, Any]:
    config = comparable(sae_config(cache))
    feed = scaled_batches(cache, config)
    batches = list(islice(feed, WARM_UP_STEPS))
    steps, sources = _ours_and_plain(config) | _peer_steps(config, say), {"fed": lambda: next(feed)}
    if "saelens_cached" in steps:
        store = saelens_store(folder / "arrow", cache, batch_tokens=BATCH_TOKENS, buffer_rows=BATCH_TOKENS)
        sources["saelens_cached"] = lambda: next(store).mul_(config.input_scale)  # no copy, as its own scaler makes
    errors = checked(steps, batches)
    resident = {name: step for name, step in steps.items() if name not in sources}
    seconds = interleaved_seconds(_turns(resident, batches[0], {}), REPEATS)
    say(f"topk {config.d_in} -> {D_SAE}, k {K}, batch {BATCH_TOKENS}")
    found = _described(seconds, say)
    served = {name: step for name, step in steps.items() if name in ("ours", *sources)}
    seconds = interleaved_seconds(_turns(served, batches[0], sources, GROUP_STEPS), REPEATS)
    say(f"the same, {GROUP_STEPS} steps at a time: all that the loader decodes at once")
    found["from caches"] = _described(seconds, say, first="fed", n_steps=GROUP_STEPS)
    return {**found, "errors": errors}


def _ours_and_plain(config: SAEConfig) -> dict[str, Step]:
    return {
        "ours": our_step(fresh_state(config)),
        "fed": our_step(fresh_state(config)),
        "plain": plain_step(fresh_state(config), dense_decode),
        "embedding_bag": plain_step(fresh_state(config), bag_decode),
    }


def _peer_steps(config: SAEConfig, say: Say) -> dict[str, Step]:
    """A step of each peer that is installed."""
    start = fresh_state(config).weights
    steps: dict[str, Step] = {}
    if installed("sae_lens", say):
        for name in ("saelens", "saelens_cached"):
            steps[name] = saelens_step(saelens_trainer(config, start, BATCH_TOKENS))
        steps["saelens_sparse"] = saelens_step(saelens_trainer(config, start, BATCH_TOKENS, sparse=True))
    if installed("dictionary_learning", say):
        steps["dictionary_learning"] = dictionary_learning_step(config, start)
    if installed("sparsify", say):
        steps["sparsify"] = sparsify_step(config, start)
    return steps


def checked(steps: Mapping[str, Step], batches: Sequence[Tensor]) -> dict[str, float]:
    """The error E||x - x_hat||^2 of each on the last batch, after every one has been stepped on all of them.

    On the first batch they must agree to rounding, on the last within `SAME_END`.
    """
    errors = {name: [float(step(x)) for x in batches] for name, step in steps.items()}
    ours = errors["ours"]
    for name, error in errors.items():
        assert abs(error[0] - ours[0]) <= SAME_START * ours[0], (name, error[0], ours[0])
        assert abs(error[-1] - ours[-1]) <= SAME_END * ours[-1], (name, error[-1], ours[-1])
    return {name: error[-1] for name, error in errors.items()}


def _turns(
    steps: Mapping[str, Step], x: Tensor, sources: Mapping[str, Callable[[], Tensor]], n_steps: int = STEPS
) -> dict[str, Callable[[], None]]:
    """What is timed: a few steps of each, on x unless it has a source of its own."""
    return {name: partial(_take_steps, step, sources.get(name, lambda: x), n_steps) for name, step in steps.items()}


def _take_steps(step: Step, batch: Callable[[], Tensor], n_steps: int) -> None:
    for _ in range(n_steps):
        step(batch())


def _described(
    seconds: Mapping[str, Sequence[float]], say: Say, first: str = "ours", n_steps: int = STEPS
) -> dict[str, Any]:
    """Rates, and how many times as long a step of each other contender takes as that of the first."""
    rates = {name: n_steps * BATCH_TOKENS / float(np.median(spent)) for name, spent in seconds.items()}
    say("  tokens/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    times = {name: ratios(spent, seconds[first]) for name, spent in seconds.items() if name != first}
    for name, ratio in times.items():
        say("  " + described(f"speed of {first} over {name}", ratio))
    return {"tokens_per_second": rates, f"{first}_over": times}


def _bfloat16(cache: Cache, say: Say) -> dict[str, Any]:
    """Ours with the pre-activations ranked in bfloat16, and what that does to the variance explained while training."""
    config = comparable(sae_config(cache))
    exact, short = fresh_state(config), fresh_state(replace(config, encoder_dtype="bfloat16"))
    steps = {"float32": our_step(exact), "ours": our_step(short)}
    feed = scaled_batches(cache, config)
    errors = [{name: float(step(x)) for name, step in steps.items()} for x in islice(feed, BFLOAT16_STEPS)]
    explained = {name: 1 - error / config.total_variance for name, error in errors[-1].items()}
    if installed("sae_lens", say):
        steps["saelens"] = saelens_step(saelens_trainer(config, exact.weights, BATCH_TOKENS))
    seconds = interleaved_seconds(_turns(steps, next(feed), {}), REPEATS)
    say(f"topk, encoder in bfloat16; explained variance of batch {BFLOAT16_STEPS}: {explained}")
    return {**_described(seconds, say), "explained_variance": explained}


def _aux_k(cache: Cache, say: Say) -> dict[str, Any]:
    """Ours and SAELens where latents that did not fire in the batch before are dead, by both counts."""
    config = replace(comparable(sae_config(cache)), dead_window=1)
    state = fresh_state(config)
    trainer = saelens_trainer(config, state.weights, BATCH_TOKENS)
    steps = {"ours": our_step(state), "saelens": saelens_step(trainer)}
    batches = list(islice(scaled_batches(cache, config), FEW_STEPS))
    errors = checked(steps, batches)
    seconds = interleaved_seconds(_turns(steps, batches[0], {}), REPEATS)
    dead = {"ours": int(state.dead.sum()), "saelens": int(trainer.dead_neurons.sum())}
    say(f"topk with AuxK at work; dead at the end: {dead}")
    return {**_described(seconds, say), "errors": errors, "dead": dead}


def _penalised(cache: Cache, architecture: str, say: Say) -> dict[str, Any]:
    penalty = {"sparsity_coefficient": PENALISED[architecture], "lr": PENALISED_LR}
    config = comparable(sae_config(cache, architecture, **penalty))
    batches = list(islice(scaled_batches(cache, config), WARM_UP_STEPS))
    found: dict[str, Any] = {}
    if installed("sae_lens", say):
        found["sparse"] = _against_saelens(config, batches, say)
    for share in DENSER_SHARES:
        found[f"{share:.0%} active"] = _against_dense(config, batches, share, say)
    return found


def _against_saelens(config: SAEConfig, batches: Sequence[Tensor], say: Say) -> dict[str, Any]:
    state = started_at(config, batches[0], SPARSE_SHARE)
    steps = {"saelens": saelens_step(saelens_trainer(config, state.weights, BATCH_TOKENS)), "ours": our_step(state)}
    errors = checked(steps, batches)
    seconds = interleaved_seconds(_turns(steps, batches[0], {}), REPEATS)
    l0 = _l0(state, batches[0])
    assert l0 < 0.05 * D_SAE, l0
    say(f"{config.architecture}, L0 {l0:.0f}")
    return {**_described(seconds, say), "l0": l0, "errors": errors}


def _against_dense(config: SAEConfig, batches: Sequence[Tensor], share: float, say: Say) -> dict[str, Any]:
    state = started_at(config, batches[0], share)
    steps = {"ours": our_step(state), "dense": our_dense_step(started_at(config, batches[0], share))}
    checked(steps, batches[:FEW_STEPS])
    seconds = interleaved_seconds(_turns(steps, batches[0], {}), REPEATS)
    l0 = _l0(state, batches[0])
    say(f"{config.architecture}, L0 {l0:.0f}, against our dense path")
    return {**_described(seconds, say), "l0": l0}


def started_at(config: SAEConfig, x: Tensor, share: float) -> TrainState:
    """A fresh state whose biases (standard) or thresholds (jumprelu) let each latent fire on this share of the rows."""
    state = fresh_state(config)
    with torch.no_grad():
        pre_acts = x[:1024] @ state.weights["W_enc"].T
        cut = pre_acts.kthvalue(math.ceil((1 - share) * len(pre_acts)), dim=0).values
        if config.architecture == "standard":
            state.weights["b_enc"].copy_(-cut)
        else:
            state.weights["threshold"].copy_(cut.clamp_min(1e-3))
    return state


def our_dense_step(state: TrainState) -> Step:
    """One step of ours that goes the dense way however few latents are active."""
    step = our_step(state)

    def dense(x: Tensor) -> Tensor | float:
        with _no_share_is_sparse():
            return step(x)

    return dense


@contextmanager
def _no_share_is_sparse() -> Iterator[None]:
    usual = architectures.DENSEST_SPARSE
    architectures.DENSEST_SPARSE = 0.0
    try:
        yield
    finally:
        architectures.DENSEST_SPARSE = usual


def _l0(state: TrainState, x: Tensor) -> float:
    return int(train_step(state, x, Workspace()).n_active) / len(x)


def _growth(cache: Cache, say: Say) -> dict[str, float]:
    """Tokens/s of our topk step at other widths, k and batches, one at a time."""
    turns, sizes = {}, {}
    rows = torch.cat(list(islice(scaled_batches(cache, sae_config(cache)), 4)))
    for name, change in GROWTH.items():
        sizes[name] = change.get("batch", BATCH_TOKENS)
        config = sae_config(cache, **{key: value for key, value in change.items() if key != "batch"})
        turns[name] = partial(our_step(fresh_state(config)), rows[: sizes[name]])
    seconds = interleaved_seconds(turns, GROWTH_REPEATS)
    rates = {name: sizes[name] / float(np.median(spent)) for name, spent in seconds.items()}
    say("growth, tokens/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    return rates
