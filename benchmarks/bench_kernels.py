"""The sparse products of a topk step (512 -> 4096, k 32, batch 4096, float32) against the dense ones and a bound.

Each is checked first against float64, then timed in turn with its dense product and with its bound: for encoding and
choosing, the encoder's bare GEMM; for the others, a copy of as many bytes as they gather, out of memory (they gather
from matrices of 8 MB, part of which a cache holds, so more than all of the bound is possible). The dense products get
the dense [batch, d_sae] operands ready made.

topk              the k largest pre-activations of each row; dense: one GEMM of all rows, then torch.topk
decode            x_hat from the active entries
decoder gradient  of W_dec; encoder gradient: of W_enc and b_enc; activation gradient: of the active entries
argsort           the active entries sorted by their latents; dense: as int64; bound: a copy of int64 keys

    actcache bench kernels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.measure import Say, described, interleaved_seconds, machine, ratios
from trainer.kernels.active import ActiveEntries, Workspace
from trainer.kernels.select import topk_pre_acts
from trainer.kernels.sparse import active_pre_acts, sparse_decode
from trainer.sae.architectures import topk_entries

D_IN, D_SAE, K, BATCH, REPEATS = 512, 4096, 32, 4096, 9
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operands:
    """What a step has: weights, a batch, its active entries, and the gradients of x_hat and of their activations."""

    x: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    values: Float[Tensor, "batch k"]
    latents: Int[Tensor, "batch k"]
    entries: ActiveEntries
    grad_x_hat: Float[Tensor, "batch d_in"]
    grad_values: Float[Tensor, " active"]

    @property
    def acts(self) -> Float[Tensor, "batch d_sae"]:
        """The activations as a dense matrix, in which all other entries are 0."""
        return self.dense(self.values)

    def dense(self, values: Tensor) -> Float[Tensor, "batch d_sae"]:
        """The values of the active entries as a dense matrix, in which all other entries are 0."""
        zeros = values.new_zeros(len(self.x), len(self.W_enc))
        return zeros.scatter_(1, self.latents, values.view_as(self.latents))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kernel:
    """Ours, its dense product and its bound, as calls, and what ours must give.

    answer: from what ours returns to what is compared with `exact`, the answer in float64 from the same operands.
    rounding: how far float32 sums in any order may be from it: n eps times the sum of the sizes of their n terms.
    """

    ours: Call
    dense: Call
    bound: Call
    answer: Callable[[Any], Tensor]
    exact: Tensor
    rounding: Tensor


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    operands = random_operands(BATCH, D_IN, D_SAE, K)
    say(f"{D_IN} -> {D_SAE}, k {K}, batch {BATCH}")
    found = {name: _measured(name, kernel, say) for name, kernel in kernels(operands).items()}
    found["argsort"] = _argsort(operands, say)
    return {"bench": "kernels", **found, "machine": machine()}


def random_operands(batch: int, d_in: int, d_sae: int, k: int) -> Operands:
    """Seeded normal weights and rows; decoder rows of norm 1."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(d_sae, d_in, generator=generator)
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    x, grad_x_hat = (torch.randn(batch, d_in, generator=generator) for _ in range(2))
    b_enc = torch.randn(d_sae, generator=generator) / 8
    values, latents = topk_pre_acts(x, W_dec, b_enc, k, Workspace())
    return Operands(
        x=x,
        W_enc=W_dec.clone(),
        b_enc=b_enc,
        W_dec=W_dec,
        values=values,
        latents=latents,
        entries=topk_entries(latents, d_sae),
        grad_x_hat=grad_x_hat,
        grad_values=torch.randn(batch * k, generator=generator),
    )


def kernels(operands: Operands) -> dict[str, Kernel]:
    """Every product of the step that is sparse in ours, by name."""
    gathered = torch.empty(operands.values.numel() * operands.x.shape[1])
    copy = partial(torch.empty_like(gathered).copy_, gathered)
    return {
        "topk": _topk(operands),
        "decode": _decode(operands, copy),
        "decoder gradient": _decoder_gradient(operands, copy),
        "encoder gradient": _encoder_gradient(operands, copy),
        "activation gradient": _activation_gradient(operands, copy),
    }


def _topk(operands: Operands) -> Kernel:
    x, W_enc, b_enc, k = operands.x, operands.W_enc, operands.b_enc, operands.values.shape[1]
    workspace, product = Workspace(), x.new_empty(len(x), len(W_enc))
    exact, rounding = _in_float64(x, W_enc.T)
    return Kernel(
        ours=lambda: topk_pre_acts(x, W_enc, b_enc, k, workspace),
        dense=lambda: torch.addmm(b_enc, x, W_enc.T).topk(k, sorted=False),
        bound=lambda: torch.mm(x, W_enc.T, out=product),
        answer=lambda topk: topk[0].sort(dim=1, descending=True).values,
        exact=(exact + b_enc).topk(k).values,
        rounding=2 * rounding.max(),  # the k-th largest moves by no more than the entries do; twice: b_enc's term
    )


def _decode(operands: Operands, copy: Call) -> Kernel:
    acts, W_dec, values = operands.acts, operands.W_dec, operands.values.flatten()
    exact, rounding = _in_float64(acts, W_dec)
    return Kernel(
        ours=lambda: sparse_decode(values, operands.entries, W_dec),
        dense=lambda: acts @ W_dec,
        bound=copy,
        answer=_itself,
        exact=exact,
        rounding=rounding,
    )


