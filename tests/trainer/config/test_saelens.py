"""Configs of SAELens become sweeps that mean the same: compared with SAELens' own losses, schedules and weights."""

import math
from typing import Any

import pytest
import torch
from support.config_cases import HOOK, Hooks
from support.saelens_configs import flat_file, runner_config

from actcache.errors import ConfigError
from actcache.interop.saelens_config import read_saelens_config
from trainer.config.saelens import sweep_from_saelens, sweep_of
from trainer.config.settings import TOPK_FAMILY, SAEConfig, TrainConfig

D_IN, D_SAE = 12, 40
FLAT = {"hook_name": HOOK, "d_in": D_IN, "d_sae": D_SAE, "sae_lens_version": "5.11.0"}
COEFFICIENTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}


def resolved(cfg: Any, training_tokens: int = 40_960) -> SAEConfig:
    (config,) = sweep_from_saelens(cfg).expand(Hooks(d_in=D_IN), training_tokens)
    return config


def their_config(architecture: str, **changes: Any) -> Any:
    pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_training_class

    own: dict[str, Any] = {"k": 6} if architecture in TOPK_FAMILY else {}
    own |= {"matryoshka_widths": [10]} if architecture == "matryoshka_batchtopk" else {}
    return get_sae_training_class(architecture)[1](d_in=D_IN, d_sae=D_SAE, **(own | changes))


def test_the_flat_call_of_many_tutorials(tmp_path):
    sweep = sweep_from_saelens(flat_file(tmp_path))
    assert sweep.train == TrainConfig(
        batch_tokens=4096,
        seed=42,
        tokens=100_000_000,
        exclude_special_tokens=False,
        log_every=10,
        checkpoint_every=math.ceil(100_000_000 / 4096) // 6,
        keep_checkpoints=5,
        eval_every=1000,
        eval_tokens=10 * 32 * 128,
    )
    (run,) = sweep.runs
    said = {name: run[name] for name in ("architecture", "hook_name", "d_sae", "lr", "sparsity_coefficient")}
    assert said == {
        "architecture": "standard",
        "hook_name": "blocks.8.hook_resid_pre",
        "d_sae": 6144,
        "lr": 4e-4,
        "sparsity_coefficient": 8e-5,
    }
    assert (run["adam_beta1"], run["adam_beta2"], run["adam_eps"], run["max_grad_norm"]) == (0.0, 0.999, 1e-8, 1.0)
    assert (run["sparsity_warm_up_steps"], run["dead_window"]) == (1000, 1000 * 4096)
    assert (run["b_dec_init"], run["decoder_init_norm"], run["normalize_activations"]) == (
        "geometric_median",
        1.0,
        "none",
    )


@pytest.mark.parametrize(
    "architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk", "abstopk", "matryoshka_batchtopk"]
)
def test_the_settings_of_every_class_of_saelens_6(architecture):
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "seed": 7,
        "train_batch_size_tokens": 256,
    }
    settings |= {
        "training_tokens": 51_200,
        "dead_feature_window": 9,
        "exclude_special_tokens": True,
        "n_checkpoints": 3,
    }
    settings |= {"lr_warm_up_steps": 11, "lr_decay_steps": 13, "lr_scheduler_name": "cosineannealing"}
    theirs = runner_config(their_config(architecture, normalize_activations="expected_average_only_in"), **settings)
    sweep = sweep_from_saelens(theirs)
    train = sweep.train
    assert (train.batch_tokens, train.tokens, train.seed, train.exclude_special_tokens) == (256, 51_200, 7, True)
    assert (train.log_every, train.eval_every, train.checkpoint_every, train.keep_checkpoints) == (20, 140, 50, 3)
    config = resolved(theirs, 51_200)
    assert (config.architecture, config.d_sae, config.hook_name) == (architecture, theirs.sae.d_sae, theirs.hook_name)
    assert (config.lr, config.adam_beta1, config.adam_beta2, config.seed) == (1e-3, 0.5, 0.9, 7)
    assert (config.lr_warm_up_steps, config.lr_decay_steps, config.lr_end) == (11, 13, theirs.lr_end)
    assert (config.dead_window, config.normalize_activations) == (9 * 256, "expected_average_only_in")
    assert (config.optimizer, config.adam_eps, config.b_dec_init) == ("adam", 1e-8, "zeros")
    assert config.k == getattr(theirs.sae, "k", None)
    assert list(config.matryoshka_widths or []) == ([10, 40] if architecture == "matryoshka_batchtopk" else [])
    if architecture in COEFFICIENTS:
        assert config.sparsity_coefficient == getattr(theirs.sae, COEFFICIENTS[architecture])
    else:
        assert config.k_aux == D_IN // 2
    assert config.name == theirs.logger.run_name.replace(" ", "-")


