"""What some SAEs of SAELens do to each row before they encode it, and undo after they have decoded it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")  # of a row alone, as SAELens names them
LN_EPS = 1e-5  # of SAELens' layer_norm; it is added to the deviation


@dataclass(frozen=True, slots=True, eq=False)
class Normalised:
    """Rows in normalised units, and the way back: x = z * scale + mean.

    Attributes:
        z: the rows that the encoder takes.
        scale: what a row in normalised units is multiplied by on the way back; None if nothing is done.
        mean: what is then added to every channel; None if nothing is.
    """

    z: Float[Tensor, "*batch d_in"]
    scale: Float[Tensor, "*batch 1"] | None = None
    mean: Float[Tensor, "*batch 1"] | None = None

    def undone(self, z_hat: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """A reconstruction of z in the units of x."""
        if self.scale is None:
            return z_hat
        x_hat = z_hat * self.scale
        return x_hat if self.mean is None else x_hat + self.mean


def normalised(x: Float[Tensor, "*batch d_in"], how: str) -> Normalised:
    """The rows as SAELens' `normalize_activations` makes them.

    Args:
        x: the rows.
        how: "none"; "layer_norm", z = (x - mean) / (std + 1e-5), where std divides by d_in - 1, and which is undone by
            std alone; or "constant_norm_rescale", z = x sqrt(d_in) / ||x||. A row of zeros stays one.
    """
    match how:
        case "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            std = (x - mean).std(dim=-1, keepdim=True)
            return Normalised((x - mean) / (std + LN_EPS), std, mean)
        case "constant_norm_rescale":
            norm = x.norm(dim=-1, keepdim=True)
            factor = x.shape[-1] ** 0.5 / torch.where(norm == 0, 1.0, norm)
            return Normalised(x * factor, 1 / factor)
        case _:
            return Normalised(x)
