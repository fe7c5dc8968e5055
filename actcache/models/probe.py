"""A few values of one forward pass over fixed tokens: they tell models apart that no hash does, on any device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_TOKENS = 16
STEP = 7919  # between token ids; a prime, so that they spread over any vocabulary
ROWS = (3, 7, 11, 15)
N_VALUES = 16
DIGITS = 6  # significant ones: finer than every tolerance


def probe_tokens(vocab_size: int, max_positions: int | None) -> Int[Tensor, "1 position"]:
    """The fixed tokens, int64: N_TOKENS of them, or as many as the model has positions for."""
    n_tokens = min(N_TOKENS, max_positions or N_TOKENS)
    return (torch.arange(1, n_tokens + 1) * STEP % vocab_size)[None]


def probe_rows(x: Float[Tensor, "position _"]) -> list[list[float] | None]:
    """A list for each of the positions ROWS: the norm of the row, then N_VALUES of its values, evenly strided.

    None stands for a row that is not finite.
    """
    x = x[[position for position in ROWS if position < len(x)]].detach().double().cpu()
    values = torch.cat([x.norm(dim=1, keepdim=True), x[:, :: max(1, x.shape[1] // N_VALUES)][:, :N_VALUES]], dim=1)
    return [
        [float(f"{value:.{DIGITS}g}") for value in row] if all(map(math.isfinite, row)) else None
        for row in values.tolist()
    ]


def probe_differences(there: Mapping[str, Any], here: Mapping[str, Any], share: float) -> list[str]:
    """How far two probes are apart, in words; [] if no value differs by more than `share` of the norm of its row."""
    furthest = max((_apart(there.get(part), here.get(part)) for part in ("stream", "logits")), default=0.0)
    if furthest <= share:
        return []
    return [
        f"it computes other values for the same tokens ({furthest:.1e} of their norm apart, where rounding explains "
        f"{share:.1e})"
    ]


def _apart(there: list[Any] | None, here: list[Any] | None) -> float:
    """The largest difference of two rows' values, as a fraction of the norm of the first; infinite in another shape."""
    if there is None or here is None:
        return 0.0 if there is here else math.inf
    if len(there) != len(here):
        return math.inf
    furthest = 0.0
    for one, other in zip(there, here, strict=True):
        if one is None or other is None:
            furthest = max(furthest, 0.0 if one is other else math.inf)
        else:
            off = max(abs(a - b) for a, b in zip(one, other, strict=True)) if len(one) == len(other) else math.inf
            furthest = max(furthest, off / one[0] if one[0] else (0.0 if not off else math.inf))
    return furthest


def rounding_bound(dtype: torch.dtype, d_model: int, n_layers: int) -> float:
    """How far apart two computations of a row may be, as a fraction of its norm, if they round differently.

    A product of the model adds at most 4 * d_model terms in float32 and rounds the sum to its dtype. The rounding
    errors of n terms grow as sqrt(n) times the unit roundoff (Higham and Mary 2019, "A New Approach to Probabilistic
    Rounding Error Analysis"). Each of n_layers blocks adds two such products to the stream. A factor of two is for the
    errors of both computations, and a factor of four for the operations between the products.
    """
    product = unit_roundoff(dtype) + math.sqrt(4 * d_model) * unit_roundoff(torch.float32)
    return 2 * 4 * math.sqrt(2 * n_layers) * product


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a floating-point dtype."""
    return torch.finfo(dtype).eps / 2
