"""A TopK step on CUDA beside its roofline, its kernels beside their bounds, and the peers' steps.

No figure from this file exists yet: it has not been run on a GPU.

Shapes of gpt2-small (d_in 768) and gemma-2-2b (2304) with random weights; d_sae 65,536, k 64, batch 8,192. The roofline
of a step is its FLOPs at the GEMM rate, plus its bytes at the copy rate, both measured in the same run. Written down
before anything was measured, with B, d, F, k for batch, d_in, d_sae, k, s for the bytes of an element in the encoder's
product (4, or 2 as bfloat16), and 4 bytes for everything else:

    FLOPs      2 B d F             the encoder's product; the rest is bound by memory
    weights    2 s F d, s F d      a bfloat16 copy of W_enc written and read, or W_enc read
    rows       s B d + 2 * 4 B d   x in the product, in the loss and in the encoder's gradient
    error      3 * 4 B d           x_hat - x written; read for the values' and for the decoder's gradient
    W_dec      2 * 4 R d           its rows in the decoder and in the values' gradient. R = B k where each entry fetches
                                   its own row; R = min(B k, F) where no row is fetched twice: the strict roofline
    gradients  2 * 4 P             of all P = 2 F d + F + d parameters, written and read
    Adam       6 * 4 P             weights and both moments, read and written
    entries    4 * 12 B k          value and latent of each entry, written once and read three times

Pre-activations are left out: an encoder that ranks what it has just computed need not store them. AuxK has nothing to
revive here. Each peer runs as its own trainer does, on the same resident batch, in turn with ours; those that are not
installed are left out. A part that fails is reported in its place and the others go on; the exit code is then 1.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.cache import Cache
from actcache.errors import ConfigError
from actcache.harvester import harvest
from actcache.loader import Loader
from actcache.plan import HarvestConfig
from benchmarks.measure import Say, installed, interleaved_seconds, machine, ratios
from benchmarks.stream import CONTEXT_SIZE, HOOK, random_documents, random_gpt2
from trainer import kernels
from trainer.architectures import kept_topk
from trainer.config import SAEConfig
from trainer.kernels import KeptEntries, Workspace
from trainer.sweep_file import SweepConfig
from trainer.train import TrainState, initial_state, train_step

REPEATS, STEPS, N_TOKENS, N_COPIED, GEMM_SIZE, LR = 7, 5, 131_072, 1 << 30, 8192, 1e-4
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the encoder's product
Step = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained: rows of width d_in, d_sae latents of which k are active in each of `batch` rows."""

    d_in: int
    d_sae: int = 65_536
    k: int = 64
    batch: int = 8192


