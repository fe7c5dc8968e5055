"""Expressions and latents are counted against each other as a person would, on a text of a few tokens."""

import numpy as np
import pytest
import torch
from support.planted import make_sae

from benchmarks.named_features import (
    Text,
    agreements,
    best_latent,
    matches_per_thousand,
    numbered_matches,
    with_random_row,
)

STRINGS = [["the ", "ca", "t", " sat"], ["a", " cat", "s ca", "t"]]  # tokens 0 to 3 and 4 to 7


def fires(*pairs: tuple[int, int]) -> Text:
    """On each (token, latent)."""
    token, latent = np.array(pairs).T
    return Text(strings=STRINGS, token=token, latent=latent)


def test_every_token_of_a_match_is_of_it_and_no_match_leaves_its_sequence():
    numbers, n_matches = numbered_matches(STRINGS, "cat")
    assert (numbers.tolist(), n_matches) == ([-1, 0, 0, -1, -1, 1, 2, 2], 3)
    assert numbered_matches(STRINGS, "sata")[1] == 0
    assert numbered_matches(STRINGS, "dog")[0].tolist() == [-1] * 8


def test_precision_is_of_tokens_and_recall_of_matches():
    text = fires((0, 0), (1, 0), (2, 0), (6, 0), (3, 1), (5, 2))
    both, never, once, silent = agreements(text, "cat", 4)
    assert (both.precision, both.recall, both.n_fired, both.n_matches) == (3 / 4, 2 / 3, 4, 3)
    assert both.f1 == pytest.approx(2 * (3 / 4) * (2 / 3) / (3 / 4 + 2 / 3))
    assert (never.precision, never.recall, never.f1) == (0, 0, 0)
    assert (once.precision, once.recall) == (1, 1 / 3)
    assert (silent.n_fired, silent.precision) == (0, 0)
    assert both.base_rate == 5 / 8
    assert best_latent(text, "cat", 4) == 0
    assert [each.precision for each in agreements(text, "dog", 4)] == [0] * 4


def test_matches_are_counted_by_the_character():
    assert matches_per_thousand(["a cat", "cats cat "], "cat") == 3000 / 14


def test_a_random_row_is_as_long_and_the_others_stay():
    sae = make_sae()
    other = with_random_row(sae, 3, seed=0)
    kept = [latent for latent in range(sae.d_sae) if latent != 3]
    assert torch.equal(other.W_dec[kept], sae.W_dec[kept])
    torch.testing.assert_close(other.W_dec[3].norm(), sae.W_dec[3].norm())
    assert not torch.equal(other.W_dec[3], with_random_row(sae, 3, seed=1).W_dec[3])
