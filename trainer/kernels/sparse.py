"""The sparse products of a training step, and their gradients: each touches the active entries alone.

A dense step costs 10 * batch * d_in * d_sae FLOPs. Here only the encoder's 2 * batch * d_in * d_sae remain; the decoder
and both weight gradients gather the active rows. On a CPU everything is plain torch. On CUDA `triton_kernels` does the
same, and nothing in this module waits for the device. Each sum runs in one fixed order, by row in the decoder and by
latent in the gradients, so results repeat bit for bit.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from trainer.kernels import active
from trainer.kernels.active import ActiveEntries


def entry_pre_acts(
    entries: ActiveEntries,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, " active"]:
    """x W_enc^T + b_enc at the active entries alone, without gradient.

    It serves entries that were chosen by pre-activations of a shorter dtype, and that are now needed in full.
    """
    with torch.no_grad():
        if active.on_cuda(x):
            dots = active.triton_kernels().entry_dots(x, entries.row, W_enc, entries.latent, entries.by_latent)
        else:
            pattern = _csr_pattern(entries, x)
            dots = torch.sparse.sampled_addmm(pattern, x, W_enc.T, beta=0.0).values()
        return dots + b_enc.index_select(0, entries.latent)


def active_pre_acts(
    values: Float[Tensor, " active"],
    entries: ActiveEntries,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, " active"]:
    """Return `values` unchanged, and give them a gradient to the encoder.

    Args:
        values: the pre-activations of the active entries, as they were computed before.
        entries: which entries these are.
        x: what the encoder multiplied. It gets no gradient.
        W_enc: gets the gradient of the active entries.
        b_enc: gets the gradient of the active entries.
        b_dec: given where x is the input less b_dec. It gets -(grad b_enc) W_enc, which x would have passed on to it.
    """
    return _ActivePreActs.apply(values, entries, x, W_enc, b_enc, b_dec)


def dense_pre_acts(
    pre_acts: Float[Tensor, "batch d_sae"],
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, "batch d_sae"]:
    """As `active_pre_acts`, for the pre-activations of all entries."""
    return _DensePreActs.apply(pre_acts, x, W_enc, b_enc, b_dec)


def sparse_decode(
    values: Float[Tensor, " active"], entries: ActiveEntries, W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Row b of the result is the sum of values[j] * W_dec[latent[j]] over the active entries j of row b.

    Gradients go to `values` and to `W_dec`. If W_dec is detached, its gradient is not computed.
    """
    if active.on_cuda(values):
        x_hat = _TritonDecode.apply(values, entries, W_dec.detach())
    else:
        x_hat = _sums_of_rows(values, entries.latent, entries.row_start, W_dec.detach())
    return _WithDecoderGradient.apply(x_hat, values.detach(), entries, W_dec)


class _ActivePreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, entries: ActiveEntries, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.entries, ctx.subtracts_b_dec = entries, b_dec is not None
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor | None]:
        x, W_enc = ctx.saved_tensors
        grad_W_enc = _sum_by_latent(grads[0], ctx.entries, x)
        if active.on_cuda(x):
            grad_b_enc = _sum_by_latent(grads[0], ctx.entries, x.new_ones(len(x), 1)).squeeze(1)
        else:
            grad_b_enc = torch.segment_reduce(
                grads[0][ctx.entries.by_latent], "sum", offsets=ctx.entries.latent_start, initial=0.0
            )
        return None, None, None, grad_W_enc, grad_b_enc, -(grad_b_enc @ W_enc) if ctx.subtracts_b_dec else None


class _DensePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.subtracts_b_dec = b_dec is not None
        return pre_acts.view_as(pre_acts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor | None]:
        x, W_enc = ctx.saved_tensors
        grad_b_enc = grads[0].sum(0)
        return None, None, grads[0].T @ x, grad_b_enc, -(grad_b_enc @ W_enc) if ctx.subtracts_b_dec else None


class _TritonDecode(torch.autograd.Function):
    """x_hat with a gradient to the values and none to W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, entries: ActiveEntries, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.entries = entries
        return _sums_of_rows(values, entries.latent, entries.row_start, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (W_dec,), entries = ctx.saved_tensors, ctx.entries
        return (
            active.triton_kernels().entry_dots(grads[0], entries.row, W_dec, entries.latent, entries.by_latent),
            None,
            None,
        )


class _WithDecoderGradient(torch.autograd.Function):
    """x_hat unchanged. Backward passes its gradient on, and gives W_dec the sum of each latent's entries."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, values: Tensor, entries: ActiveEntries, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        ctx.entries = entries
        return x_hat.view_as(x_hat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        (values,) = ctx.saved_tensors
        to_W_dec = _sum_by_latent(values, ctx.entries, grads[0].contiguous()) if ctx.needs_input_grad[3] else None
        return grads[0], None, None, to_W_dec


def _csr_pattern(entries: ActiveEntries, like: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch warns that CSR tensors are in beta state
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            entries.row_start, entries.latent, like.new_zeros(len(entries.latent)), size=(len(like), entries.d_sae)
        )


def _sum_by_latent(
    values: Float[Tensor, " active"], entries: ActiveEntries, rows: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """Row i of the result is the sum of values[j] * rows[row[j]] over the active entries j of latent i.

    The gradient of a weight is such a sum.
    """
    return _sums_of_rows(values.index_select(0, entries.by_latent), entries.row_by_latent, entries.latent_start, rows)


def _sums_of_rows(
    values: Float[Tensor, " entry"],
    index: Int[Tensor, " entry"],
    start: Int[Tensor, " segment_plus_1"],
    rows: Float[Tensor, "row d_in"],
) -> Float[Tensor, "segment d_in"]:
    """Row i of the result is the sum of values[j] * rows[index[j]] over start[i] <= j < start[i + 1]."""
    if active.on_cuda(rows):
        return active.triton_kernels().segment_sums(values, index, start, rows)
    return embedding_bag(index, rows, start, mode="sum", per_sample_weights=values, include_last_offset=True)
