"""SAEConfig and TrainConfig: what they derive, what they refuse, and that JSON gives them back."""

import dataclasses
import json
import typing

import pytest
from support.config_cases import resolved
from support.tiny_saes import make_config

from actcache.errors import ConfigError
from trainer.config.settings import Architecture, SAEConfig, ScaledHook, TrainConfig, subtracts_b_dec


def test_configs_survive_json() -> None:
    config = resolved()
    assert SAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_training_tokens_are_what_the_epochs_serve() -> None:
    assert TrainConfig(epochs=3).training_tokens(100) == 300
    assert TrainConfig(epochs=3, tokens=250).training_tokens(100) == 250
    with pytest.raises(ConfigError, match=r"101 tokens asked, but 1 epoch\(s\) of this cache serve 100 .* epochs=2"):
        TrainConfig(tokens=101).training_tokens(100)


def test_which_architectures_subtract_b_dec() -> None:
    assert {name for name in typing.get_args(Architecture) if not subtracts_b_dec(name)} == {
        *("standard", "jumprelu", "transcoder", "skip_transcoder", "crosscoder")
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 49}, "a-topk: k must be at most d_sae=48, got k=49"),
        ({"k_anneal_start": 49, "k_anneal_steps": 1}, "k_anneal_start must be at most d_sae=48"),
        ({"matryoshka_widths": [4, 47]}, r"the last of matryoshka_widths must be d_sae=48, got \(4, 47\)"),
        ({"matryoshka_widths": [4, 4, 48]}, "matryoshka_widths must be an ascending list of widths"),
        ({"lr": float("inf")}, "lr must be above 0, got lr=inf"),
        ({"name": "a/b"}, "name must be a plain file name"),
    ],
    ids=str,
)
def test_a_config_that_breaks_a_rule_is_not_built(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_config("topk", **changes)


def test_the_hooks_of_a_config_carry_their_scales() -> None:
    transcoder, crosscoder = make_config("transcoder"), make_config("crosscoder")
    assert transcoder.inputs == (ScaledHook(hook_name=transcoder.hook_name, scale=transcoder.input_scale),)
    assert transcoder.outputs == (ScaledHook(hook_name=transcoder.hook_name_out, scale=transcoder.output_scale),)
    names_and_scales = zip(crosscoder.hook_names, crosscoder.hook_scales, strict=True)
    assert crosscoder.inputs == tuple(ScaledHook(hook_name=name, scale=scale) for name, scale in names_and_scales)
    assert crosscoder.outputs == crosscoder.inputs


def test_which_decoders_have_rows_of_norm_one() -> None:
    """All but those whose penalty weighs an activation by the norm of its decoder row."""
    held = {name for name in typing.get_args(Architecture) if make_config(name).has_unit_norm_decoder}
    assert held == {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated"}
    tanh = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 4.0}
    assert not make_config("jumprelu", **tanh).has_unit_norm_decoder


@pytest.mark.parametrize("setting", ["batch_tokens", "tokens", "epochs", "log_every", "keep_checkpoints", "eval_every"])
def test_what_a_sweep_shares_is_at_least_one(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"train: {setting} must be at least 1, got {setting}=0"):
        TrainConfig(**{setting: 0})


def test_the_statistics_are_of_the_rows_that_are_trained_on() -> None:
    assert TrainConfig().row_filter == "no_special_tokens"
    assert TrainConfig(exclude_special_tokens=False).row_filter == "all"
