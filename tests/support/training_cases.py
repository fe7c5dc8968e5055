"""What the tests of training share: rows, states and steps."""

from __future__ import annotations

import torch
from torch import Tensor

from support.sae_cases import targets
from support.tiny_saes import TRANSCODERS, make_config
from trainer.kernels.active import Workspace
from trainer.training.step import StepOutcome, TrainState, initial_state, train_step


def assert_same_state(one: TrainState, other: TrainState) -> None:
    assert (one.config, one.step, one.n_tokens) == (other.config, other.step, other.n_tokens)
    assert torch.equal(one.tokens_since_fired, other.tokens_since_fired)
    assert list(one.weights) == list(other.weights)
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
        mine, others = one.optimizer.state[weight], other.optimizer.state[other.weights[name]]
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert one.average.keys() == other.average.keys()
    assert all(torch.equal(one.average[name], other.average[name]) for name in one.average)


def rows(batch: int, d_in: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed))


def new_state(architecture: str, **changes: object) -> TrainState:
    config = make_config(architecture, **changes)
    state = initial_state(config, torch.full((config.d_out,), 0.1))
    if architecture in TRANSCODERS:  # whose decoder begins at 0, where most gradients are 0 too
        with torch.no_grad():
            state.weights["W_dec"].copy_(rows(48, config.d_out, seed=2) / 4)
    return state


def step(state: TrainState, x: Tensor) -> StepOutcome:
    return train_step(state, x, Workspace(), y=targets(state.config, x))
