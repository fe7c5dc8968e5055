"""A TopK step on CUDA beside its roofline, its kernels beside their bounds, and the peers' steps.

No figure from this file exists yet: it has not been run on a GPU.

Shapes of gpt2-small (d_in 768) and gemma-2-2b (2304) with random weights; d_sae 65,536, k 64, batch 8,192. `roofline`
counts what a step takes at least, at rates measured in the same run; `gpu_kernels` times the kernels. Each peer starts
at our weights and updates as `peers` says, on the same resident batch, in turn with ours, whose gradients are then
clipped as theirs are; those that are not installed are left out.

`gpu_parts` runs each part in a process of its own, and all of them in under ten minutes, what matters most first. A
part that fails, or that there is no time for, says so in its row, and its name is in "failed"; the exit code is then 1.
Without the rates the shares are null. Without a cache steps train on random rows, and what the loader feeds is null.
When interrupted it prints what there is.

    python -m benchmarks.gpu       needs CUDA, no network; one JSON object on stdout
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import Loader
from actcache.store.cache import Cache, open_cache
from benchmarks.gpu_kernels import OF_TORCH, OF_TRITON, measured_kernel
from benchmarks.gpu_parts import PROCESSES, Parts, Row
from benchmarks.measure import interleaved_seconds, machine, ratios
from benchmarks.peers import Step, comparable, dictionary_learning_step, saelens_step, saelens_trainer, sparsify_step
from benchmarks.roofline import (
    PRECISIONS,
    REPEATS,
    Rates,
    Shape,
    measured_rates,
    repeated,
    roofline_seconds,
    step_bytes,
)
from benchmarks.stream import CONTEXT_SIZE, HOOK, random_documents, random_gpt2
from trainer.config.presets import HookFacts
from trainer.config.settings import SAEConfig
from trainer.config.sweep import DescribesHooks, SweepConfig
from trainer.kernels.active import Workspace
from trainer.training.step import TrainState, initial_state, train_step

STEPS, CACHED_BATCHES, LR = 5, 16, 1e-4
SAME_START = {"float32": 1e-4, "bfloat16": 1e-2}  # of float32 sums over d_in * batch squares; of bfloat16's rounding
IMPORTED_ONCE = ["benchmarks.gpu_kernels", "benchmarks.peers", "benchmarks.stream"]  # they bring what takes seconds
PEERS, BFLOAT16_ONLY = ("sae_lens", "dictionary_learning", "sparsify"), ("sparsify",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a run measures, where, and how long it may take; the tests have a small one for the CPU."""

    device: str
    shapes: Mapping[str, Shape]
    n_copied: int
    gemm_size: int
    seconds: float
    part_seconds: float


