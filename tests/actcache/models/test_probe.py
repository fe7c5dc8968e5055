import math

import pytest
import torch

from actcache.models.probe import probe_differences, probe_rows, probe_tokens, rounding_bound


def test_the_tokens_are_fixed():
    """What is stored in caches depends on them."""
    assert probe_tokens(50257, 1024).tolist()[0][:8] == [7919, 15838, 23757, 31676, 39595, 47514, 5176, 13095]
    assert probe_tokens(512, 4).tolist() == [[239, 478, 205, 444]]
    assert probe_tokens(512, None).shape == (1, 16)


def test_rows_are_norms_and_values():
    x = torch.arange(16 * 64, dtype=torch.float32).reshape(16, 64) / 7
    rows = probe_rows(x)
    for position, row in zip((3, 7, 11, 15), rows, strict=True):
        expected = [float(x[position].double().norm()), *x[position][::4].tolist()]
        assert row == pytest.approx(expected, rel=1e-5)
    assert len(probe_rows(x[:5])) == 1, "a model of few positions has fewer rows"
    x[7, 3] = math.inf
    assert probe_rows(x)[1] is None


@pytest.mark.parametrize(("off", "is_other"), [(0.0, False), (0.9e-3, False), (1.1e-3, True), (math.inf, True)])
def test_values_differ_beyond_a_share_of_the_norm(off, is_other):
    there = {"stream": [[10.0, 1.0, 2.0]], "logits": None}
    here = {"stream": [[10.0, 1.0, 2.0 + 10 * off]], "logits": None}
    assert bool(probe_differences(there, here, 1e-3)) == is_other


@pytest.mark.parametrize(
    "here",
    [
        {"stream": [None], "logits": [[1.0, 1.0]]},
        {"stream": [[1.0, 1.0]], "logits": None},
        {"stream": [[1.0, 1.0, 1.0]], "logits": [[1.0, 1.0]]},
        {"stream": [], "logits": [[1.0, 1.0]]},
        {},
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_another_model(here):
    there = {"stream": [[1.0, 1.0]], "logits": [[1.0, 1.0]]}
    (words,) = probe_differences(there, here, 1e-3)
    assert words.startswith("it computes other values for the same tokens (inf of their norm apart, where rounding exp")


def test_the_bound_is_that_of_the_documentation():
    assert rounding_bound(torch.float32, 768, 12) == 8 * math.sqrt(24) * 2.0**-24 * (1 + math.sqrt(4 * 768))
