"""Each kernel of a float32 TopK step on CUDA alone, beside what it takes at least, and torch's beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved_seconds
from benchmarks.roofline import REPEATS, Rates, Shape, kernel_bytes, step_flops, synchronised
from trainer.kernels import select
from trainer.kernels.active import ActiveEntries, Workspace
from trainer.sae.architectures import topk_entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """Tensors as a float32 step has them: random rows, weights and values, and the latents that top-k keeps."""

    x: Tensor
    W: Tensor
    values: Tensor
    latents: Tensor
    entries: ActiveEntries


def measured_kernels(shape: Shape, rates: Rates) -> dict[str, Any]:
    """Of each kernel the seconds, its bound and its share of that, once its answer is checked."""
    step = _random_step(shape)
    some = step.x[: select.topk_chunk_rows(shape.d_sae, is_cuda=True)]
    pre_acts = some @ step.W.T
    run = _kernels(shape, step, some, pre_acts)
    _check_kernels(run, step, pre_acts)
    run["adam"] = _adam(step.W)
    seconds = interleaved_seconds({name: synchronised(each) for name, each in run.items()}, REPEATS)
    bounds = {name: n / rates.copy for name, n in kernel_bytes(shape, len(some)).items()}
    bounds["encoder"] = step_flops(shape) / shape.batch * len(some) / rates.gemm["float32"]
    return {name: _share(statistics.median(s), bounds.get(name)) for name, s in seconds.items()}


def _random_step(shape: Shape) -> _Step:
    generator = torch.Generator("cuda").manual_seed(0)
    x, W = (torch.randn(n, shape.d_in, device="cuda", generator=generator) for n in (shape.batch, shape.d_sae))
    no_bias = torch.zeros(shape.d_sae, device="cuda")
    _, latents = select.topk_pre_acts(x, W, no_bias, shape.k, Workspace())
    values = torch.rand(latents.numel(), device="cuda", generator=generator)
    return _Step(x=x, W=W, values=values, latents=latents, entries=topk_entries(latents, shape.d_sae))


def _kernels(shape: Shape, step: _Step, some: Tensor, pre_acts: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed. some: the rows that are encoded and ranked at a time; pre_acts: theirs."""
    from trainer.kernels import triton_kernels  # imports triton, which a machine without CUDA need not have

    x, W, values, entries, workspace = step.x, step.W, step.values, step.entries, Workspace()
    row, latent, by_latent = entries.row, entries.latent, entries.by_latent
    no_bias = torch.zeros(shape.d_sae, device="cuda")
    return {
        "encoder": lambda: select.encoder_pre_acts(some, W, no_bias, workspace),
        "top-k": lambda: triton_kernels.topk_latents(pre_acts, shape.k, by_magnitude=False),
        "torch.topk": lambda: pre_acts.topk(shape.k, sorted=False).indices,
        "batch top-k": lambda: select.batch_topk_entries(pre_acts, shape.k),
        "index": lambda: topk_entries(step.latents, shape.d_sae),
        "decode": lambda: triton_kernels.segment_sums(values, latent, entries.row_start, W),
        "embedding_bag": lambda: _embedding_bag(values, entries, W),
        "values' gradient": lambda: triton_kernels.entry_dots(x, row, W, latent, by_latent),
        "weight gradient": lambda: triton_kernels.segment_sums(
            values[by_latent], row[by_latent], entries.latent_start, x
        ),
    }


def _embedding_bag(values: Tensor, entries: ActiveEntries, W: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        entries.latent, W, entries.row_start, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _adam(W: Tensor) -> Callable[[], Any]:
    """torch's fused step on two matrices like W."""
    parameters = [torch.randn_like(W).requires_grad_() for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(W)
    return torch.optim.Adam(parameters, lr=1e-4, fused=True).step


def _check_kernels(run: Mapping[str, Callable[[], Any]], step: _Step, pre_acts: Tensor) -> None:
    """The same top-k values as torch.topk; of the others a few rows, in float64, to float32 rounding of their sums."""
    chosen = pre_acts.gather(1, run["top-k"]()).sort(dim=1).values
    assert torch.equal(chosen, pre_acts.gather(1, run["torch.topk"]()).sort(dim=1).values)
    row, latent = run["batch top-k"]()
    assert pre_acts[row, latent].min() >= pre_acts.index_put((row, latent), pre_acts.new_tensor(-torch.inf)).max()
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
