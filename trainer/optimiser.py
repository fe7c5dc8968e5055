"""Schedules as functions of the step, Adam, and the decoder's unit norm."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.config import SAEConfig


def lr_at(config: SAEConfig, step: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, constant, linear to 0 over the last `lr_decay_steps`."""
    rising = _ramp(step + 1, config.lr_warm_up_steps)
    falling = _ramp(config.n_steps - step, config.lr_decay_steps)
    return config.lr * min(rising, falling)


def sparsity_coefficient_at(config: SAEConfig, step: int) -> float:
    """Sparsity coefficient of a step (from 0): linear warm-up, then constant; 0 where there is none."""
    return (config.sparsity_coefficient or 0.0) * _ramp(step + 1, config.sparsity_warm_up_steps)


def adam(config: SAEConfig, weights: Mapping[str, Tensor]) -> torch.optim.Adam:
    """Adam over the weights, in their order."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.Adam(list(weights.values()), lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def remove_parallel_gradient_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """g_i <- g_i - (g_i . d_i) d_i in place, for rows d_i of norm 1: Adam's moments then hold no change of length.

    Bricken et al. 2023, "Towards Monosemanticity", appendix on training advice.
    """
    assert W_dec.grad is not None, "called after backward"
    directions = W_dec.detach()
    parallel = torch.linalg.vecdot(W_dec.grad, directions)[:, None]
    W_dec.grad.addcmul_(parallel, directions, value=-1)


def unit_norm_rows_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row to norm 1 in place."""
    with torch.no_grad():
        W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny))


def _ramp(numerator: int, n_steps: int) -> float:
    return min(1.0, numerator / n_steps) if n_steps > 0 else 1.0
