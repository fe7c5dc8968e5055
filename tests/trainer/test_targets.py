"""The word beside a value, at and beside the border of each target."""

import math

import pytest

from trainer.targets import TARGETS, mark

BORDERS = [
    *(("l0", value, word) for value, word in ((49.9, "low"), (50, "good"), (200, "good"), (200.1, "high"))),
    *(("explained_variance", value, word) for value, word in ((-3.0, "low"), (0.899, "low"), (0.9, "good"))),
    *(
        ("ce_loss_score", value, word)
        for value, word in ((0.799, "low"), (0.8, "good"), (0.99, "good"), (1.01, "good"))
    ),
    *(("dead_fraction", value, word) for value, word in ((0.0, "good"), (0.05, "good"), (0.051, "high"))),
]


@pytest.mark.parametrize(("key", "value", "word"), BORDERS)
def test_a_value_is_low_good_or_high(key, value, word) -> None:
    assert mark(key, value) == word


def test_what_has_no_target_or_no_value_has_no_word() -> None:
    assert mark("mse", 1.0) is None
    for value in (None, "4", math.nan, math.inf, -math.inf):
        assert [mark(key, value) for key in TARGETS] == [None] * 4


def test_a_target_in_words() -> None:
    assert [TARGETS[key].words for key in ("l0", "ce_loss_score", "dead_fraction")] == [
        "50 to 200",
        ">= 0.8",
        "<= 0.05",
    ]
