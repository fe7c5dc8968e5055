"""One step, its counters, its log line, and what training is for."""

import dataclasses
import math

import pytest
import torch
from support.reference import adam_reference, batch_topk_reference, loss_and_gradients_reference
from support.sae_cases import targets
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, TRANSCODERS, WEIGHS_NORMS, make_config
from support.training_cases import new_state, rows, step
from torch import Tensor

from actcache.errors import TrainingDiverged
from trainer.kernels.active import Workspace
from trainer.training.step import (
    calibrated_threshold,
    check_weights_are_finite,
    inference_weights,
    initial_state,
    log_record,
    train_step,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_step_is_adam_on_the_defined_gradients(architecture: str) -> None:
    unit = architecture not in WEIGHS_NORMS
    state = new_state(architecture, decoder_init_norm=1.0 if unit else 0.1, max_grad_norm=None if unit else 0.5)
    before = {name: weight.detach().double() for name, weight in state.weights.items()}
    _, gradients = loss_and_gradients_reference(
        state.config,
        before,
        rows(64).double(),
        y=targets(state.config, rows(64).double()),
        sparsity_coefficient=state.config.sparsity_coefficient or 0.0,
    )
    step(state, rows(64))
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
        step(state, rows(32, seed=seed))
    norms = state.weights["W_dec"].norm(dim=1)
    has_norm_1 = bool(((norms - 1).abs() < 1e-6).all())  # a float32 norm of 16 entries: 16 * 2^-24
    assert has_norm_1 == (architecture not in WEIGHS_NORMS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tails_of_one_row_stay_finite(architecture: str) -> None:
    state = new_state(architecture, aux_coefficient=1.0, k_aux=8, dead_window=1) if "topk" in architecture else None
    state = state or new_state(architecture)
    for batch in (32, 1, 1, 1):
        outcome = step(state, rows(batch, seed=batch))
        record = log_record(state, targets(state.config, rows(batch, seed=batch)), outcome)
        assert all(math.isfinite(value) for value in record.values())
    check_weights_are_finite(state)
    assert (state.step, state.n_tokens) == (4, 35)


def test_tokens_since_fired_counts_rows_and_dead_is_past_the_window() -> None:
    state = new_state("topk", k=1, dead_window=10)
    with torch.no_grad():
        state.weights["b_enc"][5] = 1e3
    for _ in range(2):
        step(state, rows(6))
    silent = torch.arange(48) != 5
    assert state.tokens_since_fired[5] == 0
    assert (state.tokens_since_fired[silent] == 12).all()
    assert torch.equal(state.dead, silent)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loss_that_is_not_finite_changes_nothing(architecture: str) -> None:
    state = new_state(architecture)
    step(state, rows(8))
    with torch.no_grad():
        state.weights["W_enc"][3, 2] = float("nan")
    before = {name: weight.detach().clone() for name, weight in state.weights.items()}
    with pytest.raises(TrainingDiverged, match=rf"a-{architecture}: .* at step 1; lower lr"):
        step(state, rows(8))
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
                step(state, rows(64, seed=seed))
            ends.append(state.weights)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("architecture", "terms"),
    [
        ("standard", {"losses/l1_loss"}),
        ("jumprelu", {"losses/l0_loss"}),
        ("gated", {"losses/l1_loss", "losses/auxiliary_reconstruction_loss"}),
        ("crosscoder", {"losses/l1_loss"}),
        *((name, {"losses/l1_loss"}) for name in TRANSCODERS),
        *((name, {"losses/auxiliary_reconstruction_loss"}) for name in TOPK_FAMILY),
    ],
)
def test_the_log_has_saelens_keys(architecture: str, terms: set[str]) -> None:
    state, x = new_state(architecture), rows(40)
    outcome = step(state, x)
    y = targets(state.config, x)
    record = log_record(state, y, outcome)
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
    assert record["losses/mse_loss"] == pytest.approx(float((y - outcome.x_hat).square().sum() / 40), rel=1e-5)
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


def test_a_strong_penalty_raises_small_thresholds_within_few_steps() -> None:
    """By about lr a step, from however far below; in log(theta) fifty steps of 0.001 would be a twentieth of it."""
    weak, strong = (new_state("jumprelu", sparsity_coefficient=c, n_steps=100) for c in (0.0, 10.0))
    for number in range(50):
        for state in (weak, strong):
            step(state, rows(64, seed=number))
    raised = strong.weights["threshold"] - weak.weights["threshold"]
    assert raised.mean() > 0.5 * 50 * 1e-3


def test_no_threshold_falls_below_zero() -> None:
    state = new_state("jumprelu", jumprelu_init_threshold=1e-4, sparsity_coefficient=0.0, lr=0.01)
    for number in range(5):
        step(state, rows(64, seed=number))
    assert state.weights["threshold"].min() == 0.0


_TOPK = {"k": 3, "lr": 0.01, "decoder_init_norm": 1.0, "aux_coefficient": 1 / 32, "k_aux": 8}
_L1 = {"lr": 0.01, "sparsity_coefficient": 0.3}
PLANTED = {
    **dict.fromkeys(TOPK_FAMILY, _TOPK),
    **dict.fromkeys(("standard", "crosscoder"), _L1),
    **dict.fromkeys(TRANSCODERS, _L1 | {"decoder_init_norm": 1.0}),
    "gated": _L1 | {"decoder_init_norm": 1.0},
    "jumprelu": {"lr": 0.01, "sparsity_coefficient": 0.02, "decoder_init_norm": 1.0},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_finds_a_planted_dictionary(architecture: str) -> None:
    """Rows are sums of 3 of 24 unit directions (what a transcoder is to predict: the same sums of 24 others).

    Explained variance must pass 0.9 with fewer than a third active, and the decoder must hold each planted direction:
    the mean of its largest cosines is to pass 0.9, where 48 random directions reach about 0.6. A skip_transcoder's need
    not: W_skip takes a part of each.
    """
    n_steps = 600 if architecture in TRANSCODERS else 300  # their decoder begins at 0
    generator = torch.Generator().manual_seed(0)
    config = make_config(architecture, n_steps=n_steps, **PLANTED[architecture])
    directions, outputs = (
        torch.nn.functional.normalize(torch.randn(24, width, generator=generator), dim=1)
        for width in (config.d_in, config.d_out)
    )
    outputs = outputs if architecture in TRANSCODERS else directions

    def planted(batch: int) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(batch, 24, generator=generator).topk(3, dim=1).indices
        strengths = 1 + torch.rand(batch, 3, generator=generator)
        return tuple((strengths[:, :, None] * each[chosen]).sum(1) for each in (directions, outputs))

    _, sample = planted(4096)
    total_variance = float((sample - sample.mean(0)).square().sum(1).mean())
    state = initial_state(dataclasses.replace(config, total_variance=total_variance), torch.zeros(config.d_out))
    workspace = Workspace()
    for _ in range(n_steps):
        x, y = planted(128)
        outcome = train_step(state, x, workspace, y=y)
    record = log_record(state, y, outcome)
    assert record["metrics/explained_variance"] > 0.9
    assert record["metrics/l0"] < 16
    found = torch.nn.functional.normalize(state.weights["W_dec"].detach(), dim=1)
    assert architecture == "skip_transcoder" or (outputs @ found.T).amax(1).mean() > 0.9


REVIVED = {
    "topk": {"aux_coefficient": 1 / 32, "k_aux": 24, "k": 3, "decoder_init_norm": 1.0},
    "batchtopk": {"aux_coefficient": 1 / 32, "k_aux": 24, "k": 3, "decoder_init_norm": 1.0},
    "jumprelu": {
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_tanh_scale": 4.0,
        "pre_act_loss_coefficient": 3e-2,
        "sparsity_coefficient": 0.1,
        "decoder_init_norm": 0.5,
    },
}


@pytest.mark.parametrize("architecture", REVIVED)
def test_dead_latents_come_back(architecture: str) -> None:
    """Half of the latents begin too weak to be among the k, or just below their threshold on every row: alone they
    stay silent.
    """
    x = rows(256)

    def dead_at_the_end(**changes: object) -> int:
        config = make_config(architecture, lr=0.01, dead_window=1024, **REVIVED[architecture] | changes)
        state = initial_state(config, torch.zeros(16))
        with torch.no_grad():
            if architecture == "jumprelu":
                state.weights["b_enc"][::2] = -0.05 - (x @ state.weights["W_enc"].T).amax(0)[::2]
            else:
                state.weights["W_enc"][::2] *= 0.01
        for _ in range(150):
            train_step(state, x, Workspace())
        return int(state.dead.sum())

    off = {"pre_act_loss_coefficient": 0.0} if architecture == "jumprelu" else {"aux_coefficient": 0.0}
    assert dead_at_the_end(**off) >= 24
    assert dead_at_the_end() <= 4


@pytest.mark.parametrize("optimizer", ["signum", "muon", "schedule_free"])
def test_every_optimizer_learns(optimizer: str) -> None:
    needs = {"signum": {"momentum": 0.9}, "muon": {"momentum": 0.95}}.get(optimizer, {})
    config = make_config("topk", optimizer=optimizer, lr=0.01, decoder_init_norm=1.0, **needs)
    state = initial_state(config, torch.zeros(16))
    losses = [train_step(state, rows(64, seed=seed % 3), Workspace()).loss.total.item() for seed in range(60)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_k_is_annealed() -> None:
    state = new_state("topk", k=2, k_anneal_start=10, k_anneal_steps=4)
    active = [int(step(state, rows(8, seed=seed)).n_active) / 8 for seed in range(6)]
    assert active[0] > 5
    assert active[4:] == [2.0, 2.0]


@pytest.mark.parametrize("changes", [{"ema_decay": 0.5}, {"optimizer": "schedule_free"}], ids=["ema", "schedule_free"])
def test_what_is_saved_is_the_average(changes: dict[str, object]) -> None:
    state = new_state("topk", decoder_init_norm=1.0, **changes)
    for seed in range(4):
        step(state, rows(32, seed=seed))
    saved = inference_weights(state)
    last = {name: weight.detach() for name, weight in state.weights.items()}
    assert all(not torch.equal(saved[name], last[name]) for name in last)
    torch.testing.assert_close(saved["W_dec"].norm(dim=1), torch.ones(48))
