"""The active entries of a batch, sorted by row and by latent, and the buffer that steps share.

The other modules of `kernels` sum over `ActiveEntries` alone. This module also says which tensors are on CUDA, where
reading a value waits for the device, and it imports `triton_kernels` when it is first needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Workspace:
    """A [batch, d_sae] buffer that steps reuse. To allocate a new one would take as long as to fill it.

    It is bytes, so that steps in one dtype and in another use the same memory in turn.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def empty(self, n_rows: int, d_sae: int, like: Tensor) -> Float[Tensor, "{n_rows} {d_sae}"]:
        """An uninitialised matrix with the dtype and device of `like`. The next call hands out the same memory."""
        n_bytes = n_rows * d_sae * like.itemsize
        if self._buffer.numel() < n_bytes or self._buffer.device != like.device:
            self._buffer = like.new_empty(n_bytes, dtype=torch.uint8)
        return self._buffer[:n_bytes].view(like.dtype).view(n_rows, d_sae)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActiveEntries:
    """The active entries of a [batch, d_sae] matrix, ordered by row and by latent. A row may have any number of them.

    Attributes:
        row: the row of each entry, ascending.
        latent: the latent of each entry.
        row_start: row b has the entries row_start[b] : row_start[b + 1].
        by_latent: the indices that sort the entries by latent; entries of one latent stay in the order of their rows.
        row_by_latent: `row`, sorted by latent.
        latent_start: latent i has the entries latent_start[i] : latent_start[i + 1], once they are sorted by latent.
    """

    row: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    row_start: Int[Tensor, " batch_plus_1"]
    by_latent: Int[Tensor, " active"]
    row_by_latent: Int[Tensor, " active"]
    latent_start: Int[Tensor, " d_sae_plus_1"]

    @staticmethod
    def of(row: Int[Tensor, " active"], latent: Int[Tensor, " active"], *, batch: int, d_sae: int) -> ActiveEntries:
        """Make the entries from their coordinates, which must come with ascending rows."""
        # The sort is stable because the order of a sum changes its rounding. It runs on the narrowest type because a
        # radix sort of int16 is three times faster.
        narrow = latent.to(torch.int16 if d_sae <= 1 << 15 else torch.int32)
        by_latent = narrow.argsort(stable=True)
        return ActiveEntries(
            row=row,
            latent=latent,
            row_start=_starts(row, None, batch),
            by_latent=by_latent,
            row_by_latent=row.index_select(0, by_latent),
            latent_start=_starts(latent, by_latent, d_sae),
        )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.latent_start) - 1


def count_true(mask: Bool[Tensor, "*shape"]) -> int:
    """How many entries are True. On CUDA this waits for the device."""
    return int(mask.count_nonzero())


def indices_of_true(mask: Bool[Tensor, "batch d_sae"], n: int) -> tuple[Int[Tensor, " {n}"], Int[Tensor, " {n}"]]:
    """(row, latent) of the n entries that are True, in row-major order.

    n: what `count_true` returned. Because it is known, this function does not wait for the device.
    """
    if on_cuda(mask):
        found = torch.nonzero_static(mask, size=n)  # (n, 2)
        return found[:, 0].contiguous(), found[:, 1].contiguous()
    row, latent = mask.nonzero(as_tuple=True)
    return row, latent


def firing_counts(values: Float[Tensor, " active"], entries: ActiveEntries) -> Int[Tensor, " d_sae"]:
    """In how many rows each latent is active (not zero)."""
    if on_cuda(values):  # bincount and boolean masks would wait for the device
        before = torch.nn.functional.pad((values.detach() != 0)[entries.by_latent].cumsum(0), (1, 0))
        return before[entries.latent_start].diff()
    return torch.bincount(entries.latent[values.detach() != 0], minlength=entries.d_sae)


def on_cuda(tensor: Tensor) -> bool:
    """Whether a tensor is on CUDA, where reading a value waits until the device has done its earlier work."""
    return tensor.is_cuda


def triton_kernels() -> Any:
    """The module `triton_kernels`, imported when it is first needed: a machine without CUDA need not have triton."""
    return importlib.import_module("trainer.kernels.triton_kernels")


def _starts(keys: Int[Tensor, " active"], order: Int[Tensor, " active"] | None, n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each key of 0 .. n-1 starts once the keys are sorted, and where the last one ends.

    order: the indices that sort the keys; None if they are sorted already.
    """
    if on_cuda(keys):  # bincount would wait for the device
        in_order = keys if order is None else keys[order]
        return torch.searchsorted(in_order, torch.arange(n + 1, dtype=keys.dtype, device=keys.device))
    counts = torch.bincount(keys, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
