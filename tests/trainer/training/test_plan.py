"""What a sweep will take, against what a state holds, against sums by hand, and as passes that fit."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.surroundings import address_space
from support.sweep_cases import HOOKS, a_config
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, TRANSCODERS, make_config
from support.training_cases import new_state
from torch.profiler import ProfilerActivity, profile

from actcache.errors import ConfigError
from trainer.config.settings import SAEConfig
from trainer.kernels.active import Workspace
from trainer.training.plan import (
    LOADER_BYTES,
    flops_per_token,
    free_memory,
    measured_seconds,
    n_parameters,
    pass_bytes,
    plan_passes,
)
from trainer.training.step import initial_state, log_record, train_step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_those_of_a_state(architecture: str) -> None:
    state = new_state(architecture)
    assert n_parameters(state.config) == sum(weight.numel() for weight in state.weights.values())


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had lent at once, over those before: it tells of each by itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    del kept
    lent = most = 0
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    for event in profiled.profiler.kineto_results.events():
        lent += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, lent)
    return most


def train_three_steps(config: SAEConfig, batch: int, alive: int) -> object:
    """Three steps and their log. alive: latents from here on never fire, if there are any."""
    x = torch.randn(batch, config.d_in, generator=torch.Generator().manual_seed(0))
    y = torch.randn(batch, config.d_out) if config.architecture in TRANSCODERS else x
    state, workspace = initial_state(config, torch.zeros(config.d_out)), Workspace()
    if "b_enc" in state.weights:
        state.weights["b_enc"].detach()[alive:] = -100.0
    for _ in range(3):
        outcome = train_step(state, x, workspace, y=y)
        log_record(state, y, outcome)
    return state, workspace, outcome


AUX = {"aux_coefficient": 1 / 32, "k_aux": 32, "dead_window": 1}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "jumprelu, tanh": (
        "jumprelu",
        {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_tanh_scale": 4.0,
            "pre_act_loss_coefficient": 3e-6,
        },
    ),
    "jumprelu, quadratic": ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0}),
    **{f"{name}, AuxK": (name, AUX) for name in TOPK_FAMILY},
    **{f"{name}, bfloat16": (name, AUX | {"encoder_dtype": "bfloat16"}) for name in TOPK_FAMILY},
    **{
        f"topk, {name}": ("topk", {"optimizer": name, "momentum": 0.9 if name in ("muon", "signum") else None})
        for name in ("muon", "signum", "schedule_free")
    },
    "standard, schedule_free": ("standard", {"optimizer": "schedule_free", "ema_decay": 0.9, "max_grad_norm": 1.0}),
}
SHAPES = {  # batch, d_in, d_sae, k
    "a large batch": (1024, 16, 1024, 16),
    "large weights": (64, 512, 1024, 16),
    "many active": (1024, 16, 256, 64),
    "wide rows": (2048, 256, 256, 8),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_an_upper_bound_of_what_steps_take(variant: str, shape: tuple[int, int, int, int]) -> None:
    """With latents that are alive, and with many that are dead. Dense passes are planned closely."""
    (architecture, changes), (batch, d_in, d_sae, k) = VARIANTS[variant], shape
    sizes: dict[str, object] = {"d_in": d_in, "d_sae": d_sae, "k": k if architecture in TOPK_FAMILY else None}
    if architecture in TRANSCODERS:
        sizes["d_out"] = d_in
    if architecture == "matryoshka_batchtopk":
        sizes["matryoshka_widths"] = (d_sae // 8, d_sae // 2, d_sae)
    if architecture == "crosscoder":
        sizes["hook_widths"] = (d_in // 2, d_in // 2)
    config = make_config(architecture, **sizes, **changes)
    planned = pass_bytes([config], batch, loader_bytes=0)
    taken = [peak_bytes(lambda alive=alive: train_three_steps(config, batch, alive)) for alive in (d_sae, d_sae // 8)]
    assert max(taken) <= planned
    if architecture not in TOPK_FAMILY and batch * d_sae > 8 * (batch + d_sae) * d_in:
        assert planned <= 1.2 * max(taken)
    assert planned <= 2.3 * max(taken), "no more than twice and a little, where few of many parts come together"


def test_on_cuda_more_rows_are_ranked_at_once() -> None:
    config = make_config("topk", d_sae=1 << 15, d_in=16, k=4)
    assert pass_bytes([config], 8192, is_cuda=True) - pass_bytes([config], 8192) > (8192 - 512) * (1 << 15) * 4


def test_memory_is_what_the_limits_of_the_process_leave() -> None:
    with address_space(100 << 20):
        assert free_memory("cpu") < 100 << 20


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
    with pytest.raises(ConfigError, match=r"a-topk: training needs about 0\.67 GB, 0\.67 GB may be used; .* d_sae=48"):
        plan_passes([config], 64, pass_bytes([config], 64) - 1)


def test_time_is_of_all_steps_of_each_kind_and_memory_is_what_is_free() -> None:
    config = a_config("topk")
    assert measured_seconds([], 64, "cpu") == 0.0
    long = dataclasses.replace(config, n_steps=10**9)
    assert measured_seconds([long], 64, "cpu") > 10**9 * 1e-6, "no step is done in a microsecond"
    assert free_memory("cpu") > 0
