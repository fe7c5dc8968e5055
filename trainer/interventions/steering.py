"""Steering: a language model writes on while latents of an SAE are changed at its hook."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from actcache.arguments import type_fields_, typed, whole_number
from actcache.errors import ConfigError
from trainer.features.logit_lens import check_latents, directions
from trainer.features.text import check_width, prompt_ids
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True)
class Scale:
    """The activation becomes `factor` times itself. 1 changes nothing, and an inactive latent stays inactive."""

    factor: float

    def __post_init__(self) -> None:
        type_fields_("steer: Scale", self)


@dataclass(frozen=True, slots=True)
class Clamp:
    """The activation becomes `value` at every token, whatever it was (Templeton et al. 2024). 0 ablates the latent."""

    value: float

    def __post_init__(self) -> None:
        type_fields_("steer: Clamp", self)


@dataclass(frozen=True, slots=True)
class Add:
    """The activation grows by `amount` at every token. With the error term, x becomes x + amount d_i."""

    amount: float

    def __post_init__(self) -> None:
        type_fields_("steer: Add", self)


Change = Scale | Clamp | Add


@runtime_checkable
class Model(Protocol):
    """What steering needs of a language model. `actcache.models.language_model.LanguageModel` is one."""

    identity: dict[str, Any]
    tokenizer: Any
    max_positions: int | None

    def logits(self, token_ids: Int[Tensor, "sequence position"]) -> Float[Tensor, "sequence position vocab"]:
        """Logits of the whole model."""
        ...

    def logits_with(
        self,
        token_ids: Int[Tensor, "sequence position"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
        *,
        hook_fns: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """Logits when the hook's activation is replaced by `replace` of it.

        hook_fns: for a hook name, a function that is called with its activation in the same pass.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """Two continuations of a prompt.

    Attributes:
        prompt: the text that the model continues.
        before: how it goes on without a change.
        after: how it goes on with the latents changed.
    """

    prompt: str
    before: str
    after: str


def steer(
    model: Model,
    sae: SAE,
    text: str,
    *,
    features: Mapping[int, Change],
    n_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    keep_error: bool = True,
) -> Steered:
    """Let the model continue `text` twice: without a change, and with `features` changed as in `steered_logits`.

    The whole context runs through the model for every token. So the text that was written under the change is also read
    under it. Both continuations draw with the same random numbers. Each ends at a special token.

    Args:
        model: the language model.
        sae: its latents are changed at its hook.
        text: the prompt.
        features: latent -> Scale, Clamp or Add.
        n_tokens: how many tokens to write, at most.
        temperature: the logits are divided by it; 0 takes the likeliest token each time.
        seed: of the random numbers.
        keep_error: False replaces the activation by the SAE's reconstruction of it, in the changed continuation alone.

    Returns:
        The prompt and both continuations.

    Raises:
        ConfigError: an argument is out of range, the text is empty or too long, or the SAE is a crosscoder.
        CacheMismatch: the model's hook has another width than the SAE takes.
        ModelError: the model lacks the hook, or has no output head.
    """
    _check_arguments(n_tokens, temperature, seed)
    prompt = prompt_ids(sae, model.tokenizer, text)
    if model.max_positions is not None and prompt.shape[1] + n_tokens - 1 > model.max_positions:
        raise ConfigError(
            f"steer: {model.identity['name']} has {model.max_positions} positions, {n_tokens} tokens after a text of "
            f"{prompt.shape[1]} do not fit; take a shorter text or fewer tokens"
        )

    def logits_with(token_ids: Tensor) -> Tensor:
        return steered_logits(model, sae, token_ids, features, keep_error=keep_error)

    before, after = (
        _continuation(logits, prompt, model.tokenizer, n_tokens=n_tokens, temperature=temperature, seed=seed)
        for logits in (model.logits, logits_with)
    )
    return Steered(prompt=text, before=before, after=after)


