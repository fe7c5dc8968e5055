"""Schedules, optimizers and the decoder's unit norm."""

import math

import pytest
import torch
from support.reference import FLOAT64, adam_reference
from support.tiny_saes import make_config
from torch import Tensor

from trainer.training.optimizer import (
    clip_gradients_,
    k_at,
    lr_at,
    new_optimizer,
    remove_parallel_gradient_,
    schedule_free_average,
    sparsity_coefficient_at,
    unit_norm_rows_,
    update_average_,
)


def test_lr_rises_stays_and_falls_linearly() -> None:
    config = make_config("topk", lr=1.0, n_steps=10, lr_warm_up_steps=2, lr_decay_steps=4)
    assert [lr_at(config, step) for step in range(10)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_cosine_warm_up_begins_at_a_tenth() -> None:
    config = make_config("topk", lr=1.0, n_steps=10, lr_warm_up_name="cosine", lr_warm_up_steps=4)
    expected = [1 - 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)] + [1.0] * 6
    assert [lr_at(config, step) for step in range(10)] == pytest.approx(expected, rel=1e-12)
    assert lr_at(config, 0) == pytest.approx(0.1, rel=1e-12)


def test_cosine_annealing_is_torchs() -> None:
    """torch's CosineAnnealingLR between a warm-up of 3 steps and a decay of 4."""
    config = make_config(
        "topk",
        lr=1.0,
        lr_end=0.2,
        lr_scheduler_name="cosineannealing",
        n_steps=17,
        lr_warm_up_steps=3,
        lr_decay_steps=4,
    )
    theirs = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=10, eta_min=0.2)
    for step in range(3, 13):
        assert lr_at(config, step) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        scheduler.step()
    assert [lr_at(config, step) for step in range(13, 17)] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert [lr_at(config, step) for step in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_k_falls_linearly() -> None:
    config = make_config("topk", k=8, k_anneal_start=48, k_anneal_steps=4)
    assert [k_at(config, step) for step in range(6)] == [48, 38, 28, 18, 8, 8]
    assert k_at(make_config("topk"), 0) == 5
    assert k_at(make_config("standard"), 0) is None


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
    optimizer = new_optimizer(make_config("topk", adam_beta1=beta1, adam_eps=eps, lr=0.01), {"W_dec": weight})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    expected = adam_reference(start, gradients, lr=0.01, beta1=beta1, beta2=0.999, eps=eps)
    torch.testing.assert_close(weight.detach(), expected, **FLOAT64)


def test_adamw_is_torchs() -> None:
    start, gradients = drawn(4)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    config = make_config("topk", optimizer="adamw", weight_decay=0.1, lr=0.01)
    stepped(ours, new_optimizer(config, {"W_dec": ours}), gradients)
    stepped(theirs, torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), fused=False), gradients)
    torch.testing.assert_close(ours.detach(), theirs.detach(), **FLOAT64)


def test_signum_is_the_papers() -> None:
    """m <- beta m + (1 - beta) g; w <- w - lr sign(m) (Bernstein et al. 2018, algorithm 2)."""
    start, gradients = drawn(4)
    weight, momentum, expected = start.clone().requires_grad_(), torch.zeros_like(start), start.clone()
    config = make_config("topk", optimizer="signum", momentum=0.9, lr=0.01)
    stepped(weight, new_optimizer(config, {"W_dec": weight}), gradients)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
        expected = expected - 0.01 * momentum.sign()
    torch.testing.assert_close(weight.detach(), expected, **FLOAT64)


def test_schedule_free_is_the_papers() -> None:
    """y = (1 - beta) z + beta x; z <- z - lr g / (sqrt(v) + eps); x <- the mean of the z (Defazio et al. 2024)."""
    start, gradients = drawn(5)
    weight = start.clone().requires_grad_()
    config = make_config("topk", optimizer="schedule_free", lr=0.01)
    ours = new_optimizer(config, {"W_dec": weight})
    stepped(weight, ours, gradients)
    x, z, v = start.clone(), start.clone(), torch.zeros_like(start)
    for t, gradient in enumerate(gradients, start=1):
        v = 0.999 * v + 0.001 * gradient**2
        z = z - 0.01 * gradient / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        x = x + (z - x) / t
    torch.testing.assert_close(weight.detach(), 0.1 * z + 0.9 * x, **FLOAT64)
    torch.testing.assert_close(schedule_free_average(config, weight, ours.state[weight]["z"]), x, **FLOAT64)


def test_muon_steps_matrices_along_orthogonal_directions_and_the_rest_by_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"W_dec": torch.zeros(12, 8).requires_grad_(), "b_enc": torch.zeros(12).requires_grad_()}
    ours = new_optimizer(make_config("topk", optimizer="muon", momentum=0.95, lr=0.01), weights)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    gradient = weights["b_enc"].grad.clone()
    ours.step()
    # five Newton-Schulz steps bring singular values to between 0.7 and 1.2, in bfloat16 (Jordan et al. 2024)
    singular = torch.linalg.svdvals(weights["W_dec"].detach())
    shape_factor = singular.mean() / 0.01  # max(1, rows / columns) ** 0.5 in some versions
    assert 0.6 < (singular / 0.01 / shape_factor).min() < (singular / 0.01 / shape_factor).max() < 1.4
    torch.testing.assert_close(weights["b_enc"].detach(), -0.01 * gradient.sign(), rtol=1e-5, atol=0)


def drawn(n_gradients: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(n_gradients + 1))
    return start, gradients


def stepped(weight: Tensor, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()


def test_the_average_begins_as_the_weights_and_follows_them() -> None:
    average: dict[str, Tensor] = {}
    for value in (1.0, 2.0, 4.0):
        update_average_(average, {"b_dec": torch.full((2,), value, requires_grad=True)}, 0.75)
    assert average["b_dec"].tolist() == [(1.0 * 0.75 + 2.0 * 0.25) * 0.75 + 4.0 * 0.25] * 2


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


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.zeros(5, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    theirs = [torch.zeros_like(weight, requires_grad=True) for weight in ours]
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn(mine.shape, generator=generator) * size
        other.grad = mine.grad.clone()
    clip_gradients_(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)
