"""The definitions from the papers in float64, slow and plain: what trainer's fast paths are compared with.

Weights are dicts of float64 tensors in the training layout (W_enc [d_sae, d_in]). Losses are sums over d_in, means over
rows; the TopK family divides by the variance.
"""

import itertools

import torch
from torch import Tensor

from support.tiny_models import LAYER_NORMED

# A float64 sum of n terms is off by at most n * 2^-53 of the sum of their sizes. The tests sum fewer than 10^4 terms of
# size below 10^2, through at most a handful of nested sums: 10^4 * 10^2 * 2^-53 * 10 < 2e-9.
FLOAT64 = {"rtol": 2e-9, "atol": 2e-9}


def topk_reference(pre_acts: Tensor, k: int) -> Tensor:
    """Row by row: the k largest, where positive (Gao et al. 2024)."""
    out = torch.zeros_like(pre_acts, dtype=torch.float64)
    for b, row in enumerate(pre_acts.double().tolist()):
        for i in sorted(range(len(row)), key=lambda i: -row[i])[:k]:
            out[b, i] = max(row[i], 0.0)
    return out


def abs_topk_reference(pre_acts: Tensor, k: int) -> Tensor:
    """Row by row: the k of largest magnitude, with their sign (arXiv:2510.00404)."""
    out = torch.zeros_like(pre_acts, dtype=torch.float64)
    for b, row in enumerate(pre_acts.double().tolist()):
        for i in sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]:
            out[b, i] = row[i]
    return out


def batch_topk_reference(pre_acts: Tensor, k: int) -> Tensor:
    """The k * batch largest of all, where positive; of equal ones the first (Bussmann et al. 2024)."""
    flat = [max(value, 0.0) for value in pre_acts.double().flatten().tolist()]
    kept = sorted(range(len(flat)), key=lambda i: -flat[i])[: k * len(pre_acts)]  # sorted is stable
    out = [0.0] * len(flat)
    for i in kept:
        out[i] = flat[i]
    return torch.tensor(out, dtype=torch.float64).view(pre_acts.shape)