@torch.no_grad()
def steered_logits(
    model: Model,
    sae: SAE,
    token_ids: Int[Tensor, "sequence position"],
    features: Mapping[int, Change],
    *,
    keep_error: bool = True,
) -> Float[Tensor, "sequence position vocab"]:
    """The model's logits when the latents `features` are changed at every token that is not special.

    Let f be the latents' activations and f' the changed ones. The hook's activation x becomes decode(f') + error, where
    error = x - decode(f). It is computed as x + sum_i (f'_i - f_i) d_i over the changed latents, so x keeps every bit
    where nothing changes. Without the error term it becomes decode(f'). A transcoder changes the activation that it
    predicts.

    Args:
        model: the language model.
        sae: its latents are changed.
        token_ids: the sequences to run.
        features: latent -> Scale, Clamp or Add.
        keep_error: whether the error term is added.

    Raises:
        ConfigError, CacheMismatch, ModelError: as `steer`.
    """
    check_latents(sae, list(features))
    if len(sae.output_hooks) != 1:
        raise ConfigError(f"steer: {' + '.join(sae.output_hooks)} are several hooks at once; steer with an SAE of one")
    (source,), (target,) = sae.input_hooks, sae.output_hooks
    special_ids = model.tokenizer.all_special_ids if model.tokenizer else []
    special = torch.tensor(special_ids, dtype=torch.long, device=token_ids.device)
    is_steered = ~torch.isin(token_ids, special)
    seen: dict[str, Tensor] = {}

    def replace(y: Tensor) -> Tensor:
        here = is_steered.to(y.device)
        x = seen.get("x", y).to(y.device)
        steered = y.clone()
        steered[here] = _steered_rows(sae, x[here], y[here], features, keep_error=keep_error).to(y)
        return steered

    hook_fns = None if source == target else {source: lambda x: seen.update(x=x)}
    return model.logits_with(token_ids, target, replace, hook_fns=hook_fns)


def _steered_rows(
    sae: SAE,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    features: Mapping[int, Change],
    *,
    keep_error: bool,
) -> Float[Tensor, "row d_out"]:
    """The rows that replace y. The SAE reconstructs y from x."""
    check_width(sae, x)
    feature_acts, x_hat = sae.reconstruct(x.to(sae.device))
    latents = list(features)
    differences = [_difference(features[latent], feature_acts[:, latent]) for latent in latents]
    base = y.to(sae.device) if keep_error else x_hat
    return base + torch.stack(differences, dim=1) @ directions(sae, latents) if latents else base


def _difference(change: Change, acts: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """f' - f, the change of a latent's activation at each token."""
    match change:
        case Scale(factor):
            return (factor - 1) * acts
        case Clamp(value):
            return value - acts
        case Add(amount):
            return torch.full_like(acts, amount)


def _continuation(
    logits: Callable[[Tensor], Tensor],
    prompt: Int64[Tensor, "1 position"],
    tokenizer: Any,
    *,
    n_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The text that the model writes after the prompt."""
    generator, token_ids = torch.Generator().manual_seed(seed), prompt
    for _ in range(n_tokens):
        token_id = _drawn(logits(token_ids)[0, -1], temperature, generator)
        if token_id in tokenizer.all_special_ids:
            break
        token_ids = torch.cat([token_ids, torch.tensor([[token_id]])], dim=1)
    # Decoded with the prompt, because a first token may lose its space and a character may span several tokens.
    whole, start = (_decoded(tokenizer, ids[0].tolist()) for ids in (token_ids, prompt))
    return whole[len(start) :]


def _drawn(logits: Float[Tensor, " vocab"], temperature: float, generator: torch.Generator) -> int:
    """A token id drawn from softmax(logits / temperature) on the CPU, in float64. Temperature 0 takes the likeliest."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)  # no overflow at any temperature
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check_arguments(n_tokens: int, temperature: float, seed: int) -> None:
    whole_number("steer", "n_tokens", n_tokens, 1)
    whole_number("steer", "seed", seed, 0, 2**63 - 1)
    if not 0 <= typed("steer", "temperature", temperature, float) < float("inf"):
        raise ConfigError(f"steer: temperature must be 0 or a positive number, got {temperature}")
