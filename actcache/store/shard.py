"""`Shard`: one shard that is to be written, its sequences, and the row in which each token is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from actcache.flow import TokenBatch
from actcache.format.manifest import Plan
from actcache.format.records import HookSpec
from actcache.format.scatter import shard_permutation
from actcache.store.cache import sequence_reader
from actcache.store.kept import CacheFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard that is to be written.

    first_token: the first token of the shard, counted in sequence order from the start of the split. permutation: token
    first_token + t is stored in row permutation[t] of the shard. sequences: token ids of every packed sequence that has
    a token in the shard. first_sequence: number of the first of these. hooks: the hooks that are to be written.
    revision: as in ShardRecord.
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
    def of(
        files: CacheFiles, plan: Plan, split: str, index: int, hooks: tuple[HookSpec, ...], revision: int = 0
    ) -> Shard:
        """The shard as far as it is known before the model runs.

        Args:
            files: of the cache, finished or not.
            plan: its plan.
            split, index: which shard.
            hooks: the hooks that are to be written.
            revision: as in ShardRecord.

        Raises:
            CorruptShard: the packed sequences are damaged.
        """
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
            sequences=sequence_reader(files, plan, split, "id").read(first, last),
            hooks=hooks,
            revision=revision,
        )

    @property
    def n_rows(self) -> int:
        """Rows of the shard."""
        return len(self.permutation)

    @property
    def flat_tokens(self) -> Int64[np.ndarray, " row"]:
        """For each stored row the number of its token, counted in sequence order from the start of the split."""
        tokens = np.empty(self.n_rows, dtype=np.int64)
        tokens[self.permutation] = np.arange(self.first_token, self.first_token + self.n_rows)
        return tokens

    @property
    def token_columns(self) -> tuple[Int32[np.ndarray, " row"], ...]:
        """Token id, sequence number and position of each stored row; one array each."""
        sequence, position = np.divmod(self.flat_tokens, self.sequences.shape[1])
        token_ids = self.sequences[sequence - self.first_sequence, position]
        return token_ids, sequence.astype(np.int32), position.astype(np.int32)

    def token_batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """The sequences of the shard, `batch_size` at a time.

        A shard never shares a forward batch with another shard.
        """
        for start in range(0, len(self.sequences), batch_size):
            yield TokenBatch(
                token_ids=self.sequences[start : start + batch_size], first_sequence=self.first_sequence + start
            )
