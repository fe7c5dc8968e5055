"""`Window`: memory in which the rows of one shard gather, in stored order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from actcache.flow import ActivationBatch
from actcache.format.arrays import hook_arrays
from actcache.format.codecs import Codec, stored_tensors
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.records import HookSpec
from actcache.machine.limits import SCARCE_BYTES, memory_room, require_memory_for_array


def window_bytes(hooks: Sequence[HookSpec], codec: Codec, n_rows: int) -> int:
    """What a window takes."""
    arrays = [array for hook in hooks for array in hook_arrays(hook, codec, n_rows)]
    return sum(n_rows * math.prod(array.row_shape) * TORCH_DTYPE[array.dtype].itemsize for array in arrays)


def windows_that_fit(n_windows: int, n_bytes: int) -> int:
    """That many windows, or one where memory is short. Raises MemoryError if not even one fits.

    Their memory is taken as they are filled, so what does not fit would end the process then.

    n_bytes: of one window, in the memory of the machine.
    """
    if memory_room().n_bytes < n_windows * n_bytes + SCARCE_BYTES:
        n_windows = min(1, n_windows)
    require_memory_for_array(n_windows * n_bytes, "gathering the rows of a shard")
    return n_windows


class Window:
    """The rows of one shard while they gather.

    stored: hook name -> the elements of each array, on the model's device.
    """

    def __init__(self, hooks: Sequence[HookSpec], codec: Codec, n_rows: int, device: torch.device):
        """Allocate memory for `n_rows` rows of every hook, as the codec stores them."""
        self._hooks, self._codec = {hook.hook_name: hook for hook in hooks}, codec
        self.stored = {
            hook.hook_name: tuple(
                torch.empty(n_rows, *array.row_shape, dtype=TORCH_DTYPE[array.dtype], device=device)
                for array in hook_arrays(hook, codec, n_rows)
            )
            for hook in hooks
        }

    def add(self, batch: ActivationBatch, first_token: int, permutation: Int64[Tensor, " row"]) -> None:
        """Store the rows of a batch that belong to the shard.

        Args:
            batch: activations of one hook.
            first_token: the first token of the shard.
            permutation: where each token of the shard is stored, as Shard.permutation.
        """
        rows = batch.x.flatten(0, 1)  # (sequence * position, d_in)
        skip = max(first_token - batch.first_token, 0)
        start = max(batch.first_token - first_token, 0)
        n_rows = min(len(rows) - skip, len(permutation) - start)
        target_rows = permutation[start : start + n_rows]
        stored = stored_tensors(rows[skip : skip + n_rows], self._hooks[batch.hook_name].dtype, self._codec)
        for window, part in zip(self.stored[batch.hook_name], stored, strict=True):
            window.index_copy_(0, target_rows, part.to(window.device, non_blocking=True))
