import numpy as np
import pytest

from actcache.order import EpochOrder, chunk_order, group_order, shard_permutation

GOLDEN = {
    "shard": [6, 7, 2, 3, 5, 4, 0, 1],
    "chunks": [4, 6, 1, 7, 0, 2, 3, 5],
    "rows": [1, 7, 0, 6, 4, 3, 2, 5],
}
KEPT = [10, 7, 0, 10, 9, 10, 1, 10, 10, 3, 0, 4]


def test_orders_are_frozen():
    """Old caches are scattered by these permutations, and resumed runs depend on them."""
    assert shard_permutation(8, seed=42, split="train", index=3).tolist() == GOLDEN["shard"]
    assert chunk_order(8, seed=42, epoch=1).tolist() == GOLDEN["chunks"]
    assert group_order(8, seed=42, epoch=1, group=2).tolist() == GOLDEN["rows"]


def served(order: EpochOrder) -> list[tuple[int, int]]:
    """(epoch, row number) in the order of the stream, by chunks of 10 rows."""
    found = []
    for step in range(order.n_steps):
        for part in order.slices(step):
            joined = np.concatenate([np.arange(c * 10, c * 10 + KEPT[c]) for c in order.chunks(part.epoch, part.group)])
            rows = joined[order.rows(part.epoch, part.group)][part.start : part.stop]
            found += [(part.epoch, row) for row in rows.tolist()]
    return found


@pytest.mark.parametrize("group_chunks", [1, 2, 5, 12, 64])
@pytest.mark.parametrize("batch_tokens", [1, 7, 16, 1000])
def test_every_kept_row_comes_once_an_epoch(batch_tokens, group_chunks):
    order = EpochOrder(KEPT, seed=1, epochs=3, batch_tokens=batch_tokens, group_chunks=group_chunks)
    stream = served(order)
    expected = sorted(c * 10 + r for c, n in enumerate(KEPT) for r in range(n))
    for epoch in range(3):
        part = stream[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(row for e, row in part if e == epoch) == expected
    assert stream[: len(expected)] != stream[len(expected) : 2 * len(expected)], "epochs differ"


def test_the_stream_does_not_depend_on_the_batch_size():
    streams = [served(EpochOrder(KEPT, seed=1, epochs=2, batch_tokens=b, group_chunks=4)) for b in (1, 13, 74)]
    assert streams[0] == streams[1] == streams[2]


def test_following_visits_every_group_that_has_rows():
    order = EpochOrder(KEPT, seed=5, epochs=2, batch_tokens=4, group_chunks=1)
    key, visited = (order.slices(0)[0].epoch, order.slices(0)[0].group), []
    while key is not None:
        visited.append(key)
        key = order.following(*key)
    needed = {(part.epoch, part.group) for step in range(order.n_steps) for part in order.slices(step)}
    assert visited == sorted(needed)


def test_steps_past_the_end_are_refused():
    order = EpochOrder(KEPT, seed=1, epochs=1, batch_tokens=10)
    with pytest.raises(IndexError, match="got 8"):
        order.slices(order.n_steps)


@pytest.mark.parametrize("bad", [{"batch_tokens": 0}, {"epochs": 0}, {"group_chunks": 0}])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EpochOrder(KEPT, **({"seed": 0, "epochs": 1, "batch_tokens": 1} | bad))


def test_bad_chunk_order_is_refused():
    with pytest.raises(ValueError, match="n_chunks=0"):
        chunk_order(0, seed=0, epoch=0)