FULL = Bench(
    device="cuda",
    shapes={"gpt2-small": Shape(d_in=768), "gemma-2-2b": Shape(d_in=2304)},
    n_copied=1 << 30,
    gemm_size=8192,
    seconds=480,
    part_seconds=90,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained, in which precision of the encoder's product, on the rows of a cache; on random ones if None."""

    shape: Shape
    precision: str
    device: str
    cache: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all was measured, 1 if there is no CUDA or a part failed; 2 (from argparse) for arguments."""
    argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__).parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: needs a CUDA device, torch finds none; run it where there is one", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for in deterministic mode
    return run(FULL)


def run(bench: Bench) -> int:
    """Measure and print all that there is time for; 1 if anything failed."""
    PROCESSES.set_forkserver_preload(IMPORTED_ONCE)
    parts = Parts(_say, seconds=bench.seconds, part_seconds=bench.part_seconds)
    return parts.report(partial(_measure_all, bench))


def _measure_all(bench: Bench, parts: Parts) -> None:
    """Our steps first, then what explains them, then the peers."""
    parts.found["peers"] = peers = [peer for peer in PEERS if find_spec(peer)]
    parts.measure(machine, "machine")
    rates_row = parts.measure(partial(_rates, bench), "rates")
    rates = None if "error" in rates_row else Rates(**rates_row)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cases = dict[tuple[str, str], Case]()
        for name, shape in bench.shapes.items():
            parts.found[name] = {"shape": asdict(shape)}
            cache = _cache(name, shape, bench.device, parts, Path(folder) / name)
            for precision in PRECISIONS:
                case = Case(shape=shape, precision=precision, device=bench.device, cache=cache)
                cases[name, precision] = case
                parts.measure(partial(_step, case, rates), name, precision, "step")
                parts.measure(partial(_fed, case), name, precision, "fed")
        for name, shape in bench.shapes.items():
            for kernel in (*OF_TRITON, *OF_TORCH):
                parts.measure(partial(measured_kernel, kernel, shape, rates, bench.device), name, "kernels", kernel)
        for names, case in cases.items():
            parts.measure(partial(_deterministic, case), *names, "deterministic")
        for names, case in cases.items():
            for peer in peers:
                if case.precision == "bfloat16" or peer not in BFLOAT16_ONLY:
                    parts.measure(partial(_against, peer, case), *names, peer)


def _rates(bench: Bench) -> Row:
    return asdict(measured_rates(bench.device, bench.n_copied, bench.gemm_size))


def _cache(name: str, shape: Shape, device: str, parts: Parts, folder: Path) -> Path | None:
    """Where the cache is that was harvested; None if there is none, or if the loader cannot read it."""
    rows = [
        parts.measure(partial(_harvested, shape, folder), name, "harvest"),
        parts.measure(partial(_loaded, shape, device, folder), name, "loader"),
    ]
    return None if any("error" in row for row in rows) else folder


def _harvested(shape: Shape, folder: Path) -> Row:
    """Rows/s of harvesting a random one-block model."""
    n_tokens = CACHED_BATCHES * shape.batch
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0)
    model, documents = random_gpt2(1, shape.d_in), random_documents(n_tokens // CONTEXT_SIZE)
    start = time.perf_counter()
    cache = harvest(model, documents, config, folder)
    return {"rows_per_second": cache.n_rows() / (time.perf_counter() - start)}


def _loaded(shape: Shape, device: str, folder: Path) -> Row:
    """Rows/s of the loader to the device."""
    cache = open_cache(folder)
    start = time.perf_counter()
    with Loader(cache, HOOK, batch_tokens=shape.batch, epochs=3, device=device) as loader:
        n_rows = sum(len(batch.row) for batch in loader)
        if device == "cuda":
            torch.cuda.synchronize()
    return {"rows_per_second": n_rows / (time.perf_counter() - start)}


def _step(case: Case, rates: Rates | None) -> Row:
    """Our step on a resident batch, beside its roofline."""
    config, x = _config_and_batch(case)
    _check_step(config, case.precision, x)
    step = our_step(config, case.device)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    resident = repeated(lambda: step(x), STEPS, case.device)
    seconds = statistics.median(interleaved_seconds({"resident": resident}, REPEATS)["resident"]) / STEPS
    row: Row = {
        "resident_seconds": seconds,
        "tokens_per_second": case.shape.batch / seconds,
        "bytes": step_bytes(case.shape, case.precision, strict=False),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if case.device == "cuda" else None,
        "is_cached": case.cache is not None,
    }
    for name, strict in (("roofline", False), ("strict_roofline", True)):
        bound = None if rates is None else roofline_seconds(case.shape, case.precision, rates, strict=strict)
        row |= {f"{name}_seconds": bound, f"share_of_{name}": None if bound is None else bound / seconds}
    return row


def _fed(case: Case) -> Row:
    """Our step from the loader, in turn with one on a resident batch."""
    if case.cache is None:
        why = "there is no cache to feed from, as the rows of the harvest and of the loader say"
        return {"fed_seconds": None, "fed_over_resident": None, "error": why}
    config, x = _config_and_batch(case)
    feed, step = _batches(case, open_cache(case.cache), config), our_step(config, case.device)
    contenders = {
        "resident": repeated(lambda: step(x), STEPS, case.device),
        "fed": repeated(lambda: step(next(feed)), STEPS, case.device),
    }
    seconds = interleaved_seconds(contenders, REPEATS)
    return {
        "fed_seconds": statistics.median(seconds["fed"]) / STEPS,
        "fed_over_resident": ratios(seconds["resident"], seconds["fed"]),
    }


def _deterministic(case: Case) -> Row:
    """Whether steps repeat bit for bit, without and with torch's deterministic mode, and what that mode costs."""
    config, x = _config_and_batch(case)
    modes = {"plain": False, "deterministic": True}
    repeats = {f"{name}_repeats": _in_mode(is_on, lambda: _repeats(config, x)) for name, is_on in modes.items()}
    step = our_step(config, case.device)
    steps = repeated(lambda: step(x), STEPS, case.device)
    contenders = {name: lambda is_on=is_on: _in_mode(is_on, steps) for name, is_on in modes.items()}
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
    state, workspace = _state(config, x.device.type), Workspace()
    for _ in range(STEPS):
        train_step(state, x, workspace)
    return state.weights


def _against(peer: str, case: Case) -> Row:
    """A peer's step in turn with ours."""
    config, x = _config_and_batch(case)
    config = comparable(config)
    steps = {"ours": our_step(config, case.device), peer: _peer_step(peer, case, config)}
    errors = [float(step(x)) for step in steps.values()]
    assert abs(errors[0] - errors[1]) <= SAME_START[case.precision] * errors[0], errors
    contenders = {name: repeated(partial(step, x), STEPS, case.device) for name, step in steps.items()}
    seconds = interleaved_seconds(contenders, REPEATS)
    return {"seconds": statistics.median(seconds[peer]) / STEPS, "ours_over_it": ratios(seconds[peer], seconds["ours"])}


def our_step(config: SAEConfig, device: str) -> Step:
    """One step of ours on a fresh state."""
    state, workspace = _state(config, device), Workspace()
    return lambda x: train_step(state, x, workspace).loss.mse


def _peer_step(peer: str, case: Case, config: SAEConfig) -> Step:
    """A peer's step from our weights; autocast is its way to bfloat16."""
    weights, autocast = _state(config, case.device).weights, case.precision == "bfloat16"
    if peer == "sae_lens":
        return saelens_step(saelens_trainer(config, weights, case.shape.batch, autocast=autocast))
    if peer == "dictionary_learning":
        return dictionary_learning_step(config, weights, autocast=autocast)
    return sparsify_step(config, weights)


def _check_step(config: SAEConfig, precision: str, x: Tensor) -> None:
    """Three steps on a few rows begin at the losses of plain dense ones.

    A bfloat16 encoder chooses other latents where two are nearly equal, which costs next to nothing.
    """
    state, workspace, x = _state(config, x.device.type), Workspace(), x[:256]
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


def _config_and_batch(case: Case) -> tuple[SAEConfig, Tensor]:
    """The benched SAE, and one batch for it as `_batches` gives them."""
    if case.cache is None:
        rows = _RandomRows(case.shape, case.device)
        config = _config(case, rows)
        return config, rows.x * config.input_scale
    cache = open_cache(case.cache)
    config = _config(case, cache)
    return config, next(_batches(case, cache, config))


def _batches(case: Case, cache: Cache, config: SAEConfig) -> Iterator[Tensor]:
    """Full batches for ever, as a training loop gets them: on the device, float32, multiplied by the input scale."""
    while True:
        with Loader(cache, HOOK, batch_tokens=case.shape.batch, epochs=100, device=case.device) as loader:
            for batch in loader:
                if len(batch.row) == case.shape.batch:
                    yield batch.x[HOOK].float().mul_(config.input_scale)


class _RandomRows:
    """A batch that stands in for a cache: channels of unequal size and mean, two of them massive, as in a stream."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        size, mean = torch.randn(2, shape.d_in, generator=generator)
        size = size.exp()
        size[:2] *= 50
        self.x = (size * (mean + torch.randn(shape.batch, shape.d_in, generator=generator))).to(device)

    def hook(self, hook_name: str) -> HookFacts:
        return HookFacts(
            d_in=self.x.shape[1],
            mean_norm=self.x.norm(dim=1).mean().item(),
            mean_square_norm=self.x.square().sum(1).mean().item(),
            total_variance=self.x.var(0).sum().item(),
        )

    def statistics(self, hook_name: str, *, split: str = "train", row_filter: str = "no_special_tokens") -> HookFacts:
        return self.hook(hook_name)


def _config(case: Case, rows: DescribesHooks) -> SAEConfig:
    sizes = {"d_sae": case.shape.d_sae, "k": case.shape.k, "encoder_dtype": case.precision}
    run = {"name": "topk", "architecture": "topk", "hook_name": HOOK, "lr": LR, **sizes}
    return SweepConfig.from_dict({"runs": [run]}).expand(rows, training_tokens=100_000_000)[0]


def _state(config: SAEConfig, device: str) -> TrainState:
    return initial_state(config, torch.zeros(config.d_in, device=device))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
