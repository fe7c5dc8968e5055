"""A sweep that is logged, stopped and resumed: here, or in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.sweep_cases import BATCH, Stop, a_config, batches, held_out, stop_after
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.loggers import LoggedRun, open_loggers
from trainer.training.step import TrainState, initial_state
from trainer.training.sweep import sweep

SETTINGS = TrainConfig(batch_tokens=BATCH, log_every=2, checkpoint_every=4, eval_every=5)


CONFIGS = (a_config("topk", name="one"), a_config("standard", name="other"))


def a_state(config: SAEConfig, folder: Path) -> TrainState:
    import torch

    checkpoint = latest_checkpoint(folder / "checkpoint")
    return initial_state(config, torch.zeros(16)) if checkpoint is None else load_checkpoint(config, checkpoint)


def train_logged(runs: Path, logger: str | None, n_steps: int | None = None) -> None:
    """Train CONFIGS from their last checkpoint on; with n_steps, stop after so many of this call, before their line."""
    for config in CONFIGS:
        (runs / config.name).mkdir(parents=True, exist_ok=True)
    states = [a_state(config, runs / config.name) for config in CONFIGS]
    logged = [LoggedRun(config=each.config, folder=runs / each.config.name, step=each.step) for each in states]
    progress = None if n_steps is None else stop_after(n_steps)
    with open_loggers([logger] if logger else [], logged) as loggers:
        stream = batches(min(state.step for state in states))
        sweep(stream, states, SETTINGS, runs, validation=held_out, loggers=loggers, progress=progress)


def stopped_and_resumed(runs: Path, logger: str | None) -> Path:
    """A training that is stopped after step 7, three steps after its last checkpoint, and then goes on to the end."""
    with pytest.raises(Stop):
        train_logged(runs, logger, n_steps=7)
    if logger == "wandb":
        time.sleep(1)  # it names its folders by the second
    train_logged(runs, logger)
    return runs
