"""Held-out metrics while training: as defined, on validation rows only, and without a trace in the SAE."""

import logging
from pathlib import Path

import pytest
import torch
from support.metric_definitions import definitions
from support.naive_loader import activations, served_rows, token_fields
from support.sae_cases import definition, double_weights
from support.sweep_cases import HOOKS, a_config
from support.tiny_caches import harvest_tiny
from support.tiny_models import TEXT
from support.tiny_saes import ARCHITECTURES
from support.training_cases import rows

from actcache.errors import DatasetError
from actcache.flow import Batch
from trainer.config.settings import TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.kernels.active import Workspace
from trainer.training.step import TrainState, initial_state
from trainer.training.sweep import train
from trainer.training.validation import check_validation, validation_batches, validation_metrics

SIZES = (40, 40, 7)


def a_state(architecture: str, **changes: object) -> TrainState:
    """Every bias and threshold away from zero."""
    config = a_config(architecture, **changes)
    state = initial_state(config, torch.zeros(config.d_out))
    for name, weight in double_weights(state.config).items():
        state.weights[name].data.copy_(weight.detach())
    return state


def batches() -> list[Batch]:
    return [
        Batch(
            x={hook: rows(size, seed=10 * i + step) * 3 for i, hook in enumerate(HOOKS)},
            row=torch.arange(size),
            step=step,
        )
        for step, size in enumerate(SIZES)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics_equal_the_definitions_over_all_batches(architecture: str) -> None:
    """Two hooks and two scales in one call.

    x_hat is a float32 sum of 48 products of a size below 1, of latents that are sums of 16: off by less than
    48 * (16 + 48) * 2^-24 = 2e-4 in each of 16 channels, 8e-4 in norm, where errors and x have norms above 1.6: less
    than 1e-3 of either.
    """
    scaled = (
        {"hook_scales": (0.9, 0.9)} if architecture == "crosscoder" else {"input_scale": 2.0, "hook_name": HOOKS[0]}
    )
    states = [a_state(architecture, name="one"), a_state(architecture, name="other", **scaled)]
    measured = validation_metrics(states, batches(), Workspace())
    for state, metrics in zip(states, measured, strict=True):
        config = state.config
        W = {name: weight.detach().double() for name, weight in state.weights.items()}
        x, y = (
            [torch.cat([b.x[hook.hook_name].double() * hook.scale for hook in hooks], dim=1) for b in batches()]
            for hooks in (config.inputs, config.outputs)
        )
        acts, x_hat = zip(*(definition(config, W, part) for part in x), strict=True)
        raw = [torch.cat([*parts]) / config.output_scale for parts in (y, x_hat)]
        expected = definitions(raw[0], torch.cat(acts), raw[1])
        assert metrics == {
            "validation/explained_variance": pytest.approx(expected["explained_variance"], rel=2e-3, abs=2e-3),
            "validation/l0": expected["l0"],
            "validation/mse": pytest.approx(expected["mse"], rel=2e-3),
            "validation/dead_fraction": expected["dead_fraction"],
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_the_state_changes(architecture: str) -> None:
    state, same = a_state(architecture), a_state(architecture)
    validation_metrics([state], batches(), Workspace())
    for name, weight in state.weights.items():
        assert torch.equal(weight, same.weights[name])
        assert weight.grad is None
    assert (state.step, state.n_tokens, len(state.optimizer.state)) == (0, 0, 0)
    assert torch.equal(state.tokens_since_fired, same.tokens_since_fired)


@pytest.mark.parametrize("eval_tokens", [50, 10**6])
def test_the_rows_are_of_the_validation_split_and_the_same_each_time(eval_tokens: int, tiny_cache) -> None:
    config = TrainConfig(eval_every=1, eval_tokens=eval_tokens, batch_tokens=32, seed=7)
    once, again, alone = (
        list(validation_batches(tiny_cache, config, "cpu", hooks)) for hooks in (HOOKS, HOOKS, HOOKS[:1])
    )
    row = torch.cat([batch.row for batch in once])
    order, _ = served_rows(tiny_cache, HOOKS, split="validation", group_chunks=4)
    assert row.tolist() == order[:eval_tokens].tolist()
    assert len(row) == min(eval_tokens, len(order)) == len(set(row.tolist()))
    assert not set(token_fields(tiny_cache, "validation")["id"][row]) & set(tiny_cache.special_token_ids)
    assert {len(batch.row) for batch in once[:-1]} == {32}
    for hook in HOOKS:
        x = torch.cat([batch.x[hook] for batch in once])
        assert torch.equal(x, activations(tiny_cache, hook, "validation")[row])
        assert torch.equal(x, torch.cat([batch.x[hook] for batch in again]))
    assert torch.equal(row, torch.cat([batch.row for batch in alone]))


def test_special_tokens_stay_where_training_keeps_them(tiny_cache) -> None:
    config = TrainConfig(eval_every=1, eval_tokens=10**6, exclude_special_tokens=False)
    kept = sum(len(batch.row) for batch in validation_batches(tiny_cache, config, "cpu", HOOKS))
    assert kept == tiny_cache.n_rows("validation")


def test_an_empty_validation_split_says_what_to_do(tiny_model, tiny_texts: Path, tiny_cache, tmp_path: Path) -> None:
    check_validation(tiny_cache, TrainConfig(eval_every=5))
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", holdout=0.0, tokens=512)
    with pytest.raises(DatasetError, match=r"eval_every=5 needs held-out rows, .* \(holdout 0\.0\); harvest with a"):
        check_validation(cache, TrainConfig(eval_every=5))


def test_training_says_beforehand_that_nothing_can_be_evaluated(tiny_model, tiny_cache, tmp_path: Path, caplog) -> None:
    """One document, of which nothing is held out though a share was asked for."""
    texts = tmp_path / "one.txt"
    texts.write_text(TEXT)
    run = {"name": "a", "architecture": "topk", "k": 4, "hook_name": HOOKS[0], "d_sae": 48}
    sweep = SweepConfig.from_dict({"batch_tokens": 64, "tokens": 64, "runs": [run]})
    with caplog.at_level(logging.WARNING, "actcache"):
        train(tiny_cache, sweep, tmp_path / "held-out")
    assert caplog.text == ""
    cache = harvest_tiny(tiny_model, texts, tmp_path / "cache")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "actcache"):
        train(cache, sweep, tmp_path / "runs")
    for part in (str(cache.path), "validation split", "is empty (holdout 0.2)", "--holdout", "--sample-by line"):
        assert part in caplog.text
