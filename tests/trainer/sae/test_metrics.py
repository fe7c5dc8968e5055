"""Every metric against its definition over the whole split at once, in plain float64 Python or numpy."""

import math
from functools import reduce

import pytest
import torch
from support.metric_definitions import definitions

from trainer.sae.metrics import ReconstructionSums, ce_loss_score, explained_variance, kl_div_score

# A float64 sum of n terms is off by at most n * 2^-53 of the sum of their magnitudes; the largest sum here has
# 300 rows * 24 entries, and the variance, a difference of two such sums, is larger than 1e-3 of either.
ROUNDING = 300 * 24 * 2.0**-53 * 1e3


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with a large mean and one massive channel, sparse feature_acts of both signs, and a shrunken noisy x_hat."""
    n, d_in, d_sae = 300, 24, 40
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator)
    x[:, 3] += 30.0
    feature_acts = torch.randn(n, d_sae, generator=generator) * (torch.rand(n, d_sae, generator=generator) < 0.1)
    feature_acts[:, -5:] = 0.0
    x_hat = 0.9 * x + 0.2 * torch.randn(n, d_in, generator=generator)
    return x, feature_acts, x_hat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 128, 300])
def test_a_split_in_batches_equals_the_definitions(batch, dtype):
    x, feature_acts, x_hat = (part.to(dtype) for part in rows())
    pieces = zip(x.split(batch), feature_acts.split(batch), x_hat.split(batch), strict=True)
    sums = reduce(ReconstructionSums.merge, [ReconstructionSums.of(*piece) for piece in pieces])
    for name, expected in definitions(x, feature_acts, x_hat).items():
        assert getattr(sums, name) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING), name
    density = (feature_acts != 0).double().mean(0)
    torch.testing.assert_close(sums.feature_density, density, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("n_rows", [0, 1, 7, 299])
def test_counting_few_rows_at_once_changes_nothing_but_the_order_of_sums(n_rows, monkeypatch):
    pieces = rows(seed=4)
    whole = ReconstructionSums.of(*pieces)
    monkeypatch.setattr("trainer.sae.metrics.COUNTED_AT_ONCE", n_rows * 40)
    sums = ReconstructionSums.of(*pieces)
    assert torch.equal(sums.fired, whole.fired)
    assert sums.absolute == pytest.approx(whole.absolute, rel=ROUNDING)


def test_explained_variance_of_one_batch_equals_that_of_the_sums():
    x, feature_acts, x_hat = rows(seed=1)
    sums = ReconstructionSums.of(x, feature_acts, x_hat)
    assert explained_variance(x, x_hat) == sums.explained_variance


def test_explained_variance_of_known_reconstructions():
    x, _, _ = rows(seed=2)
    assert explained_variance(x, x.clone()) == 1.0
    mean = x.double().mean(0).expand_as(x)
    assert explained_variance(x.double(), mean) == pytest.approx(0.0, abs=ROUNDING)
    assert explained_variance(x, torch.zeros_like(x)) < -1.0  # worse than the mean by the mean's own square


def test_explained_variance_survives_a_massive_mean():
    """Float32 sums of squares would lose the variance: it is 1e-8 of E||x||^2."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(3)).double() + 1e4
    x_hat = x + 0.1
    variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
    rounding = 500 * 4 * 2.0**-53 * 1e8 * 4 / variance  # of the sums, relative to the small difference
    assert explained_variance(x, x_hat) == pytest.approx(1 - 4 * 0.1**2 / variance, abs=rounding)


def test_rows_without_variance():
    x = torch.full((5, 3), 7.0)
    assert explained_variance(x, x.clone()) == 1.0
    assert explained_variance(x, x + 1.0) == 0.0
    assert explained_variance(torch.zeros(2, 3), torch.zeros(2, 3)) == 1.0


def test_zero_rows_stay_finite():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    sums = ReconstructionSums.of(x, torch.zeros(2, 6), torch.zeros(2, 2))
    assert (sums.cossim, sums.l2_ratio, sums.l0, sums.l1, sums.dead_fraction) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert sums.relative_reconstruction_bias is None
    assert sums.mse == 12.5


def test_a_short_x_divides_by_one_as_saelens_does():
    x, x_hat = torch.tensor([[3e-5, 4e-5]]), torch.tensor([[3.0, 4.0]])
    assert ReconstructionSums.of(x, torch.ones(1, 1), x_hat).l2_ratio == 5.0


def test_no_rows_is_an_error_that_names_the_function():
    empty = torch.zeros(0, 4)
    with pytest.raises(ValueError, match=r"explained_variance: a mean needs at least 1 row, got shape \(0, 4\)"):
        explained_variance(empty, empty)
    with pytest.raises(ValueError, match="ReconstructionSums: a mean needs"):
        ReconstructionSums.of(empty, empty, empty)


def test_scores():
    assert ce_loss_score(ce_loss_without_sae=3.0, ce_loss_with_sae=3.5, ce_loss_with_ablation=5.0) == 0.75
    assert ce_loss_score(ce_loss_without_sae=3.0, ce_loss_with_sae=3.0, ce_loss_with_ablation=3.0) is None
    assert kl_div_score(kl_div_with_sae=0.5, kl_div_with_ablation=2.0) == 0.75
    assert kl_div_score(kl_div_with_sae=0.0, kl_div_with_ablation=0.0) is None
    assert math.isclose(kl_div_score(kl_div_with_sae=3.0, kl_div_with_ablation=2.0), -0.5)


def test_an_sae_is_worse_than_zeros_if_they_are_nearer() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 0.0]])
    acts = torch.ones(2, 3)
    for x_hat, expected in ((x * 0, False), (x * 2, False), (x * 2.01, True), (-x, True), (x * torch.inf, True)):
        assert ReconstructionSums.of(x, acts, x_hat).is_worse_than_zeros is expected
