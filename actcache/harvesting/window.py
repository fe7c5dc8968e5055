"""`Window`: memory in which the rows of one shard gather, in stored order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from actcache.flow import ActivationBatch
from actcache.format.arrays import hook_arrays
from actcache.format.codecs import Codec, stored_tensors
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.records import HookSpec


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
