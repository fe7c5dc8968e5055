"""One SAE and one batch: `TrainState`, the step that changes it, and the weights that training arrives at."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actcache.errors import TrainingDiverged
from actcache.flow import Batch
from trainer.config.settings import PENALISED, SAEConfig, ScaledHook
from trainer.kernels import active
from trainer.kernels.active import Workspace
from trainer.kernels.select import batch_topk_active, encoder_pre_acts
from trainer.sae.architectures import SAEOutput, forward, initial_weights
from trainer.sae.losses import LossTerms, loss_terms
from trainer.sae.metrics import explained_variance
from trainer.training.optimizer import (
    clip_gradients_,
    k_at,
    lr_at,
    new_optimizer,
    remove_parallel_gradient_,
    schedule_free_average,
    sparsity_coefficient_at,
    unit_norm_rows_,
    update_average_,
)

_PENALTY_KEY = {name: "losses/l0_loss" if name == "jumprelu" else "losses/l1_loss" for name in PENALISED}


@dataclass(slots=True, kw_only=True, eq=False)
class TrainState:
    """All that changes while an SAE trains. A checkpoint holds it, with the hash of the config.

    Attributes:
        config: the SAE; it does not change.
        weights: the weights, as `architectures` describes them.
        optimizer: the optimizer of the weights, with its moments.
        average: the running average of the weights, if the config has an ema_decay. It is empty before the first step.
        step: optimizer steps done.
        n_tokens: rows seen.
        tokens_since_fired: rows seen since each latent was last active, int64.
    """

    config: SAEConfig
    weights: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int
    n_tokens: int
    tokens_since_fired: Int[Tensor, " d_sae"]

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired in the last `dead_window` tokens, bool [d_sae]."""
        return self.tokens_since_fired > self.config.dead_window

    @property
    def may_have_dead(self) -> bool:
        """Whether enough rows were seen for a latent to be dead. The counters are not read for it."""
        return self.n_tokens > self.config.dead_window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutcome:
    """What a step computed, detached, for the log.

    Attributes:
        loss: the terms of the loss.
        x_hat: the reconstruction of the batch.
        n_active: the number of active entries in the whole batch.
        lr: the learning rate of this step.
    """

    loss: LossTerms
    x_hat: Float[Tensor, "batch d_out"]
    n_active: Int[Tensor, ""]
    lr: float


def initial_state(
    config: SAEConfig,
    b_dec: Float[Tensor, " d_out"],
    *,
    x_mean: Float[Tensor, " d_in"] | None = None,
    sample: Float[Tensor, "row d_in"] | None = None,
) -> TrainState:
    """The state before the first step, on b_dec's device. The arguments are those of `initial_weights`."""
    weights = initial_weights(config, b_dec, x_mean=x_mean, sample=sample)
    return TrainState(
        config=config,
        weights=weights,
        optimizer=new_optimizer(config, weights),
        average={},
        step=0,
        n_tokens=0,
        tokens_since_fired=torch.zeros(config.d_sae, dtype=torch.int64, device=b_dec.device),
    )


def train_step(
    state: TrainState,
    x: Float[Tensor, "batch d_in"],
    workspace: Workspace,
    *,
    y: Float[Tensor, "batch d_out"] | None = None,
) -> StepOutcome:
    """Do one optimizer step.

    On CUDA the loss is not looked at, because that would wait for the device. `check_losses_are_finite` looks at the
    losses of many steps together.

    Args:
        state: the state, which the step changes.
        x: float32 rows, scaled as the config's `inputs` say.
        workspace: holds the dense pre-activations of the batch.
        y: the rows that are to be reconstructed, scaled as the config's `outputs` say; x if None.

    Returns:
        What the step computed, for the log.

    Raises:
        TrainingDiverged: the loss is not finite (only on a CPU). The state is then unchanged.
    """
    config, y = state.config, x if y is None else y
    output = forward(config, state.weights, x, workspace, k=k_at(config, state.step))
    loss = loss_terms(
        config,
        state.weights,
        y,
        output,
        sparsity_coefficient=sparsity_coefficient_at(config, state.step),
        dead=state.dead if state.may_have_dead else None,
        workspace=workspace,
    )
    total = loss.total
    if not active.on_cuda(total):
        check_losses_are_finite(config, total.detach()[None], first_step=state.step)
    total.backward()
    lr = lr_at(config, state.step)
    _update_weights(state, lr)
    n_active = _count(state, output, len(x))
    return StepOutcome(loss=loss.detach(), x_hat=output.x_hat.detach(), n_active=n_active, lr=lr)


def scaled_rows(
    batch: Batch, hooks: tuple[ScaledHook, ...], made: dict[tuple[ScaledHook, ...], Tensor]
) -> Float[Tensor, "batch width"]:
    """The activations at the hooks, side by side, float32 and scaled. The batch itself is not changed.

    made: the rows that were made of this batch before, by their hooks. New rows are added to it.
    """
    if hooks not in made:
        parts = [batch.x[hook.hook_name].to(torch.float32, copy=True).mul_(hook.scale) for hook in hooks]
        made[hooks] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return made[hooks]


