"""What the tests of architectures and losses share: rows, targets, weights and definitions in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.reference import CHOICES
from support.tiny_saes import TOPK_FAMILY, TRANSCODERS
from trainer.config.settings import SAEConfig


def double_weights(config: SAEConfig, *, b_enc: float = 0.0, seed: int = 5) -> dict[str, Tensor]:
    """Float64 leaves with every bias and threshold away from zero; b_enc shifts how many latents fire."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = {
        "W_enc": draw(config.d_sae, config.d_in) / math.sqrt(config.d_in),
        "b_enc": draw(config.d_sae) / 10 + b_enc,
        "W_dec": draw(config.d_sae, config.d_out) / math.sqrt(config.d_out),
        "b_dec": draw(config.d_out) / 10,
    }
    if config.architecture == "skip_transcoder":
        weights["W_skip"] = draw(config.d_out, config.d_in) / math.sqrt(config.d_in)
    if config.architecture == "jumprelu":
        weights["threshold"] = (draw(config.d_sae) / 10 - 1.0).exp()
    if config.architecture == "gated":
        weights["b_gate"] = weights.pop("b_enc")
        weights["b_mag"], weights["r_mag"] = (draw(config.d_sae) / 4 for _ in range(2))
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def rows(batch: int, d_in: int, seed: int = 6) -> Tensor:
    return torch.randn(batch, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets(config: SAEConfig, x: Tensor) -> Tensor:
    """What is to be reconstructed from x: x itself, of a transcoder other rows."""
    return rows(len(x), config.d_out, seed=9).to(x) if config.architecture in TRANSCODERS else x


def definition(config: SAEConfig, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """feature_acts [batch, d_sae] and x_hat."""
    W = {name: weight.detach() for name, weight in weights.items()}
    subtracts = config.architecture in (*TOPK_FAMILY, "gated")
    u = (x - W["b_dec"] if subtracts else x) @ W["W_enc"].T
    if config.architecture == "gated":
        f = (u * W["r_mag"].exp() + W["b_mag"]).relu() * (u + W["b_gate"] > 0)
    elif config.architecture in CHOICES:
        f = CHOICES[config.architecture](u + W["b_enc"], config.k)
    else:
        h = u + W["b_enc"]
        f = h * (h > W["threshold"]) if config.architecture == "jumprelu" else h.relu()
    skipped = x @ W["W_skip"].T if "W_skip" in W else 0.0
    return f, f @ W["W_dec"] + W["b_dec"] + skipped
