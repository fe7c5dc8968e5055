"""The activation functions of SAEs, as pure functions: ReLU, JumpReLU with its gradients, and matching pursuit.

TopK and BatchTopK choose entries instead; they are in `trainer.kernels.select`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre_acts: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """max(h, 0). The gradient at 0 is 0."""
    return torch.relu(pre_acts)


def matching_pursuit(
    x: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    *,
    residual_threshold: float,
    max_iterations: int | None,
    stop_on_duplicate_support: bool,
) -> Float[Tensor, "batch d_sae"]:
    """Feature activations by matching pursuit (Mallat and Zhang 1993; as an SAE, Costa et al. 2025, arXiv:2506.03093).

    The rest of a row begins as x. Each iteration finds the latent whose direction has the largest dot product with the
    rest, adds ReLU of that product to the latent's activation, and subtracts the product times the direction.

    Args:
        x: the rows to encode, in the dtype of W_dec.
        W_dec: the direction of each latent.
        residual_threshold: a row stops once the norm of its rest is below this; 0 never stops it.
        max_iterations: a row stops after so many iterations; None stands for d_in.
        stop_on_duplicate_support: a row stops once an iteration adds no new latent.
    """
    rest, feature_acts = x.clone(), x.new_zeros(len(x), len(W_dec))
    row, goes_on = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(x.shape[1] if max_iterations is None else max_iterations):
        latent = (rest @ W_dec.T).argmax(dim=1)
        directions = W_dec[latent]
        product = (rest * directions).sum(dim=1).relu() * goes_on
        is_new = (feature_acts[row, latent] == 0) & (product != 0)
        feature_acts[row, latent] += product
        rest = rest - product[:, None] * directions
        if stop_on_duplicate_support:
            goes_on = goes_on & is_new
        if residual_threshold > 0:
            goes_on = goes_on & (rest.norm(dim=1) >= residual_threshold)
        if not goes_on.any():
            break
    return feature_acts


def jumprelu(
    pre_acts: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"] | Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*shape"]:
    """h * H(h - theta), with the straight-through gradient of Rajamanoharan et al. 2024 (arXiv:2407.14435), eq. 11.

    df/dh = H(h - theta) and df/dtheta = -(theta / eps) K((h - theta) / eps), where K(u) = 1[|u| < 1/2].

    Args:
        pre_acts: h.
        threshold: theta, one for each latent or one for each entry.
        bandwidth: eps.
    """
    return _JumpReLU.apply(pre_acts, threshold, bandwidth)


def heaviside(
    pre_acts: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"] | Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*shape"]:
    """H(h - theta), which is 1 where the latent fires, with the straight-through gradient of eq. 12 of the same paper.

    dH/dtheta = -(1 / eps) K((h - theta) / eps) and dH/dh = 0. The arguments are those of `jumprelu`.
    """
    return _Heaviside.apply(pre_acts, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre_acts <= threshold, 0.0, pre_acts)  # NaN stays NaN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        to_threshold = grads[0] * _in_window(pre_acts, threshold, ctx.bandwidth) * (-threshold / ctx.bandwidth)
        return grads[0] * (pre_acts > threshold), to_threshold.sum_to_size(threshold.shape), None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        to_threshold = grads[0] * _in_window(pre_acts, threshold, ctx.bandwidth) * (-1 / ctx.bandwidth)
        return None, to_threshold.sum_to_size(threshold.shape), None


def _in_window(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((h - theta) / eps). It takes h, because f is 0 in the half of the window below theta."""
    return ((pre_acts - threshold) / bandwidth).abs() < 0.5
