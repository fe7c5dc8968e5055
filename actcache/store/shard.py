"""One shard of a cache that is being written: its rows, its tokens and where each goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from actcache.flow import TokenBatch
from actcache.format.manifest import Plan
from actcache.format.records import HookSpec
from actcache.format.scatter import shard_permutation
from actcache.store.cache import sequence_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard to be written.

    first_token, permutation: token `first_token + t` of the split lies in row `permutation[t]`. first_sequence,
    sequences: the packed sequences that the shard touches. hooks: those to be written. revision: as in ShardRecord.
    """

    split: str
    index: int
    first_token: int
    permutation: Int64[np.ndarray, " row"]
    first_sequence: int
    sequences: Int32[np.ndarray, "sequence position"]
    hooks: tuple[HookSpec, ...]
    revision: int

    @staticmethod
    def of(root: Path, plan: Plan, split: str, index: int, hooks: tuple[HookSpec, ...], revision: int = 0) -> Shard:
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
            revision=revision,
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
