"""One SAE, one batch: `TrainState` and what a step does to it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actcache.errors import TrainingDiverged
from trainer.architectures import SAEOutput, forward, initial_weights
from trainer.config import SAEConfig
from trainer.functional import batch_topk_kept
from trainer.kernels import Workspace, encoder_pre_acts
from trainer.losses import LossTerms, loss_terms
from trainer.metrics import explained_variance
from trainer.optimiser import adam, lr_at, remove_parallel_gradient_, sparsity_coefficient_at, unit_norm_rows_

_PENALTY_KEY = {"standard": "losses/l1_loss", "gated": "losses/l1_loss", "jumprelu": "losses/l0_loss"}


@dataclass(slots=True, kw_only=True, eq=False)
class TrainState:
    """All that changes while an SAE trains, and so all that a checkpoint holds (with the config's hash).

    step: optimiser steps done. n_tokens: rows seen. tokens_since_fired: rows seen since each latent was last active.
    """

    config: SAEConfig
    weights: dict[str, Tensor]
    optimiser: torch.optim.Adam
    step: int
    n_tokens: int
    tokens_since_fired: Int[Tensor, " d_sae"]

    @property
    def dead(self) -> Tensor:
        """Bool [d_sae]: latents that have not fired in the last `dead_window` tokens."""
        return self.tokens_since_fired > self.config.dead_window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutcome:
    """What a step computed on its way, detached: for the log.

    n_active: active latents over the whole batch. lr: what this step used.
    """

    loss: LossTerms
    x_hat: Float[Tensor, "batch d_in"]
    n_active: Int[Tensor, ""]
    lr: float


def initial_state(config: SAEConfig, b_dec: Float[Tensor, " d_in"]) -> TrainState:
    """The state before the first step, on b_dec's device. b_dec: the initial decoder bias, in units of the scaled x."""
    weights = initial_weights(config, b_dec)
    return TrainState(
        config=config,
        weights=weights,
        optimiser=adam(config, weights),
        step=0,
        n_tokens=0,
        tokens_since_fired=torch.zeros(config.d_sae, dtype=torch.int64, device=b_dec.device),
    )


def train_step(state: TrainState, x: Float[Tensor, "batch d_in"], workspace: Workspace) -> StepOutcome:
    """One optimiser step on x, which is float32 and multiplied by the config's input_scale.

    Raises TrainingDiverged, and changes nothing, when the loss is not finite.
    """
    config = state.config
    output = forward(config, state.weights, x, workspace)
    loss = loss_terms(
        config,
        state.weights,
        x,
        output,
        sparsity_coefficient=sparsity_coefficient_at(config, state.step),
        dead=state.dead,
        workspace=workspace,
    )
    total = loss.total
    if not math.isfinite(total.item()):
        raise TrainingDiverged(
            f"{config.name}: the loss must stay finite, got {total.item()} at step {state.step}; lower lr={config.lr}"
        )
    total.backward()
    lr = lr_at(config, state.step)
    _update_weights(state, lr)
    n_active = _count(state, output, len(x))
    return StepOutcome(loss=loss.detach(), x_hat=output.x_hat.detach(), n_active=n_active, lr=lr)


def log_record(state: TrainState, x: Float[Tensor, "batch d_in"], outcome: StepOutcome) -> dict[str, float | int]:
    """One line of metrics.jsonl after a step on x, under SAELens' keys; all but lr describe this batch."""
    loss, architecture = outcome.loss, state.config.architecture
    terms = {_PENALTY_KEY[architecture]: loss.sparsity} if architecture in _PENALTY_KEY else {}
    if architecture not in ("standard", "jumprelu"):
        terms["losses/auxiliary_reconstruction_loss"] = loss.aux
    if state.config.pre_act_loss_coefficient is not None:
        terms["losses/pre_act_loss"] = loss.aux
    return {
        "step": state.step,
        "n_tokens": state.n_tokens,
        "losses/overall_loss": loss.total.item(),
        "losses/mse_loss": loss.mse.item(),
        **{key: term.item() for key, term in terms.items()},
        "metrics/explained_variance": explained_variance(x, outcome.x_hat),
        "metrics/l0": int(outcome.n_active) / len(x),
        "sparsity/dead_features": int(state.dead.sum()),
        "details/current_learning_rate": outcome.lr,
        "details/n_training_samples": state.n_tokens,
    }


def check_weights_are_finite(state: TrainState) -> None:
    """Raises TrainingDiverged naming the first weight that holds NaN or infinity."""
    for name, weight in state.weights.items():
        if not bool(weight.isfinite().all()):
            raise TrainingDiverged(
                f"{state.config.name}: weights must stay finite, got NaN or infinity in {name} after step "
                f"{state.step}; lower lr={state.config.lr}"
            )


def inference_weights(state: TrainState, threshold: Float[Tensor, ""] | None = None) -> dict[str, Tensor]:
    """The weights that `save_inference_sae` takes. threshold: of `calibrated_threshold`, for those that need one."""
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    if "log_threshold" in weights:
        threshold = weights.pop("log_threshold").exp()
    return weights if threshold is None else {**weights, "threshold": threshold.expand(state.config.d_sae)}


def calibrated_threshold(
    state: TrainState, batches: Iterable[Float[Tensor, "batch d_in"]], workspace: Workspace
) -> Float[Tensor, ""]:
    """Inference threshold of a BatchTopK SAE: the mean over batches of the smallest positive activation kept.

    Bussmann et al. 2024 (arXiv:2412.06410), section 3: E[min{f_ij > 0}], with the final weights instead of a running
    average. Batches in which nothing is active do not count; 0 where there are no others.
    """
    weights, k = {name: weight.detach() for name, weight in state.weights.items()}, state.config.k
    assert k is not None
    smallest = []
    for x in batches:
        pre_acts = encoder_pre_acts(x - weights["b_dec"], weights["W_enc"], weights["b_enc"], workspace)
        kept = pre_acts[batch_topk_kept(pre_acts, k)]
        if len(kept) > 0:
            smallest.append(kept.min())
    return torch.stack(smallest).mean() if smallest else state.weights["b_dec"].new_zeros(())


def _update_weights(state: TrainState, lr: float) -> None:
    """Adam, with the decoder's rows held at norm 1 where the architecture asks for it."""
    config, W_dec = state.config, state.weights["W_dec"]
    if config.has_unit_norm_decoder:
        remove_parallel_gradient_(W_dec)
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.weights.values(), config.max_grad_norm)
    state.optimiser.param_groups[0]["lr"] = lr
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    if config.has_unit_norm_decoder:
        unit_norm_rows_(W_dec)


def _count(state: TrainState, output: SAEOutput, n_rows: int) -> Int[Tensor, ""]:
    """Advance the counters; returns the active latents over the batch."""
    counts = output.firing_counts()
    state.tokens_since_fired.add_(n_rows).mul_(counts == 0)
    state.step += 1
    state.n_tokens += n_rows
    return counts.sum()
