from fractions import Fraction

import numpy as np
import pytest

from actcache.loading.order import EpochOrder, MixtureOrder, chunk_order, group_order

GOLDEN = {
    "chunks": [4, 6, 1, 7, 0, 2, 3, 5],
    "rows": [1, 7, 0, 6, 4, 3, 2, 5],
}
KEPT = [10, 7, 0, 10, 9, 10, 1, 10, 10, 3, 0, 4]


def test_orders_are_frozen():
    """Resumed runs depend on them."""
    assert chunk_order(8, seed=42, epoch=1).tolist() == GOLDEN["chunks"]
    assert group_order(8, seed=42, epoch=1, group=2).tolist() == GOLDEN["rows"]


def served(order: EpochOrder, batch_tokens: int) -> list[tuple[int, int]]:
    """(epoch, row number) in the order of the stream, read batch by batch; a chunk has 10 rows."""
    found = []
    for start in range(0, order.n_stream_rows, batch_tokens):
        for part in order.span(start, min(start + batch_tokens, order.n_stream_rows)):
            joined = np.concatenate([np.arange(c * 10, c * 10 + KEPT[c]) for c in order.chunks(part.epoch, part.group)])
            rows = joined[order.rows(part.epoch, part.group)][part.start : part.stop]
            found += [(part.epoch, row) for row in rows.tolist()]
    return found


@pytest.mark.parametrize("group_chunks", [1, 2, 5, 12, 64])
@pytest.mark.parametrize("batch_tokens", [1, 7, 16, 1000])
def test_every_kept_row_comes_once_an_epoch(batch_tokens, group_chunks):
    order = EpochOrder(KEPT, seed=1, epochs=3, batch_tokens=batch_tokens, group_chunks=group_chunks)
    stream = served(order, batch_tokens)
    expected = sorted(c * 10 + r for c, n in enumerate(KEPT) for r in range(n))
    for epoch in range(3):
        part = stream[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(row for e, row in part if e == epoch) == expected
    assert order.n_steps == -(-len(stream) // batch_tokens)
    assert stream[: len(expected)] != stream[len(expected) : 2 * len(expected)], "epochs differ"


def test_the_stream_does_not_depend_on_the_batch_size():
    streams = [served(EpochOrder(KEPT, seed=1, epochs=2, batch_tokens=b, group_chunks=4), b) for b in (1, 13, 74)]
    assert streams[0] == streams[1] == streams[2]


@pytest.mark.parametrize("limit", [0, 1, 15, 73, 74, 75, 147, 148, 1000])
def test_a_limit_cuts_the_stream_of_all_epochs(limit):
    whole = served(EpochOrder(KEPT, seed=1, epochs=2, batch_tokens=13, group_chunks=4), 13)
    order = EpochOrder(KEPT, seed=1, epochs=2, batch_tokens=13, group_chunks=4, limit=limit)
    assert served(order, 13) == whole[:limit]
    assert order.n_stream_rows == min(limit, len(whole))


@pytest.mark.parametrize("limit", [None, 1, 70, 74, 80])
def test_following_visits_every_group_that_has_rows(limit):
    order = EpochOrder(KEPT, seed=5, epochs=2, batch_tokens=4, group_chunks=1, limit=limit)
    parts = order.span(0, order.n_stream_rows)
    key, visited = (parts[0].epoch, parts[0].group), []
    while key is not None:
        visited.append(key)
        key = order.following(*key)
    assert visited == [(part.epoch, part.group) for part in parts]


@pytest.mark.parametrize("bad", [{"batch_tokens": 0}, {"epochs": 0}, {"group_chunks": 0}, {"limit": -1}])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EpochOrder(KEPT, **({"seed": 0, "epochs": 1, "batch_tokens": 1} | bad))


def test_bad_chunk_order_is_refused():
    with pytest.raises(ValueError, match="n_chunks=0"):
        chunk_order(0, seed=0, epoch=0)


SHARES = [[1, 1], [1, 2, 5], [0.3, 0.7], [0.1, 0.2, 0.3, 0.4], [7], [1, 15]]


@pytest.mark.parametrize("batch_tokens", [16, 61])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_a_mixture_gives_each_stream_its_share_in_every_batch(shares, batch_tokens):
    exact = [Fraction(share) for share in shares]
    order = MixtureOrder(exact, [10_000] * len(shares), batch_tokens=batch_tokens)
    given = np.zeros(len(shares), dtype=np.int64)
    for step in range(order.n_steps - 1):
        assert np.array_equal(order.given(step), given)
        owners = order.owners(step)
        given += np.bincount(owners, minlength=len(shares))
        assert given.sum() == (step + 1) * batch_tokens == len(owners) * (step + 1)
        for share, count in zip(exact, given.tolist(), strict=True):
            due = share / sum(exact) * (step + 1) * batch_tokens
            assert due - 1 < count < due + 1
        for half in (owners[: batch_tokens // 2], owners[batch_tokens // 2 :]):
            for share, count in zip(exact, np.bincount(half, minlength=len(shares)).tolist(), strict=True):
                # a batch's count is off by less than 2, and its rows lie evenly: half of it is off by less than 1 more
                assert abs(count - share / sum(exact) * len(half)) < 3


@pytest.mark.parametrize("n_rows", [[100, 333, 77], [0, 5, 5], [1, 1, 1], [50, 30, 2000], [16, 32, 8]])
def test_a_mixture_ends_before_the_first_row_that_its_stream_lacks(n_rows):
    order = MixtureOrder([Fraction(2), Fraction(4), Fraction(1)], n_rows, batch_tokens=16)
    line = np.concatenate([order.owners(step) for step in range(order.n_steps + 1)])
    served_rows, following = line[: order.n_stream_rows], line[order.n_stream_rows]
    counts = np.bincount(served_rows, minlength=3)
    assert (counts <= n_rows).all()
    assert counts[following] == n_rows[following], "one row more would be too many"
    assert order.n_steps == -(-order.n_stream_rows // 16)


def test_a_limit_cuts_a_mixture():
    limits = {limit: MixtureOrder([Fraction(1)] * 2, [40, 50], batch_tokens=8, limit=limit) for limit in (0, 9, 80, 99)}
    assert [order.n_stream_rows for order in limits.values()] == [0, 9, 80, 80]


def test_shares_of_less_than_a_row_are_refused():
    with pytest.raises(ValueError, match="batch of 8"):
        MixtureOrder([Fraction(1), Fraction(8)], [10, 10], batch_tokens=8)
    MixtureOrder([Fraction(1), Fraction(7)], [10, 10], batch_tokens=8)