def jumprelu_gradients_reference(
    pre_acts: Tensor, threshold: Tensor, bandwidth: float, grad_acts: Tensor, grad_fires: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to h [batch, d_sae] and theta [d_sae] of f = h H(h - theta) and of H(h - theta), entry by entry.

    grad_acts, grad_fires: of the loss to f and to H. Rajamanoharan et al. 2024, equations 11 and 12.
    """
    to_pre_acts, to_threshold = torch.zeros_like(pre_acts), torch.zeros_like(threshold)
    for b in range(pre_acts.shape[0]):
        for i in range(pre_acts.shape[1]):
            h, theta = float(pre_acts[b, i]), float(threshold[i])
            window = 1.0 if abs((h - theta) / bandwidth) < 0.5 else 0.0
            to_pre_acts[b, i] = grad_acts[b, i] if h > theta else 0.0
            to_threshold[i] -= window / bandwidth * (theta * grad_acts[b, i] + grad_fires[b, i])
    return to_pre_acts, to_threshold


def loss_and_gradients_reference(
    config,
    weights: dict[str, Tensor],
    x: Tensor,
    *,
    y: Tensor | None = None,
    sparsity_coefficient: float = 0.0,
    dead: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and its gradient to every weight. y: what is to be reconstructed, x if None."""
    y = x if y is None else y
    if config.architecture == "jumprelu":
        return _jumprelu(config, weights, x, sparsity_coefficient)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    if config.architecture in ("standard", "transcoder", "skip_transcoder", "crosscoder"):
        loss = _standard_loss(config, leaves, x, y, sparsity_coefficient)
    elif config.architecture == "gated":
        loss = _gated_loss(leaves, x, sparsity_coefficient)
    else:
        loss = _topk_family_loss(config, leaves, x, dead)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def _standard_loss(config, weights: dict[str, Tensor], x: Tensor, y: Tensor, sparsity_coefficient: float) -> Tensor:
    """Transcoders predict y (Dunefsky et al. 2024, Paulo et al. 2025); a crosscoder adds the norms of each hook's part
    of a decoder row (Lindsey et al. 2024).
    """
    f = (x @ weights["W_enc"].T + weights["b_enc"]).relu()
    y_hat = f @ weights["W_dec"] + weights["b_dec"]
    if "W_skip" in weights:
        y_hat = y_hat + x @ weights["W_skip"].T
    edges = [0, *torch.tensor(config.hook_widths or [config.d_out]).cumsum(0).tolist()]
    penalty = sum(
        f[:, i].sum() * sum(weights["W_dec"][i, start:end].norm() for start, end in itertools.pairwise(edges))
        for i in range(f.shape[1])
    )
    return ((y - y_hat) ** 2).sum() / len(x) + sparsity_coefficient * penalty / len(x)


def _gated_loss(weights: dict[str, Tensor], x: Tensor, sparsity_coefficient: float) -> Tensor:
    """Rajamanoharan et al. 2024 (arXiv:2404.16014), equations 4 to 8, for a decoder of unit norm."""
    u = (x - weights["b_dec"]) @ weights["W_enc"].T
    pi = u + weights["b_gate"]
    f = (pi > 0).double() * (weights["r_mag"].exp() * u + weights["b_mag"]).relu()
    x_hat = f @ weights["W_dec"] + weights["b_dec"]
    by_gate = pi.relu() @ weights["W_dec"].detach() + weights["b_dec"].detach()
    squares = ((x - x_hat) ** 2).sum() + ((x - by_gate) ** 2).sum()
    return (squares + sparsity_coefficient * pi.relu().sum()) / len(x)


CHOICES = {
    "topk": topk_reference,
    "abstopk": abs_topk_reference,
    "batchtopk": batch_topk_reference,
    "matryoshka_batchtopk": batch_topk_reference,
}


def _topk_family_loss(config, weights: dict[str, Tensor], x: Tensor, dead: Tensor | None) -> Tensor:
    h = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    f = h * (CHOICES[config.architecture](h.detach(), config.k) != 0)
    x_hat = f @ weights["W_dec"] + weights["b_dec"]
    widths = config.matryoshka_widths or (config.d_sae,)
    prefixes = [f[:, :width] @ weights["W_dec"][:width] + weights["b_dec"] for width in widths]
    loss = sum(((x - prefix) ** 2).sum() for prefix in prefixes) / len(widths) / len(x) / config.total_variance
    n_dead = 0 if dead is None else int(dead.sum())
    if n_dead == 0 or config.k_aux == 0:
        return loss
    e = (x - x_hat).detach()
    signed = config.architecture == "abstopk"
    h_dead = torch.where(dead, h.detach(), 0.0 if signed else -torch.inf)
    choose = abs_topk_reference if signed else topk_reference
    f_dead = h * (choose(h_dead, min(config.k_aux, n_dead)) != 0)
    aux = ((e - f_dead @ weights["W_dec"]) ** 2).sum() / (e**2).sum()
    return loss + config.aux_coefficient * min(1.0, n_dead / config.k_aux) * aux


def _jumprelu(
    config, weights: dict[str, Tensor], x: Tensor, sparsity_coefficient: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """By hand, for the straight-through gradient is a definition, not a derivative."""
    theta = weights["threshold"]
    h = x @ weights["W_enc"].T + weights["b_enc"]
    fires = (h > theta).double()
    f = h * fires
    e = f @ weights["W_dec"] + weights["b_dec"] - x
    loss, to_x_hat, l0 = (e**2).sum() / len(x), 2 * e / len(x), fires.sum() / len(x)
    to_f, to_W_dec, to_fires = to_x_hat @ weights["W_dec"].T, f.T @ to_x_hat, torch.zeros_like(h)
    below, lambda_p = (theta - h).relu(), config.pre_act_loss_coefficient or 0.0
    norms = weights["W_dec"].norm(dim=1)
    to_norms = lambda_p * below.sum(0) / len(x)
    if config.jumprelu_sparsity_loss_mode == "tanh":
        c = config.jumprelu_tanh_scale
        squashed = (c * f * norms).tanh()
        loss = loss + (sparsity_coefficient * squashed.sum() + lambda_p * (below * norms).sum()) / len(x)
        slope = sparsity_coefficient * c * (1 - squashed**2) / len(x)
        to_f, to_norms = to_f + slope * norms, to_norms + (slope * f).sum(0)
    elif config.jumprelu_sparsity_loss_mode == "quadratic":
        excess = l0 / config.target_l0 - 1
        loss = loss + sparsity_coefficient * excess**2
        to_fires += sparsity_coefficient * 2 * excess / config.target_l0 / len(x)
    else:
        loss = loss + sparsity_coefficient * l0
        to_fires += sparsity_coefficient / len(x)
    to_h, to_theta = jumprelu_gradients_reference(h, theta, config.jumprelu_bandwidth, to_f, to_fires)
    pulled = lambda_p * (below > 0) * norms / len(x)
    to_h, to_theta = to_h - pulled, to_theta + pulled.sum(0)
    return loss, {
        "W_enc": to_h.T @ x,
        "b_enc": to_h.sum(0),
        "W_dec": to_W_dec + (to_norms / norms)[:, None] * weights["W_dec"],
        "b_dec": to_x_hat.sum(0),
        "threshold": to_theta,
    }


def adam_reference(
    weight: Tensor, gradients: list[Tensor], *, lr: float, beta1: float, beta2: float, eps: float
) -> Tensor:
    """The weight after one step a gradient (Kingma and Ba 2015, algorithm 1)."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        weight = weight - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return weight


def unit_roundoff(family: str, dtype: torch.dtype) -> float:
    """Of the norm: transformers' RMSNorms compute in float32 even where the model is in float64."""
    exact = dtype == torch.float64 and family in LAYER_NORMED
    return torch.finfo(dtype).eps / 2 if exact else max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2
