import numpy as np
import pytest

from actcache.format.stats import (
    BINS_PER_OCTAVE,
    MEDIAN_STEP,
    HookStatistics,
    Moments,
    filtered_moments,
    geometric_median,
    norm_bin,
)

X = np.random.default_rng(0).normal(size=(1000, 12)).astype(np.float32) * np.geomspace(0.1, 300, 12, dtype=np.float32)
SPECIAL = np.arange(1000) % 16 == 0


def merged(sizes: list[int]) -> Moments:
    whole, start = Moments.empty(12), 0
    for size in sizes:
        whole = whole.merge(Moments.of(X[start : start + size]))
        start += size
    return whole


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [0, 250, 250, 500], [100] * 10], ids=str)
def test_merged_moments_equal_the_definition(sizes):
    statistics = HookStatistics.of(merged(sizes), np.zeros(12))
    wide = X.astype(np.float64)
    # float64 sums of 1,000 terms: relative error below 1,000 * 2^-53 of the summed magnitudes
    bound = 1000 * 2.0**-53
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=0, atol=bound * np.abs(wide).max())
    np.testing.assert_allclose(statistics.variance, wide.var(0), rtol=4 * bound)
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(wide, axis=1).mean(), rel=bound)
    assert statistics.mean_square_norm == pytest.approx((wide**2).sum(1).mean(), rel=bound)
    assert statistics.n_rows == statistics.norm_histogram.sum() == 1000


def test_filters_split_special_rows():
    found = filtered_moments(X, SPECIAL)
    assert found["all"].n_rows == 1000
    assert found["no_special_tokens"].n_rows == int((~SPECIAL).sum())
    np.testing.assert_allclose(found["no_special_tokens"].mean, X[~SPECIAL].astype(np.float64).mean(0), rtol=1e-12)


def test_arrays_and_json_keep_every_bit():
    moments = Moments.of(X)
    again = Moments.from_arrays(moments.to_arrays())
    statistics = HookStatistics.of(again, geometric_median(X))
    read = HookStatistics.from_json(statistics.to_json())
    np.testing.assert_array_equal(read.variance, HookStatistics.of(moments, np.zeros(12)).variance)
    np.testing.assert_array_equal(read.geometric_median, statistics.geometric_median)
    assert (read.mean_norm, read.mean_square_norm) == (statistics.mean_norm, statistics.mean_square_norm)


@pytest.mark.parametrize("q", [0.0, 0.5, 0.99, 1.0])
def test_norm_quantile_is_within_half_a_bin(q):
    norms = np.sort(np.linalg.norm(X.astype(np.float64), axis=1))
    exact = norms[min(int(q * 1000), 999)]
    ratio = HookStatistics.of(Moments.of(X), np.zeros(12)).norm_quantile(q) / exact
    assert abs(np.log2(ratio)) <= 0.5 / BINS_PER_OCTAVE + 1e-9


def test_zero_and_huge_norms_have_a_bin():
    assert norm_bin(np.array([0.0, 1e300])).tolist() == [0, 511]


def test_geometric_median_is_where_the_unit_vectors_cancel():
    x = np.vstack([X, np.full((3, 12), 1e5, dtype=np.float32)])  # outliers move the mean, hardly the median
    point = geometric_median(x)
    distance = np.linalg.norm(x - point, axis=1)
    gradient = ((x - point) / distance[:, None]).sum(
        0
    )  # of the summed distance; a step moves it by gradient / sum(1/d)
    assert np.linalg.norm(gradient) / (1 / distance).sum() <= MEDIAN_STEP * distance.mean()
    np.testing.assert_allclose(geometric_median(x, start=point), point, atol=2 * MEDIAN_STEP * distance.mean())
    assert geometric_median(np.zeros((0, 4), dtype=np.float32)).tolist() == [0, 0, 0, 0]
    assert geometric_median(np.ones((5, 2), dtype=np.float32)).tolist() == [1, 1]
