"""The order of the rows as arithmetic: `EpochOrder` for one cache, `MixtureOrder` for several.

Nothing is read and nothing is drawn, so a resumed run needs only its position. Rows are shuffled in two steps. At the
harvest, `shard_permutation` scatters the tokens of a shard over its rows. When loading, `chunk_order` permutes all
chunks of a split, every k of them form a group, and `group_order` permutes the rows of a group. So a row of a batch of
b rows has about ideal + b * L / (k * S) companions of its own document, where L is the length of a document in tokens
and S the rows of a shard.

The permutations are made of the raw stream of a bit generator. numpy promises that stream for every version, but not
its `permutation`.
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
    """Permutation of range(n_chunks) for one epoch, keyed by sha256("chunks:{seed}:{epoch}"). Raises ValueError."""
    if n_chunks < 1 or seed < 0 or epoch < 0:
        raise ValueError(
            "chunk_order: need n_chunks >= 1, seed >= 0, epoch >= 0; "
            f"got n_chunks={n_chunks}, seed={seed}, epoch={epoch}"
        )
    return keyed_permutation(n_chunks, "chunks", seed, epoch)


def group_order(n_rows: int, *, seed: int, epoch: int, group: int) -> Int64[np.ndarray, " n_rows"]:
    """Permutation of the rows of one group of chunks, keyed by sha256("rows:{seed}:{epoch}:{group}")."""
    return keyed_permutation(n_rows, "rows", seed, epoch, group)


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Rows [start, stop), in the order in which they are served, of one group of one epoch."""

    epoch: int
    group: int
    start: int
    stop: int


class EpochOrder:
    """The stream of the rows of one cache: epoch after epoch, and in each epoch group after group.

    Batch `step` holds rows [step * batch_tokens, (step + 1) * batch_tokens) of the stream; only the last batch may be
    shorter.

    Args:
        n_passing: for each chunk, how many of its rows pass the filters.
        seed: keys the permutations.
        epochs: how often every row comes.
        batch_tokens: rows of a batch.
        group_chunks: chunks of a group.
        limit: rows after which the stream ends; None for the end of the last epoch.

    Attributes:
        n_rows: rows of an epoch.
        n_stream_rows: rows of the stream.
        n_steps: batches of the stream.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        n_passing: Sequence[int],
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
        self._n_passing = np.asarray(n_passing, dtype=np.int64)
        self._seed, self._group_chunks = seed, group_chunks
        self.n_rows = int(self._n_passing.sum())
        self.n_stream_rows = epochs * self.n_rows if limit is None else min(limit, epochs * self.n_rows)
        self.n_steps = -(-self.n_stream_rows // batch_tokens)
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}

    def chunks(self, epoch: int, group: int) -> Int64[np.ndarray, " chunk"]:
        """The chunks of one group, in the order in which `rows` numbers their rows."""
        order = self._epoch(epoch)[0]
        return order[group * self._group_chunks : (group + 1) * self._group_chunks]

    def rows(self, epoch: int, group: int) -> Int64[np.ndarray, " row"]:
        """The order in which the rows of a group are served.

        The rows that pass the filters are numbered through all chunks of the group; entry j is the number of the row
        that is served j-th.
        """
        starts = self._epoch(epoch)[1]
        n_rows = starts[group + 1] - starts[group]
        return group_order(n_rows, seed=self._seed, epoch=epoch, group=group)

    def span(self, start: int, stop: int) -> list[GroupSlice]:
        """The parts of groups that rows [start, stop) of the stream consist of, in order."""
        found = []
        while start < stop:
            found.append(self._slice(start, stop))
            start += found[-1].stop - found[-1].start
        return found

    def following(self, epoch: int, group: int) -> tuple[int, int] | None:
        """The (epoch, group) served after this one; None after the last."""
        position = epoch * self.n_rows + self._epoch(epoch)[1][group + 1]  # the first row after this group
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
        """(chunk order, number of each group's first row and, last, the rows of the epoch).

        Three epochs are remembered.
        """
        found = self._epochs.get(epoch)
        if found is None:
            order = chunk_order(len(self._n_passing), seed=self._seed, epoch=epoch)
            edges = np.arange(0, len(order), self._group_chunks)
            sizes = np.add.reduceat(self._n_passing[order], edges)
            found = order, [0, *np.cumsum(sizes).tolist()]
            # a new dict, because threads read the old one
            self._epochs = {**dict(list(self._epochs.items())[-2:]), epoch: found}
        return found


class MixtureOrder:
    """Which stream gives each row of a mixture of streams.

    After t batches of b rows, streams 0 to i together have given floor(W_i * t * b) rows, where W_i is the sum of the
    first i + 1 shares divided by the sum of all shares, an exact fraction. So the batches are full, and each stream has
    given its share of t * b rows, rounded down or up. Within a batch, the rows of each stream are spread evenly: row j
    of c lies at (j + 1/2) / c of the batch. Of two rows at the same point, that of the earlier stream comes first.

    The mixture ends before the first row that its stream no longer has, or after `limit` rows.

    Args:
        shares: of each stream, relative to their sum.
        n_rows: rows of each stream.
        batch_tokens: rows of a batch.
        limit: rows after which the mixture ends; None for no such limit.

    Attributes:
        n_stream_rows: rows of the mixture.
        n_steps: batches of the mixture.

    Raises:
        ValueError: the smallest share is worth less than a row of a batch.
    """

    def __init__(
        self, shares: Sequence[Fraction], n_rows: Sequence[int], *, batch_tokens: int, limit: int | None = None
    ):
        if min(shares) * batch_tokens < sum(shares):  # otherwise the count of a stream in a batch could be negative
            raise ValueError(
                f"MixtureOrder: the smallest of the shares must be worth a row of a batch of {batch_tokens}; "
                f"got {[float(share) for share in shares]}"
            )
        self.batch_tokens = batch_tokens
        self._cumulative = [Fraction(part, sum(shares)) for part in itertools.accumulate(shares)]
        self._counts = n_rows
        whole = bisect.bisect_left(range(sum(n_rows) // batch_tokens + 1), True, key=lambda t: self._lacks(t + 1))
        n_left = np.array(n_rows) - self.given(whole)
        owner = self.owners(whole)
        missing = np.concatenate([np.flatnonzero(owner == i)[n_left[i] :] for i in range(len(shares))])
        self.n_stream_rows = whole * batch_tokens + int(missing.min())
        if limit is not None:
            self.n_stream_rows = min(limit, self.n_stream_rows)
        self.n_steps = -(-self.n_stream_rows // batch_tokens)

    def given(self, step: int) -> Int64[np.ndarray, " stream"]:
        """How many rows each stream has given when batch `step` begins."""
        ends = [math.floor(share * step * self.batch_tokens) for share in self._cumulative]
        return np.diff(np.array([0, *ends]))

    def owners(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The number of the stream that gives each row of a whole batch. A stream gives its rows in its own order."""
        counts = self.given(step + 1) - self.given(step)
        points = np.concatenate([(np.arange(count) + 0.5) / count for count in counts.tolist()])
        return np.repeat(np.arange(len(counts)), counts)[np.argsort(points, kind="stable")]

    def totals(self) -> Int64[np.ndarray, " stream"]:
        """How many rows each stream gives in all."""
        step, rest = divmod(self.n_stream_rows, self.batch_tokens)
        return self.given(step) + np.bincount(self.owners(step)[:rest], minlength=len(self._counts))

    def _lacks(self, step: int) -> bool:
        return bool((self.given(step) > self._counts).any())
