"""SAEs spliced into a language model that runs: at their hooks the model goes on with what they make of its stream.

Each SAE reads the stream as it is then, changed by those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from actcache.arguments import type_fields_
from actcache.errors import CacheMismatch, ConfigError
from actcache.models.live import live_model
from trainer.features.logit_lens import check_latents, directions
from trainer.features.text import check_width
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True)
class Scale:
    """The activation becomes `factor` times itself. 1 changes nothing, and an inactive latent stays inactive."""

    factor: float

    def __post_init__(self) -> None:
        type_fields_("Scale", self)


@dataclass(frozen=True, slots=True)
class Clamp:
    """The activation becomes `value` at every token, whatever it was (Templeton et al. 2024). 0 ablates the latent."""

    value: float

    def __post_init__(self) -> None:
        type_fields_("Clamp", self)


@dataclass(frozen=True, slots=True)
class Add:
    """The activation grows by `amount` at every token. With the error term, x becomes x + amount d_i."""

    amount: float

    def __post_init__(self) -> None:
        type_fields_("Add", self)


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """The activation becomes what it was elsewhere, such as on another prompt of the same length.

    Attributes:
        acts: [sequence, position], an activation for each token of the pass.
    """

    acts: Float[Tensor, "sequence position"]


Change = Scale | Clamp | Add | Patch


@runtime_checkable
class LiveModel(Protocol):
    """A language model whose passes can be changed. `actcache.models.language_model.LanguageModel` is one."""

    identity: dict[str, Any]

    def replacing(self, changes: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]]) -> Any:
        """A context in which activations at hooks are replaced in every pass."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splice:
    """An SAE at its hook, and what is done there.

    Let f be the latents' activations and f' the changed ones. The hook's activation x becomes decode(f') + error, where
    error = x - decode(f). It is computed as x + sum_i (f'_i - f_i) d_i over the changed latents, so x keeps every bit
    where nothing changes. Without the error term it becomes decode(f'). A transcoder changes the activation that it
    predicts. Gradients flow through f, f' and x where torch records them.

    Attributes:
        sae: its latents are changed.
        features: latent -> Scale, Clamp, Add or Patch.
        keep_error: whether the error term is added.
        where: the tokens at which this is done; the others keep what they had. None for all.
        act: gets f' of those tokens, [row, d_sae], after `features`; what it returns takes the place of f'.
    """

    sae: SAE
    features: Mapping[int, Change] = field(default_factory=dict)
    keep_error: bool = True
    where: Bool[Tensor, "sequence position"] | None = None
    act: Callable[[Float[Tensor, "row d_sae"]], Float[Tensor, "row d_sae"]] | None = None

    def __post_init__(self) -> None:
        check_latents(self.sae, list(self.features))
        if len(self.sae.output_hooks) != 1:
            hooks = " + ".join(self.sae.output_hooks)
            raise ConfigError(f"splice: {hooks} are several hooks at once; take an SAE of one")

    def replaced(
        self, x: Float[Tensor, "sequence position d_in"], y: Float[Tensor, "sequence position d_out"]
    ) -> Float[Tensor, "sequence position d_out"]:
        """What the pass goes on with in place of y. The SAE reconstructs y from x.

        Raises:
            CacheMismatch: x has another width than the SAE takes.
            ValueError: `where` or a Patch has another shape than the tokens of the pass.
        """
        here = torch.ones(y.shape[:2], dtype=torch.bool) if self.where is None else self.where
        if here.shape != y.shape[:2]:
            raise ValueError(f"splice: where must be of the tokens {tuple(y.shape[:2])}, got {tuple(here.shape)}")
        here = here.to(y.device)
        check_width(self.sae, x)
        if not self.sae.gives(y.shape[-1]):
            raise CacheMismatch(
                f"{self.sae.output_hooks[0]}: the SAE gives activations of width {self.sae.d_out}, the model has "
                f"{y.shape[-1]}; pass the model that it was trained on"
            )
        rows = self._rows(x.to(y.device), y[here], here)
        return y.index_put((here,), rows.to(y))

    def _rows(
        self,
        x: Float[Tensor, "sequence position width"],
        y: Float[Tensor, "row d_out"],
        here: Bool[Tensor, "sequence position"],
    ) -> Float[Tensor, "row d_out"]:
        sae = self.sae
        if sae.reads_sequences:
            feature_acts, x_hat = (each[here.to(sae.device)] for each in sae.reconstruct(x.to(sae.device)))
        else:
            feature_acts, x_hat = sae.reconstruct(x[here].to(sae.device))
        y = y.to(sae.device)
        base = y if self.keep_error else sae.placed(y, x_hat)
        latents = list(self.features)
        differences = [_difference(self.features[i], feature_acts[:, i], here) for i in latents]
        if self.act is None:
            if not latents:
                return base
            change = torch.stack(differences, dim=1) @ directions(sae, latents)
        else:
            changed = feature_acts.clone()
            for latent, difference in zip(latents, differences, strict=True):
                changed[:, latent] += difference
            change = (self.act(changed) - feature_acts) @ directions(sae, None)
        scale = sae.output_scale(x[here].to(sae.device))
        return sae.added(base, change if scale is None else change * scale)


@contextmanager
def spliced(model: LiveModel | nn.Module, splices: Sequence[Splice]) -> Iterator[None]:
    """Inside the `with`, every pass of the model goes through the splices, in their order where two have one hook.

    Args:
        model: the language model, as `live_model` takes it. Its own module may be called, or its `logits`.
        splices: any number of them.

    Raises:
        ModelError: the model lacks a hook.
        CacheMismatch: an SAE is of another stream than the model has (see `SAE.check`).
        CacheMismatch, ValueError: from the pass, as `Splice.replaced`.
    """
    live = live_model(model)
    for splice in splices:
        splice.sae.check(live)
    with live.replacing([change for splice in splices for change in _functions(splice)]):
        yield


def _functions(splice: Splice) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
    """What is done at the hooks of a splice: at that of x, if it is another one, x is seen."""
    (source,), (target,) = splice.sae.input_hooks, splice.sae.output_hooks
    if source == target:
        return [(target, lambda y: splice.replaced(y, y))]
    seen: dict[str, Tensor] = {}

    def see(x: Tensor) -> None:
        seen["x"] = x

    return [(source, see), (target, lambda y: splice.replaced(seen["x"], y))]


def _difference(
    change: Change, acts: Float[Tensor, " row"], here: Bool[Tensor, "sequence position"]
) -> Float[Tensor, " row"]:
    """f' - f, the change of a latent's activation at each token."""
    match change:
        case Scale(factor):
            return (factor - 1) * acts
        case Clamp(value):
            return value - acts
        case Add(amount):
            return torch.full_like(acts, amount)
        case Patch(there):
            if there.shape != here.shape:
                raise ValueError(f"splice: Patch must be of the tokens {tuple(here.shape)}, got {tuple(there.shape)}")
            return there.to(here.device)[here].to(acts) - acts
