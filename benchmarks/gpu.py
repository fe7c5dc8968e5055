"""A TopK step on CUDA beside its roofline, its kernels beside their bounds, and the peers' steps.

No figure from this file exists yet: it has not been run on a GPU.

Shapes of gpt2-small (d_in 768) and gemma-2-2b (2304) with random weights; d_sae 65,536, k 64, batch 8,192. `roofline`
counts what a step takes at least, at rates measured in the same run; `gpu_kernels` times the kernels. Each peer starts
at our weights and updates as `peers` says, on the same resident batch, in turn with ours, whose gradients are then
clipped as theirs are; those that are not installed are left out. A part that fails is reported in its place and the
others go on; the exit code is then 1.

    python -m benchmarks.gpu       needs CUDA, no network; one JSON object on stdout
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import ConfigError
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from benchmarks.gpu_kernels import measured_kernels
from benchmarks.measure import Say, installed, interleaved_seconds, machine, ratios
from benchmarks.peers import Step, comparable, dictionary_learning_step, saelens_step, saelens_trainer, sparsify_step
from benchmarks.roofline import PRECISIONS, REPEATS, Rates, Shape, measured_rates, roofline_seconds, step_bytes
from benchmarks.stream import CONTEXT_SIZE, HOOK, random_documents, random_gpt2
from trainer.config.settings import SAEConfig
from trainer.config.sweep import SweepConfig
from trainer.kernels.active import Workspace
from trainer.training.step import TrainState, initial_state, train_step

STEPS, N_TOKENS, LR = 5, 131_072, 1e-4
SAME_START = {"float32": 1e-4, "bfloat16": 1e-2}  # of float32 sums over d_in * batch squares; of bfloat16's rounding
PEERS, BFLOAT16_ONLY = ("sae_lens", "dictionary_learning", "sparsify"), ("sparsify",)
SHAPES = {"gpt2-small": Shape(d_in=768), "gemma-2-2b": Shape(d_in=2304)}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all was measured, 1 if there is no CUDA or a part failed; 2 (from argparse) for arguments."""
    argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__).parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: needs a CUDA device, torch finds none; run it where there is one", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for in deterministic mode
    found = run(_say)
    print(json.dumps(found))
    return 1 if found["failed"] else 0


def run(say: Say) -> dict[str, Any]:
    """Measure everything; returns what the JSON says."""
    parts = _Parts(say)
    rates = measured_rates()
    say(
        f"copy {rates.copy / 1e12:.2f} TB/s, " + ", ".join(f"{n} {r / 1e12:.0f} TFLOP/s" for n, r in rates.gemm.items())
    )
    found: dict[str, Any] = {"bench": "gpu", "rates": asdict(rates)}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            cache, feed = _harvested(shape, Path(folder))
            found[name] = {"shape": asdict(shape), **feed, **_measured(name, shape, cache, rates, parts)}
    return {**found, "failed": parts.failed, "machine": machine()}


