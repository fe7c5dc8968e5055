"""Activations as language models have them: heavy tails, a massive channel, and the ends of a dtype's range."""

import torch


def activations(dtype: torch.dtype) -> torch.Tensor:
    """Heavy-tailed rows with a massive channel, zeros, subnormals and the largest finite number."""
    x = torch.randn(256, 48, generator=torch.Generator().manual_seed(0)) ** 3
    x[:, 7] *= 900
    x[3] = 0
    x[4, 0] = torch.finfo(dtype).max
    x[4, 1] = torch.finfo(dtype).tiny / 2
    return x.to(dtype)
