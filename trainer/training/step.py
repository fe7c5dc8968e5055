"""One SAE, one batch: `TrainState` and what a step does to it."""

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
    """All that changes while an SAE trains, and so all that a checkpoint holds (with the config's hash).

    step: optimizer steps done. n_tokens: rows seen. tokens_since_fired: rows seen since each latent was last active.
    average: running average of the weights where the config has an ema_decay, empty before the first step.
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
        """Bool [d_sae]: latents that have not fired in the last `dead_window` tokens."""
        return self.tokens_since_fired > self.config.dead_window

    @property
    def may_have_dead(self) -> bool:
        """Whether enough rows were seen for a latent to be dead: known without a look at the counters."""
        return self.n_tokens > self.config.dead_window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutcome:
    """What a step computed on its way, detached: for the log.

    n_active: active latents over the whole batch. lr: what this step used.
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
    """The state before the first step, on b_dec's device, from what `initial_weights` takes."""
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
    """One optimizer step on x, float32 and scaled as the config's `inputs` say.

    y: what is to be reconstructed, scaled as its `outputs` say; x if None.

    Raises TrainingDiverged, and changes nothing, when the loss is not finite. On CUDA it does not look, for that would
    mean to wait for the device: `check_losses_are_finite` is for the losses of many steps.
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
    """The hooks' activations side by side, float32 and scaled; a copy, so that the batch stays as it was read.

    made: what was made of this batch before.
    """
    if hooks not in made:
        parts = [batch.x[hook.hook_name].to(torch.float32, copy=True).mul_(hook.scale) for hook in hooks]
        made[hooks] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return made[hooks]


def log_record(state: TrainState, y: Float[Tensor, "batch d_out"], outcome: StepOutcome) -> dict[str, float | int]:
    """One line of metrics.jsonl after a step that was to give y, under SAELens' keys; only lr is not of this batch."""
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
    """Raises TrainingDiverged naming the first step whose loss is NaN or infinite.

    losses: `LossTerms.total` of first_step and of the steps after it.
    """
    for step, loss in enumerate(losses.tolist(), start=first_step):
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"{config.name}: the loss must stay finite, got {loss} at step {step}; lower lr={config.lr}"
            )


def check_weights_are_finite(state: TrainState) -> None:
    """Raises TrainingDiverged naming the first weight that holds NaN or infinity."""
    for name, weight in state.weights.items():
        if not all(bool(bound.isfinite()) for bound in weight.detach().aminmax()):  # NaN passes through both
            raise TrainingDiverged(
                f"{state.config.name}: weights must stay finite, got NaN or infinity in {name} after step "
                f"{state.step}; lower lr={state.config.lr}"
            )


def learned_weights(state: TrainState) -> dict[str, Tensor]:
    """The weights that training has come to: their running average, schedule_free's, or the last ones; detached."""
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
    """The weights that `save_inference_sae` takes. threshold: of `calibrated_threshold`, for those that need one."""
    weights = learned_weights(state)
    return weights if threshold is None else {**weights, "threshold": threshold.expand(state.config.d_sae)}


def calibrated_threshold(
    state: TrainState, batches: Iterable[Float[Tensor, "batch d_in"]], workspace: Workspace
) -> Float[Tensor, ""]:
    """Inference threshold of a BatchTopK SAE: the mean over batches of the smallest positive activation kept.

    Bussmann et al. 2024 (arXiv:2412.06410), section 3: E[min{f_ij > 0}], with the final weights instead of a running
    average. Batches in which nothing is active do not count; 0 where there are no others.
    """
    weights, k = learned_weights(state), state.config.k
    assert k is not None
    smallest = []
    for x in batches:
        pre_acts = encoder_pre_acts(x - weights["b_dec"], weights["W_enc"], weights["b_enc"], workspace)
        kept = pre_acts[batch_topk_active(pre_acts, k)]
        if len(kept) > 0:
            smallest.append(kept.min())
    return torch.stack(smallest).mean() if smallest else state.weights["b_dec"].new_zeros(())


def _update_weights(state: TrainState, lr: float) -> None:
    """The optimizer's step, with the decoder's rows held at norm 1 where the architecture asks for it."""
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
        state.weights["threshold"].detach().clamp_(min=0.0)  # below, a negative pre-activation would pass
    if config.ema_decay is not None:
        update_average_(state.average, state.weights, config.ema_decay)


def _count(state: TrainState, output: SAEOutput, n_rows: int) -> Int[Tensor, ""]:
    """Advance the counters; returns the active latents over the batch."""
    counts = output.firing_counts()
    state.tokens_since_fired.add_(n_rows).mul_(counts == 0)
    state.step += 1
    state.n_tokens += n_rows
    return counts.sum()
