"""Rows in int8: blocks of 32 channels, each with a bfloat16 scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from jaxtyping import BFloat16, Float, Float32, Int8
from torch import Tensor
from torch.nn.functional import pad

from actcache.format.dtypes import widened

BLOCK_CHANNELS = 32
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a scale is never zero and never loses precision


def quantise(
    x: Float[Tensor, "row d_in"],
) -> tuple[Int8[Tensor, "row d_in"], BFloat16[Tensor, "row block"]]:
    """(q8, scale): integers in [-127, 127], and one scale for every block of 32 channels; the last block may be short.

    scale is the largest magnitude of the block divided by 127, rounded up to bfloat16, and at least 2^-126. So
    scale <= peak / 127 * (1 + 2^-7), and |q8 * scale - x| <= scale / 2. Each block has a scale of its own because a few
    channels of a residual stream are hundreds of times larger than the rest. The scale of a block that is not finite is
    NaN, and so are its values.
    """
    d_in = x.shape[1]
    blocks = pad(x.float(), (0, -d_in % BLOCK_CHANNELS)).unflatten(1, (-1, BLOCK_CHANNELS))  # (row, block, 32)
    step = (blocks.abs().amax(dim=2) / 127).clamp_min(SMALLEST_SCALE)
    scale = rounded_up(step)
    q8 = (blocks / scale.float().unsqueeze(2)).round_().to(torch.int8)
    return q8.flatten(1)[:, :d_in].contiguous(), scale


def rounded_up(x: Float32[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """Numbers of at least 0, rounded up to bfloat16; NaN and infinity become NaN."""
    upper = ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    # The sum overflows for some NaNs, such as CUDA's 0x7FFFFFFF, and they would become -0.
    return upper.masked_fill(~x.isfinite(), torch.nan)


def dequantise(
    q8: Int8[Tensor, "row d_in"], scale: BFloat16[Tensor, "row block"], dtype: torch.dtype
) -> Float[Tensor, "row d_in"]:
    """The activations, [row, d_in], that `quantise` turned into q8 and scale; on any device.

    The product q8 * scale is rounded once to `dtype` and clamped to its finite range.
    """
    d_in = q8.shape[1]
    wide = dtype if dtype == torch.bfloat16 else torch.float32  # bfloat16 holds q8 exactly and rounds the product once
    blocks = pad(q8, (0, -d_in % BLOCK_CHANNELS)).unflatten(1, (-1, BLOCK_CHANNELS))
    product = blocks.to(wide) * scale.to(wide).unsqueeze(2)
    largest = torch.finfo(dtype).max
    return product.clamp_(-largest, largest).flatten(1)[:, :d_in].to(dtype)


def float32_dequantised(q8: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """The same numbers as `dequantise`, in float32, computed by numpy. scale: bfloat16 stored as uint16."""
    product = q8 * np.repeat(widened(scale), BLOCK_CHANNELS, axis=1)[:, : q8.shape[1]]
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    largest = float(ml_dtypes.finfo(numpy_dtype).max)
    return product.clip(-largest, largest).astype(numpy_dtype).astype(np.float32)
