"""Schedules, Adam and the decoder's unit norm."""

import pytest
import torch
from reference import FLOAT64, adam_reference
from tiny_saes import make_config

from trainer.optimiser import adam, lr_at, remove_parallel_gradient_, sparsity_coefficient_at, unit_norm_rows_


def test_lr_rises_stays_and_falls_linearly() -> None:
    config = make_config("topk", lr=1.0, n_steps=10, lr_warm_up_steps=2, lr_decay_steps=4)
    assert [lr_at(config, step) for step in range(10)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_lr_without_a_schedule_is_constant() -> None:
    assert {lr_at(make_config("topk", n_steps=9), step) for step in range(9)} == {1e-3}


def test_sparsity_coefficient_warms_up() -> None:
    config = make_config("standard", sparsity_coefficient=8.0, sparsity_warm_up_steps=4)
    assert [sparsity_coefficient_at(config, step) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert sparsity_coefficient_at(make_config("topk"), 3) == 0.0


@pytest.mark.parametrize(("beta1", "eps"), [(0.9, 1e-8), (0.0, 6.25e-10)])
def test_adam_is_the_papers(beta1: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(5))
    weight = start.clone().requires_grad_()
    optimiser = adam(make_config("topk", adam_beta1=beta1, adam_eps=eps, lr=0.01), {"W_dec": weight})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
    expected = adam_reference(start, gradients, lr=0.01, beta1=beta1, beta2=0.999, eps=eps)
    torch.testing.assert_close(weight.detach(), expected, **FLOAT64)


def test_the_projected_gradient_is_orthogonal_and_else_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    unit_norm_rows_(W_dec)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(4, dtype=torch.float64), **FLOAT64)
    gradient = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    W_dec.requires_grad_().grad = gradient.clone()
    remove_parallel_gradient_(W_dec)
    torch.testing.assert_close((W_dec.grad * W_dec).sum(1).detach(), torch.zeros(4, dtype=torch.float64), **FLOAT64)
    removed = gradient - W_dec.grad
    torch.testing.assert_close(removed, (removed * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach(), **FLOAT64)


def test_a_zero_row_stays_finite() -> None:
    W_dec = torch.zeros(2, 3)
    unit_norm_rows_(W_dec)
    assert W_dec.tolist() == [[0.0] * 3] * 2
