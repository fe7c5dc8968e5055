"""One step, its counters, its log line, and what training is for."""

import math

import pytest
import torch
from reference import adam_reference, batch_topk_reference, loss_and_gradients_reference
from tiny_saes import ARCHITECTURES, TOPK_FAMILY, make_config
from torch import Tensor

from actcache.errors import TrainingDiverged
from trainer.kernels import Workspace
from trainer.train import (
    TrainState,
    calibrated_threshold,
    check_weights_are_finite,
    inference_weights,
    initial_state,
    log_record,
    train_step,
)


def rows(batch: int, d_in: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed))


def new_state(architecture: str, **changes: object) -> TrainState:
    return initial_state(make_config(architecture, **changes), torch.full((16,), 0.1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_step_is_adam_on_the_defined_gradients(architecture: str) -> None:
    unit = architecture != "standard"
    state = new_state(architecture, decoder_init_norm=1.0 if unit else 0.1, max_grad_norm=None if unit else 0.5)
    before = {name: weight.detach().double() for name, weight in state.weights.items()}
    _, gradients = loss_and_gradients_reference(
        state.config, before, rows(64).double(), sparsity_coefficient=state.config.sparsity_coefficient or 0.0
    )
    train_step(state, rows(64), Workspace())
    if unit:
        parallel = (gradients["W_dec"] * before["W_dec"]).sum(1, keepdim=True)
        gradients["W_dec"] = gradients["W_dec"] - parallel * before["W_dec"]
    else:
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm > 0.5, "the clip is tested"
        gradients = {name: gradient * 0.5 / norm for name, gradient in gradients.items()}
    for name, weight in state.weights.items():
        expected = adam_reference(before[name], [gradients[name]], lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
        expected = expected / expected.norm(dim=1, keepdim=True) if unit and name == "W_dec" else expected
        # Adam's first step is lr * g / (|g| + eps): float32 rounding of g matters only where |g| is of its own size,
        # and a gradient of a few hundred products of size 1 is off by less than 1e-4
        clear = gradients[name].abs() > 1e-3
        error = (weight.detach().double() - expected).abs()
        assert clear.any()
        assert (error[clear] <= 1e-3 * 0.1 + 1e-6).all(), name  # a tenth of a step, and the rounding of a weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_rows_keep_norm_1_where_the_architecture_says_so(architecture: str) -> None:
    state = new_state(architecture, decoder_init_norm=1.0, lr=0.01)
    for seed in range(3):
        train_step(state, rows(32, seed=seed), Workspace())
    norms = state.weights["W_dec"].norm(dim=1)
    has_norm_1 = bool(((norms - 1).abs() < 1e-6).all())  # a float32 norm of 16 entries: 16 * 2^-24
    assert has_norm_1 == (architecture != "standard")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tails_of_one_row_stay_finite(architecture: str) -> None:
    state = new_state(architecture, aux_coefficient=1.0, k_aux=8, dead_window=1) if "topk" in architecture else None
    state = state or new_state(architecture)
    for batch in (32, 1, 1, 1):
        outcome = train_step(state, rows(batch, seed=batch), Workspace())
        record = log_record(state, rows(batch, seed=batch), outcome)
        assert all(math.isfinite(value) for value in record.values())
    check_weights_are_finite(state)
    assert (state.step, state.n_tokens) == (4, 35)


def test_tokens_since_fired_counts_rows_and_dead_is_past_the_window() -> None:
    state = new_state("topk", k=1, dead_window=10)
    with torch.no_grad():
        state.weights["b_enc"][5] = 1e3
    for _ in range(2):
        train_step(state, rows(6), Workspace())
    silent = torch.arange(48) != 5
    assert state.tokens_since_fired[5] == 0
    assert (state.tokens_since_fired[silent] == 12).all()
    assert torch.equal(state.dead, silent)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loss_that_is_not_finite_changes_nothing(architecture: str) -> None:
    state = new_state(architecture)
    train_step(state, rows(8), Workspace())
    with torch.no_grad():
        state.weights["W_enc"][3, 2] = float("nan")
    before = {name: weight.detach().clone() for name, weight in state.weights.items()}
    with pytest.raises(TrainingDiverged, match=rf"a-{architecture}: .* at step 1; lower lr"):
        train_step(state, rows(8), Workspace())
    torch.testing.assert_close(dict(state.weights), before, rtol=0, atol=0, equal_nan=True)
    assert (state.step, state.n_tokens) == (1, 8)
    with pytest.raises(TrainingDiverged, match="W_enc"):
        check_weights_are_finite(state)


def test_steps_repeat_bit_for_bit() -> None:
    for architecture in ARCHITECTURES:
        ends = []
        for _ in range(2):
            state = new_state(architecture)
            for seed in range(3):
                train_step(state, rows(64, seed=seed), Workspace())
            ends.append(state.weights)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("architecture", "terms"),
    [
        ("standard", {"losses/l1_loss"}),
        ("jumprelu", {"losses/l0_loss"}),
        ("gated", {"losses/l1_loss", "losses/auxiliary_reconstruction_loss"}),
        *((name, {"losses/auxiliary_reconstruction_loss"}) for name in TOPK_FAMILY),
    ],
)
def test_the_log_has_saelens_keys(architecture: str, terms: set[str]) -> None:
    state, x = new_state(architecture), rows(40)
    outcome = train_step(state, x, Workspace())
    record = log_record(state, x, outcome)
    assert set(record) == {
        "step",
        "n_tokens",
        "losses/overall_loss",
        "losses/mse_loss",
        *terms,
        "metrics/explained_variance",
        "metrics/l0",
        "sparsity/dead_features",
        "details/current_learning_rate",
        "details/n_training_samples",
    }
    assert record["losses/mse_loss"] == pytest.approx(float((x - outcome.x_hat).square().sum() / 40), rel=1e-5)
    assert record["details/current_learning_rate"] == 1e-3
    if architecture in TOPK_FAMILY:
        assert record["metrics/l0"] == 5.0


def test_the_threshold_is_the_mean_of_the_smallest_kept() -> None:
    state = new_state("batchtopk", k=3)
    batches = [rows(9, seed=seed) for seed in range(4)]
    W = {name: weight.detach() for name, weight in state.weights.items()}
    smallest = []
    for x in batches:
        f = batch_topk_reference((x - W["b_dec"]) @ W["W_enc"].T + W["b_enc"], 3)
        smallest.append(f[f > 0].min())
    threshold = calibrated_threshold(state, batches, Workspace())
    # a float32 product of 16 terms of size below 10: 16 * 10 * 2^-24 < 1e-5
    torch.testing.assert_close(threshold.double(), torch.stack(smallest).mean(), rtol=0, atol=1e-5)


def test_the_threshold_without_activations_is_zero() -> None:
    state = new_state("batchtopk")
    with torch.no_grad():
        state.weights["b_enc"].fill_(-100.0)
    assert calibrated_threshold(state, [rows(4)], Workspace()).item() == 0.0


def test_inference_weights_are_those_of_the_architecture() -> None:
    for architecture in ("standard", "topk"):
        assert set(inference_weights(new_state(architecture))) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    thresholds = inference_weights(new_state("jumprelu"))["threshold"]
    torch.testing.assert_close(thresholds, torch.full((48,), 0.01))
    assert set(inference_weights(new_state("gated"))) == {"W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"}
    assert inference_weights(new_state("batchtopk"), torch.tensor(0.5))["threshold"].tolist() == [0.5] * 48


PLANTED = {
    "topk": {"k": 3, "lr": 0.01, "decoder_init_norm": 1.0, "aux_coefficient": 1 / 32, "k_aux": 8},
    "batchtopk": {"k": 3, "lr": 0.01, "decoder_init_norm": 1.0, "aux_coefficient": 1 / 32, "k_aux": 8},
    "abstopk": {"k": 3, "lr": 0.01, "decoder_init_norm": 1.0, "aux_coefficient": 1 / 32, "k_aux": 8},
    "matryoshka_batchtopk": {"k": 3, "lr": 0.01, "decoder_init_norm": 1.0, "aux_coefficient": 1 / 32, "k_aux": 8},
    "standard": {"lr": 0.01, "sparsity_coefficient": 0.3},
    "gated": {"lr": 0.01, "sparsity_coefficient": 0.3, "decoder_init_norm": 1.0},
    "jumprelu": {"lr": 0.01, "sparsity_coefficient": 0.02, "decoder_init_norm": 1.0},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_finds_a_planted_dictionary(architecture: str) -> None:
    """Rows are sums of 3 of 24 unit directions: explained variance must pass 0.9 with fewer than a third active."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)

    def planted(batch: int) -> Tensor:
        chosen = torch.rand(batch, 24, generator=generator).topk(3, dim=1).indices
        strengths = 1 + torch.rand(batch, 3, generator=generator)
        return (strengths[:, :, None] * directions[chosen]).sum(1)

    sample = planted(4096)
    total_variance = float((sample - sample.mean(0)).square().sum(1).mean())
    config = make_config(architecture, n_steps=300, total_variance=total_variance, **PLANTED[architecture])
    state, workspace = initial_state(config, torch.zeros(16)), Workspace()
    for _ in range(300):
        x = planted(128)
        outcome = train_step(state, x, workspace)
    record = log_record(state, x, outcome)
    assert record["metrics/explained_variance"] > 0.9
    assert record["metrics/l0"] < 16
