"""What each architecture is trained with when a run leaves a setting out."""

import dataclasses
import json
import math
import typing

import pytest
from support.config_cases import BASE, HOOK, Hooks, penalised, resolved

from actcache.errors import ConfigError
from trainer.config.presets import PRESETS, Facts, HookFacts, default_preset, preset_settings
from trainer.config.settings import Architecture, SAEConfig
from trainer.config.sweep import SweepConfig


def test_topk_defaults() -> None:
    config = resolved()
    assert config.lr == 2e-4 / math.sqrt(1024 / 2**14)
    assert (config.aux_coefficient, config.k_aux) == (1 / 32, 32)
    assert (config.adam_beta1, config.adam_beta2, config.adam_eps) == (0.9, 0.999, 6.25e-10)
    assert (config.decoder_init_norm, config.b_dec_init) == (1.0, "geometric_median")
    assert config.input_scale == math.sqrt(64) / 20
    assert config.total_variance == pytest.approx(500 * 64 / 400)
    assert (config.training_tokens, config.n_steps) == (4096 * 1000, 1000)
    assert (config.sparsity_coefficient, config.jumprelu_bandwidth) == (None, None)


def test_batchtopk_defaults() -> None:
    config = resolved(architecture="batchtopk")
    assert (config.lr, config.adam_beta1, config.adam_beta2, config.adam_eps) == (3e-4, 0.9, 0.99, 1e-8)
    assert (config.aux_coefficient, config.k_aux) == (1 / 32, 32)


def test_matryoshka_widths() -> None:
    config = resolved(architecture="matryoshka_batchtopk")
    assert config.matryoshka_widths == (32, 96, 224, 480, 1024)
    assert config.lr == resolved(architecture="batchtopk").lr
    assert resolved(architecture="matryoshka_batchtopk", d_sae=16).matryoshka_widths == (1, 3, 7, 16)
    assert resolved(architecture="matryoshka_batchtopk", matryoshka_widths=[10, 1024]).matryoshka_widths == (10, 1024)
    assert SAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for widths in ([], [0, 1024], [9, 9, 1024], [1024, 10], [10, 100]):
        with pytest.raises(ConfigError, match="matryoshka_widths"):
            resolved(architecture="matryoshka_batchtopk", matryoshka_widths=widths)
    with pytest.raises(ConfigError, match="must be int, got 'ten'"):
        resolved(architecture="matryoshka_batchtopk", matryoshka_widths=["ten", 1024])


def test_standard_defaults() -> None:
    config = penalised("standard")
    assert (config.sparsity_coefficient, config.lr, config.max_grad_norm) == (5.0, 5e-5, 1.0)
    assert (config.sparsity_warm_up_steps, config.lr_warm_up_steps, config.lr_decay_steps) == (50, 0, 200)
    assert (config.normalize_activations, config.b_dec_init) == ("expected_average_only_in", "zeros")
    assert (config.k, config.aux_coefficient, config.decoder_init_norm) == (None, 0.0, 0.1)


def test_jumprelu_defaults() -> None:
    config = penalised("jumprelu", sparsity_coefficient=1e-3)
    assert (config.jumprelu_bandwidth, config.jumprelu_init_threshold) == (0.001, 0.001)
    assert (config.normalize_activations, config.input_scale) == ("unit_mean_square", 1 / 25)
    assert (config.lr, config.adam_beta1, config.adam_beta2) == (7e-5, 0.0, 0.999)
    assert (config.lr_warm_up_steps, config.sparsity_warm_up_steps) == (100, 100)


def test_a_preset_gives_its_architecture_and_settings() -> None:
    assert penalised("jumprelu", sparsity_coefficient=1.0) == dataclasses.replace(
        without_architecture("gemma_scope", sparsity_coefficient=1.0), name="jumprelu-l1.0-d1024"
    )
    january = without_architecture("anthropic_january", sparsity_coefficient=10.0)
    assert (january.architecture, january.jumprelu_sparsity_loss_mode) == ("jumprelu", "tanh")
    assert (january.jumprelu_tanh_scale, january.pre_act_loss_coefficient) == (4.0, 3e-6)
    assert (january.decoder_init_norm, january.encoder_init_scale) == (None, 64 / 1024)
    assert (january.init_firing_rate, january.sparsity_warm_up_steps) == (0.5, 1000)
    signum = without_architecture("eleuther_topk", k=32)
    assert (signum.optimizer, signum.momentum, signum.lr) == ("signum", 0.95, 5e-3 / math.sqrt(1024 / 2**14))
    assert (signum.name, signum.aux_coefficient) == ("eleuther_topk-k32-d1024", 0.0)
    assert resolved(preset="openai_topk", architecture="abstopk").architecture == "abstopk"


def without_architecture(preset: str, **run: object) -> SAEConfig:
    base = {"preset": preset, "hook_name": HOOK, "d_sae": 1024}
    (config,) = SweepConfig.from_dict({"base": base | run}).expand(Hooks(), 4096 * 1000)
    return config


def test_every_architecture_has_a_preset_and_every_preset_resolves() -> None:
    assert {name for preset in PRESETS.values() for name in preset.architectures} == set(typing.get_args(Architecture))
    facts = Facts(inputs=(HOOK_FACTS,), outputs=(HOOK_FACTS,), training_tokens=10**6, n_steps=300)
    settable = {field.name for field in dataclasses.fields(SAEConfig)}
    for name, preset in PRESETS.items():
        settings = preset_settings(name, 1024, facts)
        assert set(settings) <= settable
        assert "lr" in settings
        assert default_preset(preset.architectures[0]) in PRESETS


HOOK_FACTS = HookFacts(d_in=64, mean_norm=20.0, mean_square_norm=625.0, total_variance=500.0)


@pytest.mark.parametrize(("d_in", "k_aux"), [(2, 1), (16, 8), (512, 256), (768, 512), (2304, 1024), (100_000, 1024)])
def test_k_aux_is_the_power_of_two_nearest_half_of_d_in(d_in: int, k_aux: int) -> None:
    (config,) = SweepConfig.from_dict({"base": BASE}).expand(Hooks(d_in=d_in), 4096)
    assert config.k_aux == k_aux


@pytest.mark.parametrize(("tokens", "window"), [(10**9, 10_000_000), (50_000, 5_000), (5, 1)])
def test_dead_window_is_a_tenth_of_training_up_to_ten_million(tokens: int, window: int) -> None:
    assert resolved(training_tokens=tokens).dead_window == window
