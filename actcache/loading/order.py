"""Shuffle as arithmetic: (seed, epoch, step) -> rows. No I/O and no state, so a resumed run needs only its position.

Two permutations make the order. At harvest `shard_permutation` scatters the tokens of a shard over its rows. When
loading, `chunk_order` permutes all chunks of a split; the order is cut into groups of k chunks, and `group_order`
permutes the rows of a group jointly. Companions of the same document in a batch of b rows then number about
ideal + b * L / (k * S), L the document length and S the shard rows.

numpy does not promise the same `permutation` in every version; the raw stream of a bit generator it does.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from actcache.format.scatter import keyed_permutation


def chunk_order(n_chunks: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " n_chunks"]:
    """Permutation of range(n_chunks) for one epoch; keyed by sha256("chunks:{seed}:{epoch}")."""
    if n_chunks < 1 or seed < 0 or epoch < 0:
        raise ValueError(
            "chunk_order: need n_chunks >= 1, seed >= 0, epoch >= 0; "
            f"got n_chunks={n_chunks}, seed={seed}, epoch={epoch}"
        )
    return keyed_permutation(n_chunks, "chunks", seed, epoch)


def group_order(n_rows: int, *, seed: int, epoch: int, group: int) -> Int64[np.ndarray, " n_rows"]:
    """Permutation of the rows of one group of chunks; keyed by sha256("rows:{seed}:{epoch}:{group}")."""
    return keyed_permutation(n_rows, "rows", seed, epoch, group)


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Rows start to stop, in served order, of one group of one epoch."""

    epoch: int
    group: int
    start: int
    stop: int


class EpochOrder:
    """Which rows batch `step` holds, when `kept[c]` rows of chunk c pass the filters.

    The stream of all epochs is one line of `epochs * sum(kept)` rows, or of `limit` if that is fewer: epoch after
    epoch, group after group. Batch `step` is the slice [step * batch_tokens, (step + 1) * batch_tokens) of it; only the
    last may be shorter.
    """

    def __init__(
        self,
        kept: Sequence[int],
        *,
        seed: int,
        epochs: int,
        batch_tokens: int,
        group_chunks: int = 64,
        limit: int | None = None,
    ):
        if batch_tokens < 1 or epochs < 1 or group_chunks < 1 or (limit is not None and limit < 0):
            raise ValueError(
                "EpochOrder: need batch_tokens >= 1, epochs >= 1, group_chunks >= 1, limit >= 0 or None; "
                f"got batch_tokens={batch_tokens}, epochs={epochs}, group_chunks={group_chunks}, limit={limit}"
            )
        self._kept = np.asarray(kept, dtype=np.int64)
        self.seed, self.epochs, self.batch_tokens, self.group_chunks = seed, epochs, batch_tokens, group_chunks
        self.n_rows = int(self._kept.sum())
        self.n_stream_rows = epochs * self.n_rows if limit is None else min(limit, epochs * self.n_rows)
        self.n_steps = -(-self.n_stream_rows // batch_tokens)
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}

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
        return self.span(step * self.batch_tokens, min((step + 1) * self.batch_tokens, self.n_stream_rows))

    def span(self, start: int, stop: int) -> list[GroupSlice]:
        """Where rows [start, stop) of the stream lie, in order."""
        found = []
        while start < stop:
            found.append(self._slice(start, stop))
            start += found[-1].stop - found[-1].start
        return found

    def following(self, epoch: int, group: int) -> tuple[int, int] | None:
        """The (epoch, group) served after this one; None after the last."""
        position = epoch * self.n_rows + self._epoch(epoch)[1][group + 1]  # where its rows end in the stream
        if position >= self.n_stream_rows:
            return None
        following = self._slice(position, position + 1)
        return following.epoch, following.group

    def _slice(self, position: int, stop: int) -> GroupSlice:
        epoch, offset = divmod(position, self.n_rows)
        starts = self._epoch(epoch)[1]
        group = bisect.bisect_right(starts, offset) - 1
        start = offset - starts[group]
        return GroupSlice(epoch, group, start, min(starts[group + 1] - starts[group], start + stop - position))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """(chunk order, first served row of each group and the total) of an epoch; the last three asked are kept."""
        found = self._epochs.get(epoch)
        if found is None:
            order = chunk_order(len(self._kept), seed=self.seed, epoch=epoch)
            edges = np.arange(0, len(order), self.group_chunks)
            sizes = np.add.reduceat(self._kept[order], edges)
            found = order, [0, *np.cumsum(sizes).tolist()]
            self._epochs = {**dict(list(self._epochs.items())[-2:]), epoch: found}  # replaced whole: threads read it
        return found


class MixtureOrder:
    """Which stream gives each row of batch `step`, when streams of `n_rows[i]` rows are mixed by `shares[i]`.

    After t whole batches of b rows, streams 0 to i together have given floor(W_i * t * b) rows, W_i the sum of the
    first i + 1 shares over the sum of all, in exact fractions: the totals are exact, and each stream has given its
    share of t * b rounded down or up. Within a batch the c rows that a stream gives lie evenly, row j at (j + 1/2) / c
    of its length (at equal places the earlier stream first), so that parts of a batch are mixed alike.

    The mixture ends before the first row that its stream no longer has, or after `limit` rows.
    """

    def __init__(
        self, shares: Sequence[Fraction], n_rows: Sequence[int], *, batch_tokens: int, limit: int | None = None
    ):
        if min(shares) * batch_tokens < sum(shares):  # or a count of a batch could fall below zero
            raise ValueError(
                f"MixtureOrder: the smallest of the shares must be worth a row of a batch of {batch_tokens}; "
                f"got {[float(share) for share in shares]}"
            )
        self.batch_tokens = batch_tokens
        self._cumulative = [Fraction(part, sum(shares)) for part in itertools.accumulate(shares)]
        self._counts = n_rows
        whole = bisect.bisect_left(range(sum(n_rows) // batch_tokens + 1), True, key=lambda t: self._lacks(t + 1))
        owed = np.array(n_rows) - self.given(whole)
        owner = self.owners(whole)
        missing = np.concatenate([np.flatnonzero(owner == i)[owed[i] :] for i in range(len(shares))])
        self.n_stream_rows = whole * batch_tokens + int(missing.min())
        if limit is not None:
            self.n_stream_rows = min(limit, self.n_stream_rows)
        self.n_steps = -(-self.n_stream_rows // batch_tokens)

    def given(self, step: int) -> Int64[np.ndarray, " stream"]:
        """How many rows each stream has given before batch `step`."""
        ends = [math.floor(share * step * self.batch_tokens) for share in self._cumulative]
        return np.diff(np.array([0, *ends]))

    def owners(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Which stream gives each row of a whole batch; its rows come in the order of the stream."""
        counts = self.given(step + 1) - self.given(step)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts.tolist()])
        return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]

    def totals(self) -> Int64[np.ndarray, " stream"]:
        """How many rows each stream gives in all."""
        step, rest = divmod(self.n_stream_rows, self.batch_tokens)
        return self.given(step) + np.bincount(self.owners(step)[:rest], minlength=len(self._counts))

    def _lacks(self, step: int) -> bool:
        return bool((self.given(step) > self._counts).any())
