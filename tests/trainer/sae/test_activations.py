"""The sparsifying functions against their definitions."""

import pytest
import torch
from support.reference import jumprelu_gradients_reference

from trainer.sae.activations import heaviside, jumprelu, matching_pursuit, relu


def test_relu_is_max_with_zero() -> None:
    assert relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 2.0]


def test_jumprelu_is_the_identity_above_its_threshold() -> None:
    pre_acts = torch.tensor([[-1.0, 0.4, 0.5, 0.6]])
    assert jumprelu(pre_acts, torch.full((4,), 0.5), 0.1).tolist() == [[0.0, 0.0, 0.0, pre_acts[0, 3].item()]]
    assert heaviside(pre_acts, torch.full((4,), 0.5), 0.1).tolist() == [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("per_entry", [False, True], ids=["per_latent", "per_entry"])
def test_jumprelu_gradients_are_the_papers(per_entry: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    pre_acts, to_acts, to_fires = (torch.randn(9, 7, dtype=torch.float64, generator=generator) for _ in range(3))
    threshold = torch.rand(7, dtype=torch.float64, generator=generator)
    h, theta = pre_acts.clone().requires_grad_(), threshold.clone().requires_grad_()
    spread = theta.expand(9, 7).reshape(9, 7) if per_entry else theta
    (jumprelu(h, spread, 0.8) * to_acts + heaviside(h, spread, 0.8) * to_fires).sum().backward()
    to_h, to_theta = jumprelu_gradients_reference(pre_acts, threshold, 0.8, to_acts, to_fires)
    assert ((pre_acts < threshold) & ((pre_acts - threshold).abs() < 0.4)).any(), "the window below theta is tested"
    torch.testing.assert_close(h.grad, to_h)
    torch.testing.assert_close(theta.grad, to_theta)


def pursued(x: torch.Tensor, W_dec: torch.Tensor, smallest_rest: float, n_steps: int, until_old: bool) -> torch.Tensor:
    """Matching pursuit of one row, step by step."""
    rest, f = x.clone(), torch.zeros(len(W_dec), dtype=x.dtype)
    for _ in range(n_steps):
        products = W_dec @ rest
        best = int(products.argmax())
        if products[best] <= 0:
            break
        is_old = bool(f[best] != 0)
        f[best] += products[best]
        rest = rest - products[best] * W_dec[best]
        if (until_old and is_old) or rest.norm() < smallest_rest:
            break
    return f


@pytest.mark.parametrize("until_old", [True, False])
@pytest.mark.parametrize(("smallest_rest", "n_steps"), [(0.0, 12), (1.5, 12), (1e-2, 3)])
def test_matching_pursuit_equals_its_steps_row_by_row(smallest_rest: float, n_steps: int, until_old: bool) -> None:
    """In float64, where a step rounds by 2^-53 and 12 of them, of directions of norm 1, by little more."""
    generator = torch.Generator().manual_seed(0)
    x, W_dec = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (50, 20))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    got = matching_pursuit(
        x, W_dec, residual_threshold=smallest_rest, max_iterations=n_steps, stop_on_duplicate_support=until_old
    )
    expected = torch.stack([pursued(row, W_dec, smallest_rest, n_steps, until_old) for row in x])
    torch.testing.assert_close(got, expected, rtol=0, atol=12 * 8 * 2.0**-53 * float(x.norm(dim=1).max()))
    assert 0 < int((got != 0).sum(1).min()) < int((got != 0).sum(1).max())
