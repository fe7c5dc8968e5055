"""What a sweep will take, against what a state holds, against sums by hand, and as passes that fit."""

import dataclasses

import pytest
from support.sweep_cases import HOOKS, a_config
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, make_config
from support.training_cases import new_state

from actcache.errors import ConfigError
from trainer.training.plan import (
    LOADER_BYTES,
    flops_per_token,
    free_memory,
    measured_seconds,
    n_parameters,
    pass_bytes,
    plan_passes,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_those_of_a_state(architecture: str) -> None:
    state = new_state(architecture)
    assert n_parameters(state.config) == sum(weight.numel() for weight in state.weights.values())


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_memory_is_at_least_what_a_state_and_its_batch_hold(architecture: str) -> None:
    """Weights, gradients and two moments; x; and pre-activations of the batch where all latents count."""
    config = make_config(architecture)
    held = 16 * n_parameters(config) + 4 * 1000 * config.d_in
    held += 0 if architecture in TOPK_FAMILY else 4 * 1000 * config.d_sae
    assert pass_bytes([config], 1000) - LOADER_BYTES >= held
    averaged = dataclasses.replace(config, ema_decay=0.9)
    assert pass_bytes([averaged], 1000) - pass_bytes([config], 1000) == 4 * n_parameters(config)


def test_saes_of_one_hook_share_the_reading_of_it() -> None:
    """A second one adds its state alone: it is stepped after the first, on the same batch."""
    one, other = a_config("topk", name="one"), a_config("topk", name="other", seed=1)
    state = 16 * n_parameters(one)
    assert pass_bytes([one, other], 64) == pass_bytes([one], 64) + state
    elsewhere = a_config("topk", name="elsewhere", hook_name=HOOKS[0])
    assert pass_bytes([one, elsewhere], 64) == pass_bytes([one], 64) + state + LOADER_BYTES + 4 * 64 * one.d_in


def test_flops_by_hand() -> None:
    """d_in 16, d_sae 48, k 5: encoder 2 * 16 * 48, then 2 + 6 products of 16 for each of the 5; or 10 * 16 * 48."""
    assert flops_per_token(make_config("topk", k=5)) == 2 * 16 * 48 + 8 * 16 * 5
    assert flops_per_token(make_config("standard")) == 10 * 16 * 48


def test_saes_go_into_passes_in_their_order() -> None:
    configs = [a_config("topk", name=f"sae-{i}") for i in range(5)]
    two = pass_bytes(configs[:2], 64)
    planned = plan_passes(configs, 64, two)
    assert [[config.name for config in each] for each in planned.passes] == [
        ["sae-0", "sae-1"],
        ["sae-2", "sae-3"],
        ["sae-4"],
    ]
    assert planned.configs == tuple(configs)
    assert planned.needed_bytes == planned.memory_bytes == two
    assert planned.n_parameters == 5 * n_parameters(configs[0])
    assert planned.flops == 5 * flops_per_token(configs[0]) * configs[0].training_tokens
    assert len(plan_passes(configs, 64, pass_bytes(configs, 64)).passes) == 1
    nothing = plan_passes([], 64, 1)
    assert (nothing.passes, nothing.needed_bytes, nothing.n_parameters, nothing.flops) == ((), 0, 0, 0.0)


def test_an_sae_that_does_not_fit_alone_is_named() -> None:
    config = a_config("topk")
    with pytest.raises(ConfigError, match=r"a-topk: training needs about 0\.7 GB, 0\.7 GB may be used; .* d_sae=48"):
        plan_passes([config], 64, pass_bytes([config], 64) - 1)


def test_time_is_of_all_steps_of_each_kind_and_memory_is_what_is_free() -> None:
    config = a_config("topk")
    assert measured_seconds([], 64, "cpu") == 0.0
    long = dataclasses.replace(config, n_steps=10**9)
    assert measured_seconds([long], 64, "cpu") > 10**9 * 1e-6, "no step is done in a microsecond"
    assert free_memory("cpu") > 0
