"""Rows normalised one by one, and brought back."""

import pytest
import torch

from trainer.sae.normalisation import NORMALISATIONS, normalised


def rows():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double() * 3 + 1


def test_each_row_by_its_definition():
    for row in rows().tolist():
        x = torch.tensor([row], dtype=torch.float64)
        mean = sum(row) / 8
        std = (sum((value - mean) ** 2 for value in row) / 7) ** 0.5
        expected = [(value - mean) / (std + 1e-5) for value in row]
        assert normalised(x, "layer_norm").z[0].tolist() == pytest.approx(expected, rel=1e-12)
        norm = sum(value**2 for value in row) ** 0.5
        expected = [value * 8**0.5 / norm for value in row]
        assert normalised(x, "constant_norm_rescale").z[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_the_way_back(how):
    """layer_norm goes back by std alone, without the 1e-5 that it was divided by: as SAELens has it."""
    x = rows()
    given = normalised(x, how)
    lost = 1e-5 / x.std(dim=-1).min() if how == "layer_norm" else 0.0
    assert ((given.undone(given.z) - x).abs() <= (lost + 1e-14) * (x - x.mean(-1, keepdim=True)).abs() + 1e-14).all()


def test_a_row_of_zeros_stays_one():
    x = torch.zeros(2, 8)
    for how in NORMALISATIONS:
        given = normalised(x, how)
        assert torch.equal(given.z, x)
        assert torch.equal(given.undone(given.z), x)
