"""The metrics of a batch by their definitions, in float64."""

from __future__ import annotations

import numpy as np
import torch


def definitions(x: torch.Tensor, feature_acts: torch.Tensor, x_hat: torch.Tensor) -> dict[str, float]:
    """The formulas as written, on the whole split, in numpy float64."""
    a, f, b = x.double().numpy(), feature_acts.double().numpy(), x_hat.double().numpy()
    variance = ((a - a.mean(0)) ** 2).sum(1).mean()
    error = ((a - b) ** 2).sum(1).mean()
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    return {
        "explained_variance": 1 - error / variance,
        "mse": error,
        "cossim": ((a * b).sum(1) / (norm_a * norm_b)).mean(),
        "l2_ratio": (norm_b / norm_a).mean(),
        "relative_reconstruction_bias": (norm_b**2).mean() / (a * b).sum(1).mean(),
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "dead_fraction": (~(f != 0).any(0)).mean(),
    }
