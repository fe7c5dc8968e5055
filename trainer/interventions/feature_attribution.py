"""Attribution: how much each latent matters to a metric of the model's output, by gradients at the latents.

Attribution patching (Nanda 2023; Syed et al. 2023, arXiv:2310.10348) and integrated gradients (Sundararajan et al.
2017, arXiv:1703.01365), as sparse feature circuits use them (Marks et al. 2024, arXiv:2403.19647).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actcache.arguments import whole_number
from actcache.errors import ConfigError
from actcache.models.live import live_model
from trainer.interventions.splice import LiveModel, Splice, spliced
from trainer.sae.sae import SAE


@runtime_checkable
class Model(LiveModel, Protocol):
    """What attribution needs of a language model. `actcache.models.language_model.LanguageModel` is one."""

    def logits_with_gradients(
        self, token_ids: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocab"]:
        """Logits, through which gradients flow."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureAttribution:
    """What the latents of an SAE do to a metric, token by token. Each is [sequence, position, d_sae].

    Attributes:
        feature_acts: f, in the pass that nothing changes; 0 at the tokens that are left out.
        gradient: d metric / d f, or its mean over the steps.
        effect: -f * gradient: about what the metric gains if that latent is ablated at that token.
    """

    feature_acts: Float[Tensor, "sequence position d_sae"]
    gradient: Float[Tensor, "sequence position d_sae"]
    effect: Float[Tensor, "sequence position d_sae"]


def attribution(
    model: Model | nn.Module,
    saes: Sequence[SAE],
    token_ids: Int[Tensor, "sequence position"],
    metric: Callable[[Float[Tensor, "sequence position vocab"]], Float[Tensor, ""]],
    *,
    steps: int = 0,
    where: Bool[Tensor, "sequence position"] | None = None,
) -> list[FeatureAttribution]:
    """How much each latent of each SAE matters to a metric.

    The SAEs' errors stay in the stream, so the metric is that of the model itself. The gradient at a latent holds all
    that follows from it, through the later SAEs too.

    Args:
        model: the language model, as `live_model` takes it.
        saes: SAEs of one hook each.
        token_ids: whole sequences.
        metric: a number made of the logits, such as the difference of two tokens' logits at the last position.
        steps: 0 takes the gradient at f (attribution patching). More take its mean over as many points (m - 1/2) f /
            steps on the straight way from 0 to f, one SAE at a time (integrated gradients): exact where the metric is
            linear, and nearer to the truth where it is not, for `steps` more passes an SAE.
        where: the tokens whose latents count; None for all.

    Returns:
        One value for each SAE, in their order.

    Raises:
        ConfigError: an SAE has several hooks, or the metric is no single number.
        ModelError: the model lacks a hook, or has no output head.
        CacheMismatch: a hook of the model has another width than its SAE takes.
    """
    whole_number("attribution", "steps", steps, 0)
    live = live_model(model)
    mask = torch.ones(token_ids.shape, dtype=torch.bool) if where is None else where
    acts, gradients = _gradients(live, saes, token_ids, metric, mask, [1.0] * len(saes))
    for index in range(len(saes) if steps else 0):
        total = torch.zeros_like(gradients[index])
        for m in range(steps):
            total += _gradients(live, saes, token_ids, metric, mask, _scaled(index, len(saes), (m + 0.5) / steps))[1][
                index
            ]
        gradients[index] = total / steps
    return [
        FeatureAttribution(
            feature_acts=_spread(f, mask), gradient=_spread(gradient, mask), effect=_spread(-f * gradient, mask)
        )
        for f, gradient in zip(acts, gradients, strict=True)
    ]


def _scaled(index: int, n_saes: int, factor: float) -> list[float]:
    """1 for every SAE but one."""
    return [factor if number == index else 1.0 for number in range(n_saes)]


def _gradients(
    model: Model,
    saes: Sequence[SAE],
    token_ids: Int[Tensor, "sequence position"],
    metric: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "sequence position"],
    factors: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """([f], [d metric / d f'] of each SAE where f' = factor f), [row, d_sae] each."""
    acts: dict[int, Tensor] = {}
    probes: dict[int, Tensor] = {}

    def probed(index: int, factor: float, f: Tensor) -> Tensor:
        acts[index] = f.detach()
        probes[index] = torch.zeros_like(f).requires_grad_()
        return factor * f + probes[index]

    splices = [
        Splice(sae=sae, where=mask, act=partial(probed, index, factor))
        for index, (sae, factor) in enumerate(zip(saes, factors, strict=True))
    ]
    with spliced(model, splices):
        found = metric(model.logits_with_gradients(token_ids))
    if found.numel() != 1:
        raise ConfigError(f"attribution: metric must give one number, got shape {tuple(found.shape)}")
    wanted = [probes[index] for index in range(len(saes))]
    gradients = torch.autograd.grad(found, wanted, allow_unused=True, materialize_grads=True)
    return [acts[index] for index in range(len(saes))], list(gradients)


def _spread(rows: Float[Tensor, "row d_sae"], mask: Bool[Tensor, "sequence position"]) -> Tensor:
    """The rows at their tokens, 0 elsewhere."""
    spread = rows.new_zeros((*mask.shape, rows.shape[-1]))
    spread[mask.to(rows.device)] = rows
    return spread