MODES = [
    ("standard", {"l1_coefficient": 3.0}),
    ("gated", {"l1_coefficient": 2.0}),
    ("jumprelu", {"l0_coefficient": 0.5}),
    ("jumprelu", {"l0_coefficient": 0.5, "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 3.0}),
    ("jumprelu", {"l0_coefficient": 0.5, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 6.0}),
]


@pytest.mark.parametrize(("architecture", "settings"), MODES, ids=str)
def test_the_loss_is_saelens_own(architecture, settings):
    """On one row, on which the quadratic penalty of a row is that of the batch. Both sum over d_in in float32."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput
    from support.saelens_peers import fill_

    from trainer.kernels.active import Workspace
    from trainer.sae.architectures import forward
    from trainer.sae.losses import loss_terms

    cfg = their_config(architecture, **settings)
    theirs = get_sae_training_class(architecture)[0](cfg)
    fill_(theirs)
    config = resolved(runner_config(cfg))
    with torch.no_grad():
        theirs.b_dec.zero_()  # SAELens' encoder sees x - b_dec in all of these, ours in gated alone
        if config.has_unit_norm_decoder:
            theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
    x = torch.randn(1, D_IN, generator=torch.Generator().manual_seed(1))
    coefficients = {name: each.value for name, each in theirs.get_coefficients().items()}
    expected = theirs.training_forward_pass(TrainStepInput(x, coefficients, None, 0, False))

    weights = {name: value.detach() for name, value in theirs.named_parameters()} | {"W_enc": theirs.W_enc.detach().T}
    output = forward(config, weights, x, Workspace())
    coefficient = config.sparsity_coefficient or 0.0
    loss = loss_terms(config, weights, x, output, sparsity_coefficient=coefficient, dead=None, workspace=Workspace())
    torch.testing.assert_close(loss.total, expected.loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.reconstruction, expected.losses["mse_loss"].detach(), rtol=1e-5, atol=0)
    assert loss.sparsity > 0


def test_the_mean_over_d_in_before_1_5_is_the_same_loss_times_d_in():
    """per_item_mse_loss.mean() + l1 * feature_acts.norm(p=1).mean(): sae_lens/training/sparse_autoencoder.py, 1.4.0."""
    generator = torch.Generator().manual_seed(2)
    x, x_hat = (torch.randn(50, D_IN, generator=generator, dtype=torch.float64) for _ in range(2))
    l1 = torch.rand(50, D_SAE, generator=generator, dtype=torch.float64).sum(1).mean()
    old = {"hook_point": HOOK, "d_in": D_IN, "d_sae": D_SAE, "l1_coefficient": 8e-5, "sae_lens_version": "1.4.0"}
    config = resolved(old)
    assert config.sparsity_coefficient is not None
    theirs = (x_hat - x).square().mean() + 8e-5 * l1
    ours = (x_hat - x).square().sum(1).mean() + config.sparsity_coefficient * l1
    torch.testing.assert_close(ours, D_IN * theirs, rtol=1e-12, atol=0)
    assert config.max_grad_norm is None  # it was clipped since 1.5.0
    summed = resolved(old | {"sae_lens_version": "1.5.0"})
    assert (summed.sparsity_coefficient, summed.max_grad_norm) == (8e-5, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "must say its version of SAELens"),
        ({"sae_lens_version": "0.2.1"}, "SAELens 0.2.1 divides the squared error by the norm of each row"),
    ],
)
def test_a_loss_whose_sum_nobody_knows_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        sweep_from_saelens({"hook_point": HOOK, "d_in": D_IN, "d_sae": D_SAE} | fields)


@pytest.mark.parametrize("scheduler", ["constant", "cosineannealing"])
def test_the_schedules_are_saelens_own(scheduler):
    from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler

    from trainer.training.optimizer import lr_at, sparsity_coefficient_at

    schedule = {"lr_scheduler_name": scheduler, "lr": 2e-3, "lr_warm_up_steps": 10, "lr_decay_steps": 15}
    sae = their_config("standard", l1_coefficient=4.0, l1_warm_up_steps=20)
    theirs = runner_config(sae, train_batch_size_tokens=16, training_tokens=16 * 60, **schedule)
    config = resolved(theirs, 16 * 60)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=theirs.lr)
    their_lr = get_lr_scheduler(scheduler, optimizer, 60, theirs.lr, 10, 15, theirs.lr_end, 1)
    their_l1 = CoefficientScheduler(20, 4.0)
    for step in range(60):
        assert lr_at(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        their_lr.step()
        their_l1.step()  # which begins at 0: ours is one step ahead
        assert sparsity_coefficient_at(config, step) == pytest.approx(their_l1.value)


@pytest.mark.parametrize("norm", [0.1, 2.0, None])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_the_weights_begin_with_saelens_norms(architecture, norm):
    """Exactly where a norm is set, else as kaiming_uniform_ has it on average: 40 rows, so within a tenth."""
    from sae_lens.registry import get_sae_training_class

    from trainer.sae.architectures import initial_weights

    cfg = their_config(architecture, decoder_init_norm=norm)
    torch.manual_seed(0)
    theirs = get_sae_training_class(architecture)[0](cfg)
    ours = initial_weights(resolved(runner_config(cfg)), torch.zeros(D_IN))
    close = {"rtol": 1e-5, "atol": 0} if norm else {"rtol": 0.1, "atol": 0}
    encoders = theirs.W_enc.T.norm(dim=1).mean(), ours["W_enc"].norm(dim=1).mean()
    torch.testing.assert_close(*(each.detach() for each in encoders), **close)
    if architecture == "standard":
        decoders = theirs.W_dec.norm(dim=1).mean(), ours["W_dec"].norm(dim=1).mean()
        torch.testing.assert_close(*(each.detach() for each in decoders), **close)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_encoder_of_older_versions_begins_with_its_own_norm(transposed):
    """SAELens 3 to 5: kaiming_uniform_ of [d_in, d_sae], or the transpose of a decoder with rows of norm 1."""
    wide = {"d_in": 64, "d_sae": 256}
    config = resolved(FLAT | {"init_encoder_as_decoder_transpose": transposed} | wide)
    W_enc = torch.nn.init.kaiming_uniform_(torch.empty(64, 256), generator=torch.Generator().manual_seed(0))
    norm = 1.0 if transposed else W_enc.norm(dim=0).mean().item()
    assert config.decoder_init_norm == 1.0
    assert config.encoder_init_scale == pytest.approx(norm, rel=0.02)


def test_flat_configs_of_other_architectures():
    topk = resolved(FLAT | {"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}})
    assert (topk.architecture, topk.k, topk.k_aux) == ("topk", 5, D_IN // 2)
    by_function = {"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}, "sae_lens_version": "5.6.0"}
    former = resolved(FLAT | by_function)  # k_aux was half of d_sae until 5.6.0
    assert (former.architecture, former.k, former.k_aux) == ("topk", 5, D_SAE // 2)
    jumprelu = resolved(FLAT | {"architecture": "jumprelu", "l1_coefficient": 0.3, "l1_warm_up_steps": 4})
    assert (jumprelu.sparsity_coefficient, jumprelu.sparsity_warm_up_steps) == (0.3, 4)
    assert (jumprelu.jumprelu_init_threshold, jumprelu.jumprelu_bandwidth) == (0.001, 0.001)
    free = {"normalize_sae_decoder": False, "decoder_heuristic_init": True, "normalize_activations": True}
    free |= {"scale_sparsity_penalty_by_decoder_norm": True, "expansion_factor": 3, "d_sae": None}
    standard = resolved(FLAT | free)
    assert (standard.decoder_init_norm, standard.d_sae) == (0.1, 3 * D_IN)
    assert standard.normalize_activations == "expected_average_only_in"


def test_a_shorter_run_has_shorter_ramps():
    config = read_saelens_config(FLAT | {"training_tokens": 409_600, "l1_warm_up_steps": 50, "lr_decay_steps": 20})
    assert sweep_of(config).runs[0]["sparsity_warm_up_steps"] == 50
    (run,) = sweep_of(config, tokens=4_096, batch_tokens=128).runs
    assert (run["sparsity_warm_up_steps"], run["lr_decay_steps"]) == (16, 6)  # 32 of 100 steps
    (run,) = sweep_of(config, tokens=819_200).runs
    assert (run["sparsity_warm_up_steps"], run["lr_decay_steps"]) == (50, 20)
    (run,) = sweep_of(config, settings={"d_sae": 8, "sparsity_coefficient": 2.0}).runs
    assert (run["name"], run["d_sae"]) == ("standard-l2.0-d8", 8)


def test_what_is_different_is_one_warning(caplog):
    sweep_from_saelens(FLAT | {"use_ghost_grads": True, "decoder_orthogonal_init": True, "apply_b_dec_to_input": False})
    (record,) = caplog.records
    said = record.getMessage()
    assert "use_ghost_grads=True (dead latents get no ghost gradients" in said
    assert "decoder_orthogonal_init=True" in said
    assert "apply_b_dec_to_input" not in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens must be at least 1, got 0"),
        ({"d_in": "768", "d_sae": None}, "d_in must be a whole number, got '768'"),
        (
            {"decoder_heuristic_init_norm": 0.0, "decoder_heuristic_init": True, "normalize_sae_decoder": False},
            "decoder_init_norm",
        ),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"__class__": "CacheActivationsRunnerConfig"}, "must say which SAE is trained"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        sweep_from_saelens({**FLAT, **fields})