def _decoder_gradient(operands: Operands, copy: Call) -> Kernel:
    acts, grad_x_hat, W_dec = operands.acts, operands.grad_x_hat, operands.W_dec.clone().requires_grad_()
    x_hat = sparse_decode(operands.values.flatten(), operands.entries, W_dec)
    exact, rounding = _in_float64(acts.T, grad_x_hat)
    return Kernel(
        ours=lambda: torch.autograd.grad(x_hat, W_dec, grad_x_hat, retain_graph=True)[0],
        dense=lambda: acts.T @ grad_x_hat,
        bound=copy,
        answer=_itself,
        exact=exact,
        rounding=rounding,
    )


def _encoder_gradient(operands: Operands, copy: Call) -> Kernel:
    x, of_kept, grads = operands.x, operands.grad_values, operands.dense(operands.grad_values)
    W_enc, b_enc = operands.W_enc.clone().requires_grad_(), operands.b_enc.clone().requires_grad_()
    pre_acts = active_pre_acts(operands.values.flatten(), operands.entries, x, W_enc, b_enc, None)
    exact, rounding = _in_float64(grads.T, torch.cat([x, x.new_ones(len(x), 1)], dim=1))
    return Kernel(
        ours=lambda: torch.autograd.grad(pre_acts, (W_enc, b_enc), of_kept, retain_graph=True),
        dense=lambda: (grads.T @ x, grads.sum(0)),
        bound=copy,
        answer=lambda of_weights: torch.cat([of_weights[0], of_weights[1][:, None]], dim=1),
        exact=exact,
        rounding=rounding,
    )


def _activation_gradient(operands: Operands, copy: Call) -> Kernel:
    W_dec, grad_x_hat = operands.W_dec, operands.grad_x_hat
    values = operands.values.flatten().clone().requires_grad_()
    x_hat = sparse_decode(values, operands.entries, W_dec)
    exact, rounding = (every.gather(1, operands.latents).flatten() for every in _in_float64(grad_x_hat, W_dec.T))
    return Kernel(
        ours=lambda: torch.autograd.grad(x_hat, values, grad_x_hat, retain_graph=True)[0],
        dense=lambda: grad_x_hat @ W_dec.T,
        bound=copy,
        answer=_itself,
        exact=exact,
        rounding=rounding,
    )


def _itself(answer: Tensor) -> Tensor:
    return answer


def _in_float64(a: Float[Tensor, "m n"], b: Float[Tensor, "n p"]) -> tuple[Tensor, Tensor]:
    """The product, and the rounding of `Kernel` for it; a zero in `a` is not a term."""
    eps, sizes = torch.finfo(torch.float32).eps, a.abs().double() @ b.abs().double()
    return a.double() @ b.double(), int(a.count_nonzero(dim=1).max()) * eps * sizes


def check(name: str, kernel: Kernel) -> None:
    """Ours is as near to float64 as rounding allows."""
    error = (kernel.answer(kernel.ours()).double() - kernel.exact).abs()
    assert bool((error <= kernel.rounding).all()), (name, float(error.max()))


def _measured(name: str, kernel: Kernel, say: Say) -> dict[str, Any]:
    check(name, kernel)
    seconds = interleaved_seconds({"ours": kernel.ours, "dense": kernel.dense, "bound": kernel.bound}, REPEATS)
    return _described(name, seconds, say)


def _argsort(operands: Operands, say: Say) -> dict[str, Any]:
    """`ActiveEntries` of the batch, of which the argsort is a part, beside the two argsorts."""
    latent, n_times = operands.entries.latent, 10
    narrow, order = latent.to(torch.int16), latent.argsort(stable=True)
    assert torch.equal(operands.entries.by_latent, order)
    assert torch.equal(order, torch.from_numpy(np.argsort(latent.numpy(), kind="stable")))
    calls: dict[str, Call] = {
        "ours": lambda: narrow.argsort(stable=True),
        "dense": lambda: latent.argsort(stable=True),
        "bound": partial(torch.empty_like(latent).copy_, latent),
        "active entries": lambda: topk_entries(operands.latents, len(operands.W_enc)),
    }
    repeated = {name: partial(_times, call, n_times) for name, call in calls.items()}
    seconds = {name: [s / n_times for s in spent] for name, spent in interleaved_seconds(repeated, REPEATS).items()}
    return _described("argsort", seconds, say)


def _times(call: Call, n: int) -> None:
    for _ in range(n):
        call()


def _described(name: str, seconds: dict[str, list[float]], say: Say) -> dict[str, Any]:
    over = {
        "over_dense": ratios(seconds["dense"], seconds["ours"]),
        "of_bound": ratios(seconds["bound"], seconds["ours"]),
    }
    milliseconds = {contender: 1e3 * float(np.median(spent)) for contender, spent in seconds.items()}
    say(f"{name}: ms " + ", ".join(f"{contender} {spent:.2f}" for contender, spent in milliseconds.items()))
    for key, ratio in over.items():
        say("  " + described(key.replace("_", " "), ratio))
    return {"milliseconds": milliseconds, **over}
