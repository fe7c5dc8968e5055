"""What a step does to the weights: schedules as functions of the step, the optimizers, and the decoder's unit norm."""

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.errors import ConfigError
from trainer.config.settings import SAEConfig
from trainer.kernels import active

COSINE_WARM_UP_START = 0.1  # share of lr that a cosine warm-up begins at (Rajamanoharan et al. 2024, arXiv:2407.14435)


def lr_at(config: SAEConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises over the warm-up, is constant or annealed after it, and falls to 0 over the last `lr_decay_steps`. A cosine
    warm-up rises from a tenth of lr. cosineannealing falls from lr to lr_end between warm-up and decay.
    """
    rising = _ramp(step + 1, config.lr_warm_up_steps)
    if config.lr_warm_up_name == "cosine":
        rising = 1 - (1 - COSINE_WARM_UP_START) * _half_cosine(_ramp(step, config.lr_warm_up_steps))
    falling = _ramp(config.n_steps - step, config.lr_decay_steps)
    return _annealed_lr(config, step) * min(rising, falling)


def _annealed_lr(config: SAEConfig, step: int) -> float:
    if config.lr_end is None:
        return config.lr
    n_steps = config.n_steps - config.lr_warm_up_steps - config.lr_decay_steps
    return config.lr_end + (config.lr - config.lr_end) * _half_cosine(_ramp(step - config.lr_warm_up_steps, n_steps))


def k_at(config: SAEConfig, step: int) -> int | None:
    """k of a step, counted from 0: linear from k_anneal_start to k over `k_anneal_steps`, then k (arXiv:2410.20526)."""
    if config.k is None or config.k_anneal_start is None:
        return config.k
    return round(config.k_anneal_start + (config.k - config.k_anneal_start) * _ramp(step, config.k_anneal_steps))


def sparsity_coefficient_at(config: SAEConfig, step: int) -> float:
    """The sparsity coefficient of a step, counted from 0: a linear warm-up, then constant. 0 if the config has none."""
    return (config.sparsity_coefficient or 0.0) * _ramp(step + 1, config.sparsity_warm_up_steps)


def new_optimizer(config: SAEConfig, weights: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The config's optimizer over the weights, in their order.

    adam and adamw come from torch, fused. The others come from the package pytorch-optimizer: signum (Bernstein et al.
    2018, arXiv:1802.04434), muon (Jordan et al. 2024), which uses Adam for weights that are not matrices, and
    schedule_free (Defazio et al. 2024, arXiv:2405.15682).

    Raises:
        ConfigError: the package is not installed.
    """
    parameters, adam = list(weights.values()), {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, fused=True, **adam)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common, **adam)
    more = _more_optimizers(config)
    if config.optimizer == "signum":
        return more.SignSGD(parameters, momentum=config.momentum, **common)
    if config.optimizer == "schedule_free":
        return more.ScheduleFreeAdamW(parameters, **common, **adam)
    matrices = {"params": [p for p in parameters if p.ndim == 2], "use_muon": True, "momentum": config.momentum}
    others = {"params": [p for p in parameters if p.ndim != 2], "use_muon": False, **adam}
    return more.Muon([matrices | common, others | common])


def check_optimizer(config: SAEConfig) -> None:
    """Raise ConfigError if the package of the config's optimizer is not installed."""
    if config.optimizer not in ("adam", "adamw"):
        _more_optimizers(config)


def _more_optimizers(config: SAEConfig) -> Any:
    try:
        return importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise ConfigError(
            f"{config.name}: optimizer={config.optimizer} needs the package pytorch-optimizer; "
            "pip install 'actcache[optimizers]', or take adam or adamw"
        ) from error


def schedule_free_average(config: SAEConfig, weight: Tensor, z: Tensor) -> Tensor:
    """x = (y - (1 - beta1) z) / beta1: the weight that schedule_free has learned, from its y and z (eq. 6).

    Args:
        config: holds beta1.
        weight: y, where gradients are taken.
        z: the iterate in the optimizer's state.
    """
    return weight.detach().lerp(z, 1 - 1 / config.adam_beta1)


def update_average_(average: dict[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights. An empty average begins with the weights themselves."""
    for name, weight in weights.items():
        if name in average:
            average[name].lerp_(weight.detach(), 1 - decay)
        else:
            average[name] = weight.detach().clone()


def clip_gradients_(weights: Iterable[Tensor], max_norm: float) -> None:
    """Scale all gradients together to a norm of at most `max_norm`, as torch's clip_grad_norm_ does.

    torch multiplies gradients that are short enough by 1. On a CPU this function leaves them alone instead. On CUDA it
    does as torch does, because reading the norm would wait for the device.
    """
    weights = list(weights)
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if active.on_cuda(norm) or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)


def remove_parallel_gradient_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """g_i <- g_i - (g_i . d_i) d_i in place, for rows d_i of norm 1. Adam's moments then hold no change of length.

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
    return min(1.0, max(0.0, numerator / n_steps)) if n_steps > 0 else 1.0


def _half_cosine(share: float) -> float:
    """Half a period of a cosine: 1 at share 0, and 0 at share 1."""
    return (1 + math.cos(math.pi * share)) / 2
