"""The quality bench's interpolation, and that a cache and the model itself train the same SAE."""

import math

import pytest
from support.tiny_caches import write_texts

from actcache.bundled.documents import bundled_model_path
from actcache.models.load import load_model
from benchmarks.bench_quality import CASES, Quality, at_l0, cached_equals_live, run


def on_a_line(*l0):
    """Qualities on a straight line in log L0."""
    return [Quality(l0=each, explained_variance=0.3 + 0.1 * math.log(each)) for each in l0]


@pytest.mark.parametrize("l0", [8, 8.5, 15, 20, 39.9, 40])
def test_what_lies_on_a_line_stays_on_it(l0):
    (expected,) = on_a_line(l0)
    assert at_l0(on_a_line(20, 40, 8), l0) == pytest.approx(expected.explained_variance, rel=1e-14)  # a few roundings


def test_only_the_two_beside_it_count():
    far = Quality(l0=80, explained_variance=0.0)
    assert at_l0([*on_a_line(10, 40), far], 20) == at_l0(on_a_line(10, 40), 20)


@pytest.mark.parametrize("l0", [7.9, 40.1])
def test_nothing_is_extrapolated(l0):
    with pytest.raises(ValueError, match=r"l0 must be in \[8.00, 40.00\]"):
        at_l0(on_a_line(8, 20, 40), l0)


def test_a_cache_trains_what_the_model_trains(tmp_path):
    """Over more than one batch, whose last is short; special tokens are dropped from either."""
    documents = write_texts(tmp_path / "texts.jsonl", 400)
    model = load_model(bundled_model_path(), device="cpu")
    stepped = cached_equals_live(model, documents, tmp_path / "cache", n_tokens=8192)
    assert stepped["steps"] == 2
    assert 4096 < stepped["rows"] < 8192


@pytest.mark.long
def test_ours_explain_as_much_as_saelens():
    """Three seeds each, at SAELens' L0: on the mean, no more than 0.002 of the variance less."""
    pytest.importorskip("sae_lens")
    said: list[str] = []
    found = run(said.append)
    means = {case.architecture: found[case.architecture]["mean"] for case in CASES}
    assert set(means) == {"topk", "batchtopk", "standard", "jumprelu"}
    assert min(means.values()) >= -0.002, "\n".join(said)
