"""One shard in the making: which rows it has, and the window in which they gather in stored order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from actcache.flow import ActivationBatch, TokenBatch
from actcache.format.codecs import TORCH_DTYPE, Codec, stored_tensors
from actcache.format.manifest import HookSpec, Plan, hook_arrays
from actcache.loading.order import shard_permutation
from actcache.store.cache import sequence_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard to be written.

    first_token, permutation: token `first_token + t` of the split lies in row `permutation[t]`. first_sequence,
    sequences: the packed sequences that the shard touches. hooks: those to be written. attempt: as in ShardRecord.
    """

    split: str
    index: int
    first_token: int
    permutation: Int64[np.ndarray, " row"]
    first_sequence: int
    sequences: Int32[np.ndarray, "sequence position"]
    hooks: tuple[HookSpec, ...]
    attempt: int

    @staticmethod
    def of(root: Path, plan: Plan, split: str, index: int, hooks: tuple[HookSpec, ...], attempt: int = 0) -> Shard:
        """Read what is known of a shard before the model runs. Raises CorruptShard for damaged sequences."""
        first_token = index * plan.identity["shard_rows"]
        n_rows = plan.rows_of(split, index)
        context_size = plan.identity["context_size"]
        first, last = first_token // context_size, -(-(first_token + n_rows) // context_size)
        return Shard(
            split=split,
            index=index,
            first_token=first_token,
            permutation=shard_permutation(n_rows, seed=plan.identity["seed"], split=split, index=index),
            first_sequence=first,
            sequences=sequence_reader(root, plan, split, "id").read(first, last),
            hooks=hooks,
            attempt=attempt,
        )

    @property
    def n_rows(self) -> int:
        """Rows of the shard."""
        return len(self.permutation)

    @property
    def flat_tokens(self) -> Int64[np.ndarray, " row"]:
        """Flat token number, within the split, of each stored row."""
        tokens = np.empty(self.n_rows, dtype=np.int64)
        tokens[self.permutation] = np.arange(self.first_token, self.first_token + self.n_rows)
        return tokens

    @property
    def token_columns(self) -> tuple[Int32[np.ndarray, " row"], ...]:
        """Token id, sequence and position of each stored row."""
        sequence, position = np.divmod(self.flat_tokens, self.sequences.shape[1])
        token_ids = self.sequences[sequence - self.first_sequence, position]
        return token_ids, sequence.astype(np.int32), position.astype(np.int32)

    def token_batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """Forward batches restart at each shard, so that a shard never depends on where a run was cut."""
        for start in range(0, len(self.sequences), batch_size):
            yield TokenBatch(
                token_ids=self.sequences[start : start + batch_size], first_sequence=self.first_sequence + start
            )


class Window:
    """The rows of one shard while they come in, as they are stored; tensors lie on the model's device."""

    def __init__(self, hooks: Sequence[HookSpec], codec: Codec, rows: int, device: torch.device):
        self._hooks, self._codec = {hook.hook_name: hook for hook in hooks}, codec
        self.stored = {
            hook.hook_name: tuple(
                torch.empty(rows, *array.row_shape, dtype=TORCH_DTYPE[array.dtype], device=device)
                for array in hook_arrays(hook, codec, rows)
            )
            for hook in hooks
        }

    def add(self, batch: ActivationBatch, first_token: int, permutation: Int64[Tensor, " row"]) -> None:
        """Scatter the part of a batch that belongs to the shard starting at `first_token`."""
        rows = batch.x.flatten(0, 1)  # (sequence * position, d_in)
        skip = max(first_token - batch.first_token, 0)
        start = max(batch.first_token - first_token, 0)
        n_rows = min(len(rows) - skip, len(permutation) - start)
        places = permutation[start : start + n_rows]
        stored = stored_tensors(rows[skip : skip + n_rows], self._hooks[batch.hook_name].dtype, self._codec)
        for window, part in zip(self.stored[batch.hook_name], stored, strict=True):
            window.index_copy_(0, places, part.to(window.device, non_blocking=True))