SHAPES = {"gpt2-small": Shape(d_in=768), "gemma-2-2b": Shape(d_in=2304)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this GPU reaches: FLOP/s of a square product by precision, bytes/s of a copy (read and written)."""

    gemm: Mapping[str, float]
    copy: float


def step_flops(shape: Shape) -> int:
    """2 B d F: the encoder's product."""
    return 2 * shape.batch * shape.d_in * shape.d_sae


def step_bytes(shape: Shape, precision: str, *, strict: bool) -> dict[str, int]:
    """Bytes of a step by what they are, as the module's docstring derives them; strict: no row of W_dec twice."""
    n_rows, n_weights, n_entries = shape.batch * shape.d_in, shape.d_sae * shape.d_in, shape.batch * shape.k
    itemsize = PRECISIONS[precision].itemsize
    fetched = min(n_entries, shape.d_sae) if strict else n_entries
    n_parameters = 2 * n_weights + shape.d_sae + shape.d_in
    return {
        "weights": itemsize * n_weights * (2 if precision == "bfloat16" else 1),
        "rows": (itemsize + 2 * 4) * n_rows,
        "error": 3 * 4 * n_rows,
        "W_dec": 2 * 4 * fetched * shape.d_in,
        "gradients": 2 * 4 * n_parameters,
        "adam": 6 * 4 * n_parameters,
        "entries": 4 * 12 * n_entries,
    }


def roofline_seconds(shape: Shape, precision: str, rates: Rates, *, strict: bool) -> float:
    """FLOPs at the GEMM rate plus bytes at the copy rate."""
    n_bytes = sum(step_bytes(shape, precision, strict=strict).values())
    return step_flops(shape) / rates.gemm[precision] + n_bytes / rates.copy


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
        for peer in _PEERS:
            if (precision == "bfloat16" or peer not in _BFLOAT16_ONLY) and installed(peer, parts.say):
                steps[peer] = lambda peer=peer, config=config, x=x, p=precision: _against(peer, shape, p, config, x)
        found[precision] = {key: parts.measured(f"{part}, {key}", measure) for key, measure in steps.items()}
    found["kernels"] = parts.measured(f"{name}, kernels", lambda: _kernels(shape, rates))
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
    ours, theirs = our_step(config), _PEERS[peer](shape, precision)
    seconds = interleaved_seconds({"ours": _repeated(ours, lambda: x), peer: _repeated(theirs, lambda: x)}, REPEATS)
    return {"seconds": statistics.median(seconds[peer]) / STEPS, "ours_over_it": ratios(seconds[peer], seconds["ours"])}


def our_step(config: SAEConfig) -> Step:
    """One step of ours on a fresh state."""
    state, workspace = _state(config), Workspace()
    return lambda x: train_step(state, x, workspace)


def _saelens_step(shape: Shape, precision: str) -> Step:
    """SAELens' own trainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, device="cuda"))
    config = SAETrainerConfig(
        total_training_samples=shape.batch * 10_000,
        train_batch_size_samples=shape.batch,
        lr=LR,
        lr_end=LR,
        device="cuda",
        autocast=precision == "bfloat16",
    )
    return SAETrainer(config, sae, iter(())).step


def _dictionary_learning_step(shape: Shape, precision: str) -> Step:
    """dictionary_learning's own trainer, under autocast as its training loop has it."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]: optional

    trainer = TopKTrainer(
        steps=10_000,
        activation_dim=shape.d_in,
        dict_size=shape.d_sae,
        k=shape.k,
        layer=0,
        lm_name="random",
        lr=LR,
        device="cuda",
        seed=0,
    )

    def step(x: Tensor) -> object:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return trainer.update(1, x)  # step 0 would fit a median

    return step


def _sparsify_step(shape: Shape, _: str) -> Step:
    """sparsify's coder, whose forward pass brings its own bfloat16, with Adam as ours and its decoder's unit norm."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]: optional

    coder = SparseCoder(shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k), device="cuda")
    adam = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)

    def step(x: Tensor) -> object:
        coder.set_decoder_norm_to_unit_norm()
        loss = coder(x).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return loss

    return step


_PEERS: dict[str, Callable[[Shape, str], Step]] = {
    "sae_lens": _saelens_step,
    "dictionary_learning": _dictionary_learning_step,
    "sparsify": _sparsify_step,
}
_BFLOAT16_ONLY = ("sparsify",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """Tensors as a float32 step has them: random rows, weights and values, and the latents that top-k keeps."""

    x: Tensor
    W: Tensor
    values: Tensor
    latents: Tensor
    kept: KeptEntries


def _random_step(shape: Shape) -> _Step:
    generator = torch.Generator("cuda").manual_seed(0)
    x, W = (torch.randn(n, shape.d_in, device="cuda", generator=generator) for n in (shape.batch, shape.d_sae))
    no_bias = torch.zeros(shape.d_sae, device="cuda")
    _, latents = kernels.topk_pre_acts(x, W, no_bias, shape.k, Workspace())
    values = torch.rand(latents.numel(), device="cuda", generator=generator)
    return _Step(x=x, W=W, values=values, latents=latents, kept=kept_topk(latents, shape.d_sae))


def _kernels(shape: Shape, rates: Rates) -> dict[str, Any]:
    """Each kernel of a float32 step alone: seconds, its bound and its share of that; torch's counterparts beside."""
    from trainer import triton_kernels  # imports triton, which a machine without CUDA need not have

    step, workspace = _random_step(shape), Workspace()
    x, W, values, kept = step.x, step.W, step.values, step.kept
    row, latent, by_latent = kept.row, kept.latent, kept.by_latent
    some, no_bias = x[: kernels.topk_chunk_rows(shape.d_sae, is_cuda=True)], torch.zeros(shape.d_sae, device="cuda")
    pre_acts = some @ W.T
    parameters = [torch.randn_like(W).requires_grad_() for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(W)
    adam = torch.optim.Adam(parameters, lr=LR, fused=True)
    run: dict[str, Callable[[], Any]] = {
        "encoder": lambda: kernels.encoder_pre_acts(some, W, no_bias, workspace),
        "top-k": lambda: triton_kernels.topk_latents(pre_acts, shape.k, by_magnitude=False),
        "torch.topk": lambda: pre_acts.topk(shape.k, sorted=False).indices,
        "index": lambda: kept_topk(step.latents, shape.d_sae),
        "decode": lambda: triton_kernels.segment_sums(values, latent, kept.row_start, W),
        "embedding_bag": lambda: _embedding_bag(values, kept, W),
        "values' gradient": lambda: triton_kernels.entry_dots(x, row, W, latent, by_latent),
        "weight gradient": lambda: triton_kernels.segment_sums(values[by_latent], row[by_latent], kept.latent_start, x),
        "adam": adam.step,
    }
    _check_kernels(run, step, pre_acts)
    seconds = interleaved_seconds({name: _synchronised(each) for name, each in run.items()}, REPEATS)
    bounds = {name: n / rates.copy for name, n in kernel_bytes(shape, len(some)).items()}
    bounds["encoder"] = step_flops(shape) / shape.batch * len(some) / rates.gemm["float32"]
    return {name: _share(statistics.median(s), bounds.get(name)) for name, s in seconds.items()}


def kernel_bytes(shape: Shape, n_ranked: int) -> dict[str, int]:
    """What each kernel of a float32 step reads and writes at least: every row once, indices as int64.

    n_ranked: rows that top-k ranks. "weight gradient" is one of the two.
    """
    n_entries, n_rows, n_weights = shape.batch * shape.k, 4 * shape.batch * shape.d_in, 4 * shape.d_sae * shape.d_in
    fetched = 4 * min(n_entries, shape.d_sae) * shape.d_in
    return {
        "top-k": n_ranked * (4 * shape.d_sae + 8 * shape.k),
        "decode": 12 * n_entries + fetched + n_rows,
        "values' gradient": 28 * n_entries + fetched + n_rows,
        "weight gradient": 12 * n_entries + n_rows + n_weights,
        "adam": 7 * 2 * n_weights,
    }


def _check_kernels(run: Mapping[str, Callable[[], Tensor]], step: _Step, pre_acts: Tensor) -> None:
    """The same top-k values as torch.topk; of the others a few rows, in float64, to float32 rounding of their sums."""
    chosen = pre_acts.gather(1, run["top-k"]()).sort(dim=1).values
    assert torch.equal(chosen, pre_acts.gather(1, run["torch.topk"]()).sort(dim=1).values)
    feature_acts = step.values.double().view(step.latents.shape)
    x, W, few = step.x.double(), step.W.double(), slice(16)
    _check_sums(run["decode"]()[few], feature_acts[few, :, None] * W[step.latents[few]], dim=1)
    dots = run["values' gradient"]().view(step.latents.shape)[few]
    _check_sums(dots, x[few, None] * W[step.latents[few]], dim=2)
    for latent in step.latents[0, :4]:
        f = (feature_acts * (step.latents == latent)).sum(1)
        _check_sums(run["weight gradient"]()[latent], f[:, None] * x, dim=0)


def _check_sums(sums: Tensor, terms: Tensor, dim: int) -> None:
    """n float32 products, each rounded once, and n - 1 additions."""
    bound = terms.shape[dim] * torch.finfo(torch.float32).eps * terms.abs().sum(dim)
    assert ((sums - terms.sum(dim)).abs() <= bound).all()


def _share(seconds: float, bound: float | None) -> dict[str, float]:
    return {"seconds": seconds} if bound is None else {"seconds": seconds, "bound": bound, "share": bound / seconds}


def _embedding_bag(values: Tensor, kept: KeptEntries, W: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        kept.latent, W, kept.row_start, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _check_step(config: SAEConfig, precision: str, x: Tensor) -> None:
    """Three steps on a few rows begin at the losses of plain dense ones.

    Of float32, to the rounding of sums over d_in * batch terms; a bfloat16 encoder chooses other latents where two are
    nearly equal, which costs next to nothing.
    """
    state, workspace, x = _state(config), Workspace(), x[:256]
    for _ in range(3):
        expected = _dense_loss(config, state.weights, x)
        loss = train_step(state, x, workspace).loss.total.item()
        assert abs(loss - expected) <= (1e-4 if precision == "float32" else 1e-2) * expected, (loss, expected)


@torch.no_grad()
def _dense_loss(config: SAEConfig, weights: Mapping[str, Tensor], x: Tensor) -> float:
    assert config.k is not None
    pre_acts = torch.addmm(weights["b_enc"], x - weights["b_dec"], weights["W_enc"].T)
    top = pre_acts.topk(config.k)
    feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    error = feature_acts @ weights["W_dec"] + weights["b_dec"] - x
    return (error.square().sum() / len(x) / config.total_variance).item()


def measured_rates() -> Rates:
    """Medians of a copy of N_COPIED bytes, and of square products."""
    source = torch.empty(N_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    run = {"copy": _synchronised(lambda: target.copy_(source))}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=dtype) for _ in range(2))
        run[name] = _synchronised(lambda a=a, b=b: a @ b)
    seconds = {name: statistics.median(s) for name, s in interleaved_seconds(run, REPEATS).items()}
    gemm = {name: 2 * GEMM_SIZE**3 / seconds[name] for name in PRECISIONS}
    return Rates(gemm=gemm, copy=2 * N_COPIED / seconds["copy"])


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


def _synchronised(kernel: Callable[[], object]) -> Callable[[], None]:
    """One run, and the wait until it is done."""

    def run_once() -> None:
        kernel()
        torch.cuda.synchronize()

    return run_once


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
