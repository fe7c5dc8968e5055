"""The benchmarks' contenders do the same as ours: plain torch, our dense path, and SAELens itself."""

from dataclasses import replace

import pytest
import torch
from support.tiny_saes import make_config

from benchmarks.bench_train import (
    bag_decode,
    checked,
    dense_decode,
    fresh_state,
    our_dense_step,
    our_step,
    plain_step,
    started_at,
)
from benchmarks.peers import comparable, saelens_inference_sae, saelens_step, saelens_trainer
from trainer.kernels.active import Workspace
from trainer.training.optimizer import lr_at, sparsity_coefficient_at
from trainer.training.step import train_step

BATCH, STEPS = 256, 20


def config_of(architecture, **changes):
    """No latent dies; the decoder starts at the norm that it is held at."""
    unit_norm = {} if architecture == "standard" else {"decoder_init_norm": 1.0}
    settings = {"lr": 1e-4, "total_variance": 7.0, "dead_window": STEPS * BATCH, "max_grad_norm": 1.0}
    return comparable(make_config(architecture, **settings | unit_norm | changes))


def batches(n=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, 16, generator=generator) * 2 for _ in range(n)]


@pytest.mark.parametrize("decode", [dense_decode, bag_decode])
def test_the_plain_step_is_ours(decode):
    config = config_of("topk")
    checked({"ours": our_step(fresh_state(config)), "plain": plain_step(fresh_state(config), decode)}, batches())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, on SAELens' sparse tensors
@pytest.mark.parametrize("sparse", [False, True])
def test_saelens_topk_step_is_ours(sparse):
    state = fresh_state(config_of("topk"))
    trainer = saelens_trainer(state.config, state.weights, BATCH, sparse=sparse)
    errors = checked({"saelens": saelens_step(trainer), "ours": our_step(state)}, batches())
    assert errors["ours"] < 0.99 * our_step(fresh_state(state.config))(batches()[-1]), "nothing was learned"
    # a row of norm 1 is known to a few eps
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(48), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("architecture", "lr"), [("standard", 1e-4), ("jumprelu", 1e-6)])
def test_saelens_penalised_step_is_ours(architecture, lr):
    state = started_at(config_of(architecture, lr=lr, sparsity_coefficient=0.1), batches()[0], 0.1)
    trainer = saelens_trainer(state.config, state.weights, BATCH)
    checked({"saelens": saelens_step(trainer), "ours": our_step(state)}, batches())


def test_saelens_batchtopk_step_is_ours():
    state = fresh_state(config_of("batchtopk"))
    trainer = saelens_trainer(state.config, state.weights, BATCH)
    checked({"saelens": saelens_step(trainer), "ours": our_step(state)}, batches())


@pytest.mark.parametrize(("architecture", "name"), [("standard", "l1"), ("jumprelu", "l0")])
def test_saelens_schedules_are_ours(architecture, name):
    """A ramp is a product of at most 20 factors there, each rounded to 2^-53."""
    ramps = {"lr_warm_up_steps": 3, "lr_decay_steps": 4, "sparsity_warm_up_steps": 5}
    config = config_of(architecture, **ramps, n_steps=STEPS, training_tokens=STEPS * BATCH, sparsity_coefficient=0.1)
    trainer = saelens_trainer(config, fresh_state(config).weights, BATCH)
    step = saelens_step(trainer)
    for number, x in enumerate(batches()):
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(lr_at(config, number), rel=1e-14)
        coefficient = sparsity_coefficient_at(config, number)
        assert trainer.get_coefficients()[name] == pytest.approx(coefficient, rel=1e-14)
        step(x)


@pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "jumprelu"])
def test_saelens_inference_sae_takes_rows_that_are_not_scaled(architecture, tmp_path):
    """Against float64: sums of at most 48 + 6 roundings of 2^-24 in each of two products of numbers about 1."""
    config = config_of(architecture)
    trainer = saelens_trainer(config, fresh_state(config).weights, BATCH)
    for x in batches(3):
        saelens_step(trainer)(x)
    x, w = batches(1)[0].double(), {name: tensor.double() for name, tensor in trainer.sae.state_dict().items()}
    threshold = {"batchtopk": "topk_threshold", "jumprelu": "threshold"}.get(architecture)
    pre_acts = (x - w["b_dec"] if architecture == "batchtopk" else x) @ w["W_enc"] + w["b_enc"]
    feature_acts = pre_acts * (pre_acts > (w[threshold] if threshold else 0.0))
    x_hat = (feature_acts @ w["W_dec"] + w["b_dec"]) / config.input_scale
    with torch.no_grad():
        got = saelens_inference_sae(trainer, config, tmp_path)((x / config.input_scale).float())
    assert feature_acts.any()
    torch.testing.assert_close(got.double(), x_hat, rtol=0, atol=2 * 54 * 2**-24 * float(x_hat.abs().max()))


def test_other_maths_is_noticed():
    config = config_of("topk")
    state, other = fresh_state(config), fresh_state(replace(config, lr=30 * config.lr))
    with pytest.raises(AssertionError, match="other"):
        checked({"ours": our_step(state), "other": our_step(other)}, batches())
    less = fresh_state(replace(config, k=4))
    with pytest.raises(AssertionError, match="less"):
        checked({"ours": our_step(fresh_state(config)), "less": our_step(less)}, batches())


def test_both_call_the_same_latents_dead():
    state = fresh_state(config_of("topk", k=1, dead_window=1))
    trainer = saelens_trainer(state.config, state.weights, BATCH)
    for x in batches(3):
        our_step(state)(x[:8])  # fewer rows than it takes for all to fire
        saelens_step(trainer)(x[:8])
        assert state.dead.any()
        assert torch.equal(state.dead, trainer.dead_neurons)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("share", [0.03, 0.2])
def test_the_start_has_the_share_and_the_dense_path_is_ours(architecture, share, monkeypatch):
    x = torch.cat(batches(4))  # 1,024 rows: those that the share is set on
    states = [started_at(config_of(architecture), x, share) for _ in range(2)]
    checked({"ours": our_step(states[0]), "dense": our_dense_step(states[1])}, [x] * 3)
    state = started_at(config_of(architecture), x, share)
    n_active = int(train_step(state, x, Workspace()).n_active)
    # each latent's count is a whole number of rows, and rounding may move one over its cut
    assert abs(n_active / (len(x) * 48) - share) <= 2 / 1024
