"""What the tests of sweeps share: SAEs, batches and held-out rows of hooks that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from actcache.flow import Batch
from support.tiny_saes import TOPK_FAMILY, TRANSCODERS, make_config
from support.training_cases import rows
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.training.step import TrainState, initial_state
from trainer.training.sweep import SweepProgress

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
N_STEPS, BATCH, TOKENS = 12, 32, 11 * 32 + 1  # the last batch is one row
EVERY_2 = TrainConfig(batch_tokens=BATCH, log_every=2, checkpoint_every=5)


def batches(start: int = 0) -> Iterator[Batch]:
    """A stream in memory: 12 batches of two hooks, the last longer than what is left to train on."""
    for step in range(start, N_STEPS):
        x = {hook: rows(BATCH, seed=100 * i + step).bfloat16() for i, hook in enumerate(HOOKS)}
        yield Batch(x=x, row=torch.arange(BATCH), step=step)


def held_out(hook_names: Sequence[str]) -> Iterator[Batch]:
    """Rows in memory to evaluate on: two batches, the second shorter."""
    for step, size in enumerate((BATCH, 9)):
        x = {hook: rows(size, seed=900 + 10 * HOOKS.index(hook) + step).bfloat16() for hook in hook_names}
        yield Batch(x=x, row=torch.arange(size), step=step)


def a_config(architecture: str, **changes: object) -> SAEConfig:
    settings = {"n_steps": N_STEPS, "training_tokens": TOKENS, "dead_window": 100, "lr": 0.01}
    if architecture in TOPK_FAMILY:
        settings |= {"aux_coefficient": 0.1, "k_aux": 8}
    if architecture in TRANSCODERS:
        settings |= {"hook_name_out": HOOKS[0], "d_out": 16}
    if architecture == "crosscoder":
        settings |= {"hook_name": HOOKS[0], "hook_names": HOOKS, "hook_widths": (16, 16), "d_in": 32, "d_out": 32}
    return make_config(architecture, **settings | changes)


def new_states(configs: list[SAEConfig]) -> list[TrainState]:
    return [initial_state(config, torch.full((config.d_out,), 0.1)) for config in configs]


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Stop(Exception):
    """Stands for anything that ends a training between two steps."""


def stop_after(n_steps: int) -> Callable[[SweepProgress], None]:
    """A progress callback that ends a training after so many steps of this call."""
    steps = []

    def stop(progress: SweepProgress) -> None:
        steps.append(progress.step)
        if len(steps) == n_steps:
            raise Stop

    return stop
