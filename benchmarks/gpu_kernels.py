"""Each kernel of a float32 TopK step on CUDA alone, beside what it takes at least, and torch's beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved_seconds
from benchmarks.roofline import REPEATS, Rates, Shape, kernel_bytes, repeated, step_flops
from trainer.kernels import select
from trainer.kernels.active import ActiveEntries, Workspace
from trainer.sae.architectures import topk_entries

OF_TRITON = ("top-k", "decode", "values' gradient", "weight gradient")
OF_TORCH = ("encoder", "torch.topk", "batch top-k", "index", "embedding_bag", "adam")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """Tensors as a float32 step has them: random rows, weights and values, and the latents that top-k chooses.

    `some` are the rows that are encoded and ranked at a time, and pre_acts are their pre-activations.
    """

    k: int
    x: Tensor
    W: Tensor
    values: Tensor
    latents: Tensor
    entries: ActiveEntries
    some: Tensor
    pre_acts: Tensor


def measured_kernel(name: str, shape: Shape, rates: Rates | None, device: str) -> dict[str, Any]:
    """Seconds of a kernel of OF_TRITON or OF_TORCH, once its answer is checked, its bound and its share of that.

    The latter two are None where no bound is known.
    """
    step = _random_step(shape, device)
    kernel = (_triton_kernels if name in OF_TRITON else _torch_kernels)(step)[name]
    _check(name, step, kernel())
    seconds = statistics.median(interleaved_seconds({name: repeated(kernel, 1, device)}, REPEATS)[name])
    bound = None if rates is None else _bound(name, shape, len(step.some), rates)
    return {"seconds": seconds, "bound": bound, "share": None if bound is None else bound / seconds}


def _bound(name: str, shape: Shape, n_ranked: int, rates: Rates) -> float | None:
    if name == "encoder":
        return step_flops(shape) / shape.batch * n_ranked / rates.gemm["float32"]
    n_bytes = kernel_bytes(shape, n_ranked).get(name)
    return None if n_bytes is None else n_bytes / rates.copy


def _random_step(shape: Shape, device: str) -> _Step:
    """With nothing of Triton's, so that a kernel which fails does so in its own row."""
    generator = torch.Generator(device).manual_seed(0)
    x, W = (torch.randn(n, shape.d_in, device=device, generator=generator) for n in (shape.batch, shape.d_sae))
    n_rows = select.topk_chunk_rows(shape.d_sae, is_cuda=device == "cuda")
    latents = torch.cat([(rows @ W.T).topk(shape.k).indices.sort(dim=1).values for rows in x.split(n_rows)])
    return _Step(
        k=shape.k,
        x=x,
        W=W,
        values=torch.rand(latents.numel(), device=device, generator=generator),
        latents=latents,
        entries=topk_entries(latents, shape.d_sae),
        some=x[:n_rows],
        pre_acts=x[:n_rows] @ W.T,
    )


def _triton_kernels(step: _Step) -> dict[str, Callable[[], Any]]:
    from trainer.kernels import triton_kernels  # imports triton, which a machine without CUDA need not have

    values, entries = step.values, step.entries
    by_latent = entries.by_latent
    return {
        "top-k": lambda: triton_kernels.topk_latents(step.pre_acts, step.k, by_magnitude=False),
        "decode": lambda: triton_kernels.segment_sums(values, entries.latent, entries.row_start, step.W),
        "values' gradient": lambda: triton_kernels.entry_dots(step.x, entries.row, step.W, entries.latent, by_latent),
        "weight gradient": lambda: triton_kernels.segment_sums(
            values[by_latent], entries.row[by_latent], entries.latent_start, step.x
        ),
    }


def _torch_kernels(step: _Step) -> dict[str, Callable[[], Any]]:
    W, d_sae, workspace = step.W, len(step.W), Workspace()
    no_bias = W.new_zeros(d_sae)
    return {
        "encoder": lambda: select.encoder_pre_acts(step.some, W, no_bias, workspace),
        "torch.topk": lambda: step.pre_acts.topk(step.k, sorted=False).indices,
        "batch top-k": lambda: select.batch_topk_entries(step.pre_acts, step.k),
        "index": lambda: topk_entries(step.latents, d_sae),
        "embedding_bag": lambda: _embedding_bag(step.values, step.entries, W),
        "adam": _adam(W),
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


def _check(name: str, step: _Step, answer: Any) -> None:
    """Top-k values as a sort gives them; of sums a few rows, in float64, to float32 rounding of their terms."""
    feature_acts = step.values.double().view(step.latents.shape)
    x, W, few = step.x.double(), step.W.double(), slice(16)
    if name in ("top-k", "torch.topk"):
        chosen = step.pre_acts.gather(1, answer).sort(dim=1).values
        assert torch.equal(chosen, step.pre_acts.sort(dim=1).values[:, -step.k :])
    elif name == "batch top-k":
        left = step.pre_acts.index_put(answer, step.pre_acts.new_tensor(-torch.inf))
        assert step.pre_acts[answer].min() >= left.max()
    elif name in ("decode", "embedding_bag"):
        _check_sums(answer[few], feature_acts[few, :, None] * W[step.latents[few]], dim=1)
    elif name == "values' gradient":
        dots = answer.view(step.latents.shape)[few]
        _check_sums(dots, x[few, None] * W[step.latents[few]], dim=2)
    elif name == "weight gradient":
        for latent in step.latents[0, :4]:
            f = (feature_acts * (step.latents == latent)).sum(1)
            _check_sums(answer[latent], f[:, None] * x, dim=0)


def _check_sums(sums: Tensor, terms: Tensor, dim: int) -> None:
    """n float32 products, each rounded once, and n - 1 additions."""
    bound = terms.shape[dim] * torch.finfo(torch.float32).eps * terms.abs().sum(dim)
    assert ((sums - terms.sum(dim)).abs() <= bound).all()
