"""Held-out metrics while SAEs train, on some rows of the validation split, which are read once for all SAEs.

Each SAE is measured by its forward pass of training, without gradient. Nothing of its state changes.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from actcache.errors import DatasetError
from actcache.flow import HOLD_OUT_MORE, Batch
from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from trainer.config.settings import SAEConfig, ScaledHook, TrainConfig
from trainer.kernels.active import Workspace
from trainer.sae.architectures import forward
from trainer.sae.metrics import ReconstructionSums
from trainer.training.step import TrainState, scaled_rows

logger = logging.getLogger("actcache")

GROUP_CHUNKS = 4  # chunks in a group: few rows are read, so the loader's usual groups would cost memory for nothing


def validation_batches(
    cache: Cache, train_config: TrainConfig, device: torch.device | str, hook_names: Sequence[str]
) -> Iterator[Batch]:
    """The first `eval_tokens` rows of the validation split, in the loader's order of seed 0: the same at every call.

    Special tokens are left out if they are in training. Batches are as long as in training, because k of a BatchTopK
    SAE is a mean over a batch.
    """
    with _loader(cache, train_config, device, hook_names) as loader:
        yield from loader


def check_validation(cache: Cache, train_config: TrainConfig) -> None:
    """Raise DatasetError if the validation split has no row to evaluate on."""
    if cache.n_rows("validation") > 0:
        with _loader(cache, train_config, "cpu", cache.hook_names[:1]) as loader:
            if loader.n_rows > 0:
                return
    raise DatasetError(
        f"train: eval_every={train_config.eval_every} needs held-out rows, the validation split of {cache.path} holds "
        f"none that is not special (holdout {cache.identity['holdout']}); {HOLD_OUT_MORE}; or leave eval_every out"
    )


def warn_of_no_validation(cache: Cache) -> None:
    """Log a warning if the validation split is empty: what is trained can then be neither evaluated nor looked at."""
    if cache.n_rows("validation") == 0:
        logger.warning(
            "train: the validation split of %s is empty (holdout %s); eval and features will refuse these runs: %s",
            cache.path,
            cache.identity["holdout"],
            HOLD_OUT_MORE,
        )


def validation_metrics(
    states: Sequence[TrainState], batches: Iterable[Batch], workspace: Workspace
) -> list[dict[str, float]]:
    """The metrics of each SAE over all rows of `batches`. Their keys begin with "validation/".

    explained_variance, l0 and dead_fraction are those of `ReconstructionSums`. mse is in units of the raw activations.
    A crosscoder's hooks have a scale each, so its mse is in units of the scaled activations.

    Args:
        states: the SAEs.
        batches: held-out rows, with the hooks of all SAEs.
        workspace: holds the dense pre-activations of a batch.
    """
    sums = reconstruction_sums(states, batches, workspace)
    return [_metrics(state.config, each) for state, each in zip(states, sums, strict=True)]


def reconstruction_sums(
    states: Sequence[TrainState], batches: Iterable[Batch], workspace: Workspace
) -> list[ReconstructionSums]:
    """The sums of each SAE over all rows of `batches`, which are scaled as in training."""
    sums: list[ReconstructionSums] = []
    with torch.no_grad():
        for batch in batches:
            made: dict[tuple[ScaledHook, ...], Tensor] = {}
            parts = [_sums(state, batch, made, workspace) for state in states]
            sums = [old.merge(new) for old, new in zip(sums, parts, strict=True)] if sums else parts
    return sums


def _loader(cache: Cache, train_config: TrainConfig, device: torch.device | str, hook_names: Sequence[str]) -> Loader:
    return Loader(
        cache,
        hook_names,
        split="validation",
        batch_tokens=train_config.batch_tokens,
        limit=train_config.eval_tokens,
        exclude_special_tokens=train_config.exclude_special_tokens,
        group_chunks=GROUP_CHUNKS,
        device=device,
    )


def _sums(
    state: TrainState, batch: Batch, made: dict[tuple[ScaledHook, ...], Tensor], workspace: Workspace
) -> ReconstructionSums:
    x, y = (scaled_rows(batch, hooks, made) for hooks in (state.config.inputs, state.config.outputs))
    output = forward(state.config, state.weights, x, workspace)
    absolute = float(output.feature_acts.abs().sum(dtype=torch.float64))
    return ReconstructionSums.counted(y, output.x_hat, absolute=absolute, fired=output.firing_counts())


def _metrics(config: SAEConfig, sums: ReconstructionSums) -> dict[str, float]:
    return {
        "validation/explained_variance": sums.explained_variance,
        "validation/l0": sums.l0,
        "validation/mse": sums.mse / config.output_scale**2,
        "validation/dead_fraction": sums.dead_fraction,
    }
