"""The dtypes of a cache: how each is stored, what torch calls it, and views between the two."""

from __future__ import annotations

import numpy as np
import torch

STORAGE_DTYPE = {
    "bfloat16": "uint16",
    "float16": "float16",
    "float32": "float32",
    "int32": "int32",
    "int8": "int8",
}
TORCH_DTYPE = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
    "int8": torch.int8,
}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")


def storage_view(x: torch.Tensor) -> np.ndarray:
    """The stored elements of a CPU tensor: bfloat16 as uint16, every other dtype as itself. Both share memory."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def tensor_view(stored: np.ndarray, dtype: str) -> torch.Tensor:
    """Stored elements as a tensor of the logical dtype, the inverse of `storage_view`. Both share memory."""
    x = torch.from_numpy(stored)
    return x.view(torch.bfloat16) if dtype == "bfloat16" else x


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 elements, stored as uint16, as float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
