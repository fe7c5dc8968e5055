"""Mean, variance, norms and geometric median of a hook's stored values, in float64.

`Moments` are taken of chunks and merged into those of shards and splits; `HookStatistics` are made of the moments of a
split. Means and squared deviations merge by Chan, Golub and LeVeque (1983), "Algorithms for Computing the Sample
Variance".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from actcache.format.codecs import float32_values

ROW_FILTERS = ("all", "no_special_tokens")
BINS_PER_OCTAVE = 8
SMALLEST_OCTAVE, LARGEST_OCTAVE = -24, 40  # norms from 2^-24 to 2^40; the outer bins also count norms beyond
MEDIAN_STEP = 1e-3
N_BINS = (LARGEST_OCTAVE - SMALLEST_OCTAVE) * BINS_PER_OCTAVE
MOMENT_VALUES = 1 << 18  # values taken at once; their float64 squares take 2 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over some rows, which can be merged with those of other rows.

    squared_deviation: the sum of (x - mean)^2 over the rows, [d_in]. norm_sum, square_norm_sum: the sums of ||x|| and
    of ||x||^2. norm_histogram: how many norms fall into each bin of `norm_bin`.
    """

    n_rows: int
    mean: Float64[np.ndarray, " d_in"]
    squared_deviation: Float64[np.ndarray, " d_in"]
    norm_sum: float
    square_norm_sum: float
    norm_histogram: Int64[np.ndarray, " bins"]

    @staticmethod
    def empty(d_in: int) -> Moments:
        """The moments of no rows: the neutral element of `merge`."""
        zeros = np.zeros(d_in)
        histogram = np.zeros(N_BINS, dtype=np.int64)
        return Moments(
            n_rows=0, mean=zeros, squared_deviation=zeros, norm_sum=0.0, square_norm_sum=0.0, norm_histogram=histogram
        )

    @staticmethod
    def of(x: Float[np.ndarray, "row d_in"]) -> Moments:
        """The moments of these rows."""
        if len(x) == 0:
            return Moments.empty(x.shape[1])
        wide = x.astype(np.float64)
        square_norms = np.einsum("rd,rd->r", wide, wide)
        norms = np.sqrt(square_norms)
        mean = wide.mean(axis=0)
        wide -= mean
        return Moments(
            n_rows=len(x),
            mean=mean,
            squared_deviation=np.einsum("rd,rd->d", wide, wide),
            norm_sum=float(norms.sum()),
            square_norm_sum=float(square_norms.sum()),
            norm_histogram=np.bincount(norm_bin(norms), minlength=N_BINS).astype(np.int64),
        )

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        n_rows = self.n_rows + other.n_rows
        if n_rows == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            n_rows=n_rows,
            mean=self.mean + delta * (other.n_rows / n_rows),
            squared_deviation=self.squared_deviation
            + other.squared_deviation
            + delta**2 * (self.n_rows * other.n_rows / n_rows),
            norm_sum=self.norm_sum + other.norm_sum,
            square_norm_sum=self.square_norm_sum + other.square_norm_sum,
            norm_histogram=self.norm_histogram + other.norm_histogram,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The moments as named arrays, for a file; `from_arrays` is the inverse."""
        return {
            "n_rows": np.array([self.n_rows], dtype=np.int64),
            "mean": self.mean,
            "squared_deviation": self.squared_deviation,
            "norm_sums": np.array([self.norm_sum, self.square_norm_sum]),
            "norm_histogram": self.norm_histogram,
        }

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> Moments:
        """Read back what `to_arrays` gave. Raises KeyError for a missing array."""
        norm_sum, square_norm_sum = arrays["norm_sums"].tolist()
        return Moments(
            n_rows=int(arrays["n_rows"][0]),
            mean=arrays["mean"],
            squared_deviation=arrays["squared_deviation"],
            norm_sum=norm_sum,
            square_norm_sum=square_norm_sum,
            norm_histogram=arrays["norm_histogram"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HookStatistics:
    """The statistics of one hook, split and row filter, in float64, of the values as they are stored.

    variance: divided by n_rows. mean_norm: E||x||. mean_square_norm: E||x||^2. geometric_median: of about 8,192 rows
    from evenly spaced chunks. norm_histogram: how many norms fall into each bin of an eighth of an octave.
    """

    n_rows: int
    mean: Float64[np.ndarray, " d_in"]
    variance: Float64[np.ndarray, " d_in"]
    mean_norm: float
    mean_square_norm: float
    geometric_median: Float64[np.ndarray, " d_in"]
    norm_histogram: Int64[np.ndarray, " bins"]

    @staticmethod
    def of(moments: Moments, geometric_median: Float64[np.ndarray, " d_in"]) -> HookStatistics:
        """The statistics of a split from its moments. Everything is zero if there are no rows."""
        n_rows = max(moments.n_rows, 1)
        return HookStatistics(
            n_rows=moments.n_rows,
            mean=moments.mean,
            variance=moments.squared_deviation / n_rows,
            mean_norm=moments.norm_sum / n_rows,
            mean_square_norm=moments.square_norm_sum / n_rows,
            geometric_median=geometric_median,
            norm_histogram=moments.norm_histogram,
        )

    @property
    def total_variance(self) -> float:
        """E||x - E x||^2: the variance summed over d_in."""
        return float(self.variance.sum())

    def norm_quantile(self, q: float) -> float:
        """The q-quantile of ||x||: the geometric middle of its bin, so within 4.5 %, a sixteenth of an octave.

        Raises ValueError unless 0 <= q <= 1 and there are rows.
        """
        if not 0 <= q <= 1 or self.n_rows == 0:
            raise ValueError(f"norm_quantile: need 0 <= q <= 1 and rows, got q={q}, n_rows={self.n_rows}")
        rank = min(int(q * self.n_rows), self.n_rows - 1)
        index = int(np.searchsorted(np.cumsum(self.norm_histogram), rank, side="right"))
        return 2.0 ** ((index + 0.5) / BINS_PER_OCTAVE + SMALLEST_OCTAVE)

    def to_json(self) -> dict[str, object]:
        """The statistics as plain JSON values; floats keep every bit. `from_json` is the inverse."""
        return {
            "n_rows": self.n_rows,
            "mean": self.mean.tolist(),
            "variance": self.variance.tolist(),
            "mean_norm": self.mean_norm,
            "mean_square_norm": self.mean_square_norm,
            "geometric_median": self.geometric_median.tolist(),
            "norm_histogram": self.norm_histogram.tolist(),
        }

    @staticmethod
    def from_json(values: dict) -> HookStatistics:
        """Read back what `to_json` gave. Raises KeyError, TypeError or ValueError for malformed values."""
        counts = _numbers(values["norm_histogram"], int, N_BINS)
        if values["n_rows"] != sum(counts) or min(counts) < 0 or sum(counts) >= 1 << 63:
            raise ValueError(f"the norm histogram counts {sum(counts)} rows, n_rows is {values['n_rows']}")
        d_in = len(values["mean"])
        mean_norm, mean_square_norm = _numbers([values["mean_norm"], values["mean_square_norm"]], float, 2)
        return HookStatistics(
            n_rows=sum(counts),
            mean=np.array(_numbers(values["mean"], float, d_in)),
            variance=np.array(_numbers(values["variance"], float, d_in)),
            mean_norm=mean_norm,
            mean_square_norm=mean_square_norm,
            geometric_median=np.array(_numbers(values["geometric_median"], float, d_in)),
            norm_histogram=np.array(counts, dtype=np.int64),
        )


def norm_bin(norms: Float64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """Number of the histogram bin of each norm. A bin is an eighth of an octave wide; the bins span 2^-24 to 2^40."""
    with np.errstate(divide="ignore"):  # a zero norm goes to the first bin
        octaves = np.log2(norms)
    bins = np.floor((octaves - SMALLEST_OCTAVE) * BINS_PER_OCTAVE)
    return np.fmax(np.fmin(bins, N_BINS - 1), 0).astype(np.int64)  # fmin puts NaN into the last bin


def filtered_moments(x: Float32[np.ndarray, "row d_in"], special: Bool[np.ndarray, " row"]) -> dict[str, Moments]:
    """Row filter -> moments of the rows that pass it. special: which rows belong to special tokens."""
    plain = Moments.of(x[~special])
    return {"all": plain.merge(Moments.of(x[special])), "no_special_tokens": plain}


def geometric_median(
    x: Float32[np.ndarray, "row d_in"], *, start: Float64[np.ndarray, " d_in"] | None = None
) -> Float64[np.ndarray, " d_in"]:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration (Weiszfeld 1937).

    The iteration starts at `start`, or at the mean. It ends after a step of at most 1e-3 of the mean distance, or after
    100 steps; more precision is useless, because the median of 8,192 sampled rows itself errs by about a hundredth of
    that distance. Products are taken in float32. The result is zeros if there are no rows.
    """
    if len(x) == 0:
        return np.zeros(x.shape[1])
    mean = x.mean(axis=0, dtype=np.float64)
    centred = x - mean.astype(np.float32)  # so that the distances below do not cancel
    square_norms = np.einsum("rd,rd->r", centred, centred)
    point = np.zeros_like(mean) if start is None else start - mean
    for _ in range(100):
        towards = centred @ point.astype(np.float32)
        distance = np.sqrt(np.maximum(square_norms - 2 * towards + float(point @ point), 0))
        if not distance.any():
            break
        weight = 1 / np.maximum(distance, 1e-6 * distance.max())
        moved = (weight @ centred).astype(np.float64) / float(weight.sum(dtype=np.float64))
        step = float(np.linalg.norm(moved - point))
        point = moved
        if step <= MEDIAN_STEP * float(distance.mean()):
            break
    return mean + point


def chunk_moments(stored: Sequence[np.ndarray], dtype: str, special: Bool[np.ndarray, " row"]) -> dict[str, Moments]:
    """Row filter -> moments of a chunk. A few rows are taken at a time, so that they fit into the cache of a core.

    Args:
        stored: the stored elements of the chunk, one array for each array of the hook.
        dtype: the hook's logical dtype.
        special: which rows belong to special tokens.
    """
    n_rows, width = stored[0].shape
    moments = {row_filter: Moments.empty(width) for row_filter in ROW_FILTERS}
    step = max(1, MOMENT_VALUES // width)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        found = filtered_moments(float32_values([part[rows] for part in stored], dtype), special[rows])
        moments = {row_filter: moments[row_filter].merge(found[row_filter]) for row_filter in ROW_FILTERS}
    return moments


def _numbers(values: list, kind: type, n: int) -> list:
    """`values` if they are `n` finite numbers of that kind. Raises ValueError."""
    if len(values) != n or not all(type(value) is kind and -math.inf < value < math.inf for value in values):
        raise ValueError(f"need a list of {n} finite numbers of type {kind.__name__}")
    return values
