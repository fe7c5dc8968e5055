"""The loss of each architecture, as the terms that are logged. Sums run over d_out and d_sae, means over the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.config.settings import TRANSCODERS, SAEConfig
from trainer.kernels import active, select, sparse
from trainer.kernels.active import Workspace
from trainer.sae import activations
from trainer.sae.architectures import SAEOutput, Weights, active_pre_acts, per_entry, topk_entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossTerms:
    """The terms of a loss, as scalars. mse is E||x - x_hat||^2 of the scaled x.

    The loss is the sum of the other three, which are weighted already.
    """

    mse: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    aux: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """The loss, which is minimised."""
        return self.reconstruction + self.sparsity + self.aux

    def detach(self) -> "LossTerms":
        """The same values without their autograd graph."""
        return LossTerms(
            mse=self.mse.detach(),
            reconstruction=self.reconstruction.detach(),
            sparsity=self.sparsity.detach(),
            aux=self.aux.detach(),
        )


def loss_terms(
    config: SAEConfig,
    weights: Weights,
    x: Float[Tensor, "batch d_out"],
    output: SAEOutput,
    *,
    sparsity_coefficient: float,
    dead: Bool[Tensor, " d_sae"] | None,
    workspace: Workspace,
) -> LossTerms:
    """The loss of one batch.

    Args:
        config: the SAE.
        weights: its weights.
        x: the scaled rows that are to be reconstructed.
        output: what `architectures.forward` returned for the batch.
        sparsity_coefficient: lambda at this step. The TopK family does not use it.
        dead: the latents that AuxK revives; None where no latent can be dead yet. Only the TopK family uses it.
        workspace: holds the pre-activations of the dead latents.
    """
    error = output.x_hat - x
    mse = _sum_squares(error) / len(x)
    nothing = mse.new_zeros(())
    if config.architecture in _PENALTY:
        penalty = _PENALTY[config.architecture](config, weights, output)
        aux = _AUX[config.architecture](config, weights, x, output) if config.architecture in _AUX else nothing
        return LossTerms(mse=mse, reconstruction=mse, sparsity=sparsity_coefficient * penalty, aux=aux)
    reconstruction = mse
    if output.prefix_x_hats is not None:  # the mean over the prefixes
        reconstruction = _sum_squares(output.prefix_x_hats - x) / (len(output.prefix_x_hats) * len(x))
    aux = aux_k_loss(config, weights, output, error, dead, workspace)
    return LossTerms(mse=mse, reconstruction=reconstruction / config.total_variance, sparsity=nothing, aux=aux)


def aux_k_loss(
    config: SAEConfig,
    weights: Weights,
    output: SAEOutput,
    error: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"] | None,
    workspace: Workspace,
) -> Float[Tensor, ""]:
    """alpha * min(1, n_dead / k_aux) * ||e - e_hat||^2 / ||e||^2 (AuxK: Gao et al. 2024, arXiv:2406.04093).

    e = x - x_hat, without gradient. e_hat = ReLU(TopK_k_aux(h of the dead latents)) W_dec, without b_dec. abstopk takes
    the largest |h| instead, with their signs. The loss is 0 where no latent is dead or e is 0. alpha is chosen for a
    reconstruction loss that is divided by the variance.

    Args:
        config: holds alpha (aux_coefficient) and k_aux.
        weights: the SAE's weights.
        output: what `architectures.forward` returned for the batch.
        error: x_hat - x, which is -e.
        dead: which latents are dead; None if none can be.
        workspace: holds the pre-activations of the dead latents.
    """
    nothing = error.new_zeros(())
    if dead is None or config.k_aux == 0 or config.aux_coefficient == 0:
        return nothing
    # On CUDA this waits, which is worth it: without the count all latents would have to be encoded again.
    n_dead = active.count_true(dead)
    if n_dead == 0:
        return nothing
    k_aux = min(config.k_aux, n_dead)
    _, dead_latents = active.indices_of_true(dead[None], n_dead)
    W_enc, b_enc = weights["W_enc"].detach()[dead_latents], weights["b_enc"].detach()[dead_latents]
    signed = config.architecture == "abstopk"
    values, which = select.topk_pre_acts(output.encoder_input, W_enc, b_enc, k_aux, workspace, by_magnitude=signed)
    entries = topk_entries(dead_latents[which], config.d_sae)
    pre_acts = active_pre_acts(values.flatten(), entries, weights, output.encoder_input, config)
    e_hat = sparse.sparse_decode(pre_acts if signed else activations.relu(pre_acts), entries, weights["W_dec"])
    weight = config.aux_coefficient * k_aux / config.k_aux
    error = error.detach()
    return weight * _sum_squares(e_hat + error) * _reciprocal_or_zero(_sum_squares(error))


def _gate_loss(
    config: SAEConfig, weights: Weights, x: Float[Tensor, "batch d_in"], output: SAEOutput
) -> Float[Tensor, ""]:
    """E||x - x_hat(ReLU(pi))||^2. It trains the gate, and the decoder gets no gradient (arXiv:2404.16014, eq. 8)."""
    gate, W_dec, b_dec = activations.relu(output.pre_acts), weights["W_dec"].detach(), weights["b_dec"].detach()
    if output.entries is None:
        x_hat = torch.addmm(b_dec, gate, W_dec)
    else:
        x_hat = sparse.sparse_decode(gate, output.entries, W_dec) + b_dec
    return _sum_squares(x_hat - x) / len(x)


def _pre_act_loss(
    config: SAEConfig, weights: Weights, x: Float[Tensor, "batch d_in"], output: SAEOutput
) -> Float[Tensor, ""]:
    """lambda_P E sum_i ReLU(theta_i - h_i) ||d_i||. It revives silent latents (Anthropic, January 2025 update)."""
    if not config.pre_act_loss_coefficient:
        return output.x_hat.new_zeros(())
    below = activations.relu(
        weights["threshold"] - output.pre_acts
    )  # of all entries, because output.entries is None here
    return config.pre_act_loss_coefficient * (below.sum(0) @ weights["W_dec"].norm(dim=1)) / len(x)


def _gate_l1(config: SAEConfig, weights: Weights, output: SAEOutput) -> Float[Tensor, ""]:
    """E sum_i ReLU(pi_i). It needs no decoder norms, because the rows of W_dec have norm 1."""
    return activations.relu(output.pre_acts).sum() / len(output.x_hat)


def _weighted_l1(config: SAEConfig, weights: Weights, output: SAEOutput) -> Float[Tensor, ""]:
    """E sum_i f_i ||d_i||. With the norms, a smaller f with a longer d_i gains nothing."""
    return (output.feature_acts * per_entry(weights["W_dec"].norm(dim=1), output.entries)).sum() / len(output.x_hat)


def _jumprelu_penalty(config: SAEConfig, weights: Weights, output: SAEOutput) -> Float[Tensor, ""]:
    """The penalty of the config's jumprelu_sparsity_loss_mode.

    step: L0 = E sum_i H(h_i - theta_i), whose gradient reaches theta alone (arXiv:2407.14435, eq. 9).
    quadratic: (L0 / target_l0 - 1)^2 (the same paper, appendix).
    tanh: E sum_i tanh(c f_i ||d_i||) (Anthropic, January 2025 update).
    """
    if config.jumprelu_sparsity_loss_mode == "tanh":
        assert config.jumprelu_tanh_scale is not None
        norms = per_entry(weights["W_dec"].norm(dim=1), output.entries)
        return (config.jumprelu_tanh_scale * output.feature_acts * norms).tanh().sum() / len(output.x_hat)
    assert config.jumprelu_bandwidth is not None
    threshold = per_entry(weights["threshold"], output.entries)
    l0 = activations.heaviside(output.pre_acts, threshold, config.jumprelu_bandwidth).sum() / len(output.x_hat)
    if config.jumprelu_sparsity_loss_mode == "step":
        return l0
    assert config.target_l0 is not None
    return (l0 / config.target_l0 - 1).square()


def _crosscoder_l1(config: SAEConfig, weights: Weights, output: SAEOutput) -> Float[Tensor, ""]:
    """E sum_i f_i sum_l ||d_i^l||, where d_i^l is the part of a decoder row that is of hook l (Lindsey et al. 2024)."""
    parts = weights["W_dec"].split(list(config.hook_widths or ()), dim=1)
    norms = torch.stack([part.norm(dim=1) for part in parts]).sum(0)
    return (output.feature_acts * per_entry(norms, output.entries)).sum() / len(output.x_hat)


_PENALTY: dict[str, Callable[[SAEConfig, Weights, SAEOutput], Tensor]] = {
    "standard": _weighted_l1,
    "jumprelu": _jumprelu_penalty,
    "gated": _gate_l1,
    **dict.fromkeys(TRANSCODERS, _weighted_l1),
    "crosscoder": _crosscoder_l1,
}
_AUX: dict[str, Callable[[SAEConfig, Weights, Tensor, SAEOutput], Tensor]] = {
    "gated": _gate_loss,
    "jumprelu": _pre_act_loss,
}


def _sum_squares(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    return _SumSquares.apply(x)


class _SumSquares(torch.autograd.Function):
    """torch.dot(x, x). The gradient of torch.dot passes over x three times, this one once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        flat = x.reshape(-1)
        return torch.dot(flat, flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * grads[0])


def _reciprocal_or_zero(x: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """1 / x, or 0 where x is too small to divide by."""
    smallest = torch.finfo(x.dtype).tiny
    return torch.where(x > smallest, 1 / x.clamp_min(smallest), 0.0)