def log_record(state: TrainState, y: Float[Tensor, "batch d_out"], outcome: StepOutcome) -> dict[str, float | int]:
    """The line of metrics.jsonl for the step just done, under SAELens' keys.

    y: the scaled rows that were to be reconstructed. The losses, explained variance and l0 are those of this batch.
    """
    loss, architecture = outcome.loss, state.config.architecture
    terms = {_PENALTY_KEY[architecture]: loss.sparsity} if architecture in _PENALTY_KEY else {}
    if architecture not in PENALISED or architecture == "gated":
        terms["losses/auxiliary_reconstruction_loss"] = loss.aux
    if state.config.pre_act_loss_coefficient is not None:
        terms["losses/pre_act_loss"] = loss.aux
    return {
        "step": state.step,
        "n_tokens": state.n_tokens,
        "losses/overall_loss": loss.total.item(),
        "losses/mse_loss": loss.mse.item(),
        **{key: term.item() for key, term in terms.items()},
        "metrics/explained_variance": explained_variance(y, outcome.x_hat),
        "metrics/l0": int(outcome.n_active) / len(y),
        "sparsity/dead_features": int(state.dead.sum()),
        "details/current_learning_rate": outcome.lr,
        "details/n_training_samples": state.n_tokens,
    }


def check_losses_are_finite(config: SAEConfig, losses: Float[Tensor, " step"], *, first_step: int) -> None:
    """Raise TrainingDiverged if a loss is NaN or infinite. The error names the first such step.

    losses: `LossTerms.total` of step `first_step` and of the steps after it.
    """
    for step, loss in enumerate(losses.tolist(), start=first_step):
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"{config.name}: the loss must stay finite, got {loss} at step {step}; lower lr={config.lr}"
            )


def check_weights_are_finite(state: TrainState) -> None:
    """Raise TrainingDiverged if a weight holds NaN or infinity. The error names the first such weight."""
    for name, weight in state.weights.items():
        if not all(bool(bound.isfinite()) for bound in weight.detach().aminmax()):  # NaN shows in both bounds
            raise TrainingDiverged(
                f"{state.config.name}: weights must stay finite, got NaN or infinity in {name} after step "
                f"{state.step}; lower lr={state.config.lr}"
            )


def learned_weights(state: TrainState) -> dict[str, Tensor]:
    """The weights that training has learned, detached: the running average, schedule_free's, or the last ones."""
    config = state.config
    if state.average:
        learned = dict(state.average)
    elif config.optimizer == "schedule_free" and state.step > 0:
        iterates = {name: state.optimizer.state[weight]["z"] for name, weight in state.weights.items()}
        learned = {name: schedule_free_average(config, w, iterates[name]) for name, w in state.weights.items()}
    else:
        return {name: weight.detach() for name, weight in state.weights.items()}
    if config.has_unit_norm_decoder:  # the mean of two directions is shorter than they are
        learned["W_dec"] = learned["W_dec"].clone()
        unit_norm_rows_(learned["W_dec"])
    return learned


def inference_weights(state: TrainState, threshold: Float[Tensor, ""] | None = None) -> dict[str, Tensor]:
    """The weights that `save_inference_sae` takes. threshold: from `calibrated_threshold`, for a BatchTopK SAE."""
    weights = learned_weights(state)
    return weights if threshold is None else {**weights, "threshold": threshold.expand(state.config.d_sae)}


def calibrated_threshold(
    state: TrainState, batches: Iterable[Float[Tensor, "batch d_in"]], workspace: Workspace
) -> Float[Tensor, ""]:
    """The inference threshold of a BatchTopK SAE: E[min{f_ij > 0}], a mean over batches.

    Bussmann et al. 2024 (arXiv:2412.06410), section 3. The final weights are used instead of a running average.
    Batches without an active entry do not count. Without any active entry the threshold is 0.

    Args:
        state: the trained SAE.
        batches: scaled rows, in batches of the length of training.
        workspace: holds the dense pre-activations of a batch.
    """
    weights, k = learned_weights(state), state.config.k
    assert k is not None
    smallest = []
    for x in batches:
        pre_acts = encoder_pre_acts(x - weights["b_dec"], weights["W_enc"], weights["b_enc"], workspace)
        active_pre_acts = pre_acts[batch_topk_active(pre_acts, k)]
        if len(active_pre_acts) > 0:
            smallest.append(active_pre_acts.min())
    return torch.stack(smallest).mean() if smallest else state.weights["b_dec"].new_zeros(())


def _update_weights(state: TrainState, lr: float) -> None:
    """Do the optimizer's step. Decoder rows stay at norm 1 where the architecture asks for it."""
    config, W_dec = state.config, state.weights["W_dec"]
    if config.has_unit_norm_decoder:
        remove_parallel_gradient_(W_dec)
    if config.max_grad_norm is not None:
        clip_gradients_(state.weights.values(), config.max_grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if config.has_unit_norm_decoder:
        unit_norm_rows_(W_dec)
    if "threshold" in state.weights:
        state.weights["threshold"].detach().clamp_(
            min=0.0
        )  # under a negative threshold, a negative pre-activation would pass
    if config.ema_decay is not None:
        update_average_(state.average, state.weights, config.ema_decay)


def _count(state: TrainState, output: SAEOutput, n_rows: int) -> Int[Tensor, ""]:
    """Advance the counters. Returns the number of active entries in the batch."""
    counts = output.firing_counts()
    state.tokens_since_fired.add_(n_rows).mul_(counts == 0)
    state.step += 1
    state.n_tokens += n_rows
    return counts.sum()
