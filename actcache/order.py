"""Shuffle as arithmetic: (seed, epoch, step) -> rows. No I/O and no state, so a resumed run needs only its position.

Two permutations make the order. At harvest `shard_permutation` scatters the tokens of a shard over its rows. When
loading, `chunk_order` permutes all chunks of a split; the order is cut into groups of k chunks, and `group_order`
permutes the rows of a group jointly. Companions of the same document in a batch of b rows then number about
ideal + b * L / (k * S), L the document length and S the shard rows.

numpy does not promise the same `permutation` in every version; the raw stream of a bit generator it does.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


def _permutation(n: int, *key: object) -> Int64[np.ndarray, " n"]:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8")
    return np.argsort(np.random.Philox(key=words).random_raw(n), kind="stable")


def shard_permutation(n_rows: int, *, seed: int, split: str, index: int) -> Int64[np.ndarray, " n_rows"]:
    """Where each token of a shard is stored: token `first + t` lies in row `first + permutation[t]`.

    The stable argsort of the raw 64-bit stream of Philox, keyed by the first 16 bytes (two little-endian words) of
    sha256("scatter:{seed}:{split}:{index}"). The same for all hooks.
    """
    return _permutation(n_rows, "scatter", seed, split, index)


def chunk_order(n_chunks: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " n_chunks"]:
    """Permutation of range(n_chunks) for one epoch; keyed by sha256("chunks:{seed}:{epoch}")."""
    if n_chunks < 1 or seed < 0 or epoch < 0:
        raise ValueError(
            "chunk_order: need n_chunks >= 1, seed >= 0, epoch >= 0; "
            f"got n_chunks={n_chunks}, seed={seed}, epoch={epoch}"
        )
    return _permutation(n_chunks, "chunks", seed, epoch)


def group_order(n_rows: int, *, seed: int, epoch: int, group: int) -> Int64[np.ndarray, " n_rows"]:
    """Permutation of the rows of one group of chunks; keyed by sha256("rows:{seed}:{epoch}:{group}")."""
    return _permutation(n_rows, "rows", seed, epoch, group)


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Rows start to stop, in served order, of one group of one epoch."""

    epoch: int
    group: int
    start: int
    stop: int


class EpochOrder:
    """Which rows batch `step` holds, when `kept[c]` rows of chunk c pass the filters.

    The stream of all epochs is one line of `epochs * sum(kept)` rows: epoch after epoch, group after group. Batch
    `step` is the slice [step * batch_tokens, (step + 1) * batch_tokens) of it; only the last may be shorter.
    """

    def __init__(self, kept: Sequence[int], *, seed: int, epochs: int, batch_tokens: int, group_chunks: int = 64):
        if batch_tokens < 1 or epochs < 1 or group_chunks < 1:
            raise ValueError(
                "EpochOrder: need batch_tokens >= 1, epochs >= 1, group_chunks >= 1; "
                f"got batch_tokens={batch_tokens}, epochs={epochs}, group_chunks={group_chunks}"
            )
        self._kept = np.asarray(kept, dtype=np.int64)
        self.seed, self.epochs, self.batch_tokens, self.group_chunks = seed, epochs, batch_tokens, group_chunks
        self.n_rows = int(self._kept.sum())
        self.n_steps = -(-epochs * self.n_rows // batch_tokens)
        self._epoch_cache: tuple[int, np.ndarray, list[int]] | None = None

    def chunks(self, epoch: int, group: int) -> Int64[np.ndarray, " chunk"]:
        """The chunks of one group, in the order in which their rows are joined."""
        order = self._epoch(epoch)[0]
        return order[group * self.group_chunks : (group + 1) * self.group_chunks]

    def rows(self, epoch: int, group: int) -> Int64[np.ndarray, " row"]:
        """The joint permutation of a group's kept rows; entry j is the joined row that is served j-th."""
        starts = self._epoch(epoch)[1]
        n_rows = starts[group + 1] - starts[group]
        return group_order(n_rows, seed=self.seed, epoch=epoch, group=group)

    def slices(self, step: int) -> list[GroupSlice]:
        """Where the rows of batch `step` lie, in order. Raises IndexError past the last step."""
        if not 0 <= step < self.n_steps:
            raise IndexError(f"EpochOrder: step must be in [0, {self.n_steps}), got {step}")
        position = step * self.batch_tokens
        stop = min(position + self.batch_tokens, self.epochs * self.n_rows)
        found = []
        while position < stop:
            found.append(self._slice(position, stop))
            position += found[-1].stop - found[-1].start
        return found

    def following(self, epoch: int, group: int) -> tuple[int, int] | None:
        """The (epoch, group) served after this one; None after the last."""
        starts = self._epoch(epoch)[1]
        for later in range(group + 1, len(starts) - 1):
            if starts[later + 1] > starts[later]:
                return epoch, later
        return self._first_group(epoch + 1) if epoch + 1 < self.epochs else None

    def _first_group(self, epoch: int) -> tuple[int, int]:
        return epoch, bisect.bisect_right(self._epoch(epoch)[1], 0) - 1

    def _slice(self, position: int, stop: int) -> GroupSlice:
        epoch, offset = divmod(position, self.n_rows)
        starts = self._epoch(epoch)[1]
        group = bisect.bisect_right(starts, offset) - 1
        start = offset - starts[group]
        return GroupSlice(epoch, group, start, min(starts[group + 1] - starts[group], start + stop - position))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """(chunk order, first served row of each group and the total) of one epoch; the last one asked is kept."""
        cached = self._epoch_cache
        if cached is None or cached[0] != epoch:
            order = chunk_order(len(self._kept), seed=self.seed, epoch=epoch)
            edges = np.arange(0, len(order), self.group_chunks)
            sizes = np.add.reduceat(self._kept[order], edges)
            cached = (epoch, order, [0, *np.cumsum(sizes).tolist()])
            self._epoch_cache = cached
        return cached[1], cached[2]