class _Parts:
    """Runs the parts of a benchmark and remembers which failed; the others go on, for time on a GPU is dear."""

    def __init__(self, say: Say) -> None:
        self.say, self.failed = say, list[str]()

    def measured(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the part returns, or {"error": why it failed}."""
        try:
            found = part()
        except Exception as error:  # whatever a peer, a driver or a kernel that never ran raises
            traceback.print_exc()
            self.failed.append(name)
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        self.say(f"{name}: {json.dumps(found)}")
        return found


def _measured(name: str, shape: Shape, cache: Cache, rates: Rates, parts: _Parts) -> dict[str, Any]:
    """All of one shape."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        part = f"{name}, {precision}"
        try:
            config = _config(shape, precision, cache)
        except ConfigError as error:
            parts.say(f"{part}: left out, this trainer does not take it ({error})")
            continue
        x = next(_batches(shape, cache, config))
        steps = {
            "step": lambda config=config, precision=precision: _step(shape, precision, config, cache, rates),
            "deterministic": lambda config=config, x=x: _deterministic(config, x),
        }
        for peer in PEERS:
            if (precision == "bfloat16" or peer not in BFLOAT16_ONLY) and installed(peer, parts.say):
                steps[peer] = lambda peer=peer, config=config, x=x, p=precision: _against(peer, shape, p, config, x)
        found[precision] = {key: parts.measured(f"{part}, {key}", measure) for key, measure in steps.items()}
    found["kernels"] = parts.measured(f"{name}, kernels", lambda: measured_kernels(shape, rates))
    return found


def _step(shape: Shape, precision: str, config: SAEConfig, cache: Cache, rates: Rates) -> dict[str, Any]:
    """Our step on a resident batch and from the loader, beside its roofline."""
    feed, step = _batches(shape, cache, config), our_step(config)
    x = next(feed)
    _check_step(config, precision, x)
    torch.cuda.reset_peak_memory_stats()
    seconds = interleaved_seconds(
        {"resident": _repeated(step, lambda: x), "fed": _repeated(step, lambda: next(feed))}, REPEATS
    )
    resident, fed = (statistics.median(seconds[key]) / STEPS for key in ("resident", "fed"))
    bounds = {strict: roofline_seconds(shape, precision, rates, strict=strict) for strict in (False, True)}
    return {
        "resident_seconds": resident,
        "fed_seconds": fed,
        "fed_over_resident": ratios(seconds["resident"], seconds["fed"]),
        "tokens_per_second": shape.batch / resident,
        "roofline_seconds": bounds[False],
        "share_of_roofline": bounds[False] / resident,
        "strict_roofline_seconds": bounds[True],
        "share_of_strict_roofline": bounds[True] / resident,
        "bytes": step_bytes(shape, precision, strict=False),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def _deterministic(config: SAEConfig, x: Tensor) -> dict[str, Any]:
    """Whether steps repeat bit for bit, without and with torch's deterministic mode, and what that mode costs."""
    modes = {"plain": False, "deterministic": True}
    repeats = {f"{name}_repeats": _in_mode(is_on, lambda: _repeats(config, x)) for name, is_on in modes.items()}
    step = our_step(config)
    contenders = {
        name: lambda is_on=is_on: _in_mode(is_on, _repeated(step, lambda: x)) for name, is_on in modes.items()
    }
    seconds = interleaved_seconds(contenders, REPEATS)
    return {**repeats, "cost": ratios(seconds["deterministic"], seconds["plain"])}


def _in_mode(is_deterministic: bool, part: Callable[[], Any]) -> Any:
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        return part()
    finally:
        torch.use_deterministic_algorithms(False)


def _repeats(config: SAEConfig, x: Tensor) -> bool:
    """Whether two trainings of a few steps end with the same bits."""
    first, second = _trained(config, x), _trained(config, x)
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def _trained(config: SAEConfig, x: Tensor) -> Mapping[str, Tensor]:
    state, workspace = _state(config), Workspace()
    for _ in range(STEPS):
        train_step(state, x, workspace)
    return state.weights


def _against(peer: str, shape: Shape, precision: str, config: SAEConfig, x: Tensor) -> dict[str, Any]:
    """A peer's step in turn with ours."""
    config = comparable(config)
    ours, theirs = our_step(config), _peer_step(peer, shape, precision, config)
    errors = float(ours(x)), float(theirs(x))
    assert abs(errors[0] - errors[1]) <= SAME_START[precision] * errors[0], errors
    seconds = interleaved_seconds({"ours": _repeated(ours, lambda: x), peer: _repeated(theirs, lambda: x)}, REPEATS)
    return {"seconds": statistics.median(seconds[peer]) / STEPS, "ours_over_it": ratios(seconds[peer], seconds["ours"])}


def our_step(config: SAEConfig) -> Step:
    """One step of ours on a fresh state."""
    state, workspace = _state(config), Workspace()
    return lambda x: train_step(state, x, workspace).loss.mse


def _peer_step(peer: str, shape: Shape, precision: str, config: SAEConfig) -> Step:
    """A peer's step from our weights; autocast is its way to bfloat16."""
    weights, autocast = _state(config).weights, precision == "bfloat16"
    if peer == "sae_lens":
        return saelens_step(saelens_trainer(config, weights, shape.batch, autocast=autocast))
    if peer == "dictionary_learning":
        return dictionary_learning_step(config, weights, autocast=autocast)
    return sparsify_step(config, weights)


def _check_step(config: SAEConfig, precision: str, x: Tensor) -> None:
    """Three steps on a few rows begin at the losses of plain dense ones.

    A bfloat16 encoder chooses other latents where two are nearly equal, which costs next to nothing.
    """
    state, workspace, x = _state(config), Workspace(), x[:256]
    for _ in range(3):
        expected = _dense_loss(config, state.weights, x)
        loss = train_step(state, x, workspace).loss.total.item()
        assert abs(loss - expected) <= SAME_START[precision] * expected, (loss, expected)


@torch.no_grad()
def _dense_loss(config: SAEConfig, weights: Mapping[str, Tensor], x: Tensor) -> float:
    assert config.k is not None
    pre_acts = torch.addmm(weights["b_enc"], x - weights["b_dec"], weights["W_enc"].T)
    top = pre_acts.topk(config.k)
    feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    error = feature_acts @ weights["W_dec"] + weights["b_dec"] - x
    return (error.square().sum() / len(x) / config.total_variance).item()


def _harvested(shape: Shape, root: Path) -> tuple[Cache, dict[str, Any]]:
    """A cache of a random one-block model, with rows/s of the harvest and of the loader to the device."""
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0)
    model, documents = random_gpt2(1, shape.d_in), random_documents(N_TOKENS // CONTEXT_SIZE)
    start = time.perf_counter()
    cache = harvest(model, documents, config, root / "cache")
    harvested = time.perf_counter()
    with Loader(cache, HOOK, batch_tokens=shape.batch, epochs=3, device="cuda") as loader:
        n_rows = sum(len(batch.row) for batch in loader)
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    rates = {
        "harvest_rows_per_second": cache.n_rows() / (harvested - start),
        "loader_rows_per_second": n_rows / (loaded - harvested),
    }
    return cache, rates


def _batches(shape: Shape, cache: Cache, config: SAEConfig) -> Iterator[Tensor]:
    """Full batches for ever, as a training loop gets them: on the device, float32, multiplied by the input scale."""
    while True:
        with Loader(cache, HOOK, batch_tokens=shape.batch, epochs=100, device="cuda") as loader:
            for batch in loader:
                if len(batch.row) == shape.batch:
                    yield batch.x[HOOK].float().mul_(config.input_scale)


def _config(shape: Shape, precision: str, cache: Cache) -> SAEConfig:
    """The benched SAE. Raises ConfigError where the trainer has no setting for the encoder's precision."""
    run = {"name": "topk", "architecture": "topk", "hook_name": HOOK, "d_sae": shape.d_sae, "k": shape.k, "lr": LR}
    if precision != "float32":
        run["encoder_dtype"] = precision
    return SweepConfig.from_dict({"runs": [run]}).expand(cache, training_tokens=100_000_000)[0]


def _state(config: SAEConfig) -> TrainState:
    return initial_state(config, torch.zeros(config.d_in, device="cuda"))


def _repeated(step: Step, batch: Callable[[], Tensor]) -> Callable[[], None]:
    """STEPS steps, and the wait until they are done."""

    def steps() -> None:
        for _ in range(STEPS):
            step(batch())
        torch.cuda.synchronize()

    return steps


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
