"""Steering: a language model writes on while latents of an SAE are changed at its hook."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from actcache.arguments import typed, whole_number
from actcache.errors import ConfigError
from actcache.models.live import live_model
from trainer.features.text import prompt_ids
from trainer.interventions.splice import Change, Splice, spliced
from trainer.sae.sae import SAE


@runtime_checkable
class Model(Protocol):
    """What steering needs of a language model. `actcache.models.language_model.LanguageModel` is one."""

    identity: dict[str, Any]
    tokenizer: Any
    max_positions: int | None

    def logits(self, token_ids: Int[Tensor, "sequence position"]) -> Float[Tensor, "sequence position vocab"]:
        """Logits of the whole model."""
        ...

    def logits_after(
        self, past: Any, token_ids: Int[Tensor, "sequence position"]
    ) -> tuple[Float[Tensor, "sequence position vocab"], Any]:
        """Logits of the tokens after a past, and the past with them; a past of None is the start of the text."""
        ...

    def replacing(self, changes: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]]) -> Any:
        """A context in which activations at hooks are replaced in every pass."""
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
    model: Model | nn.Module,
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

    The text that was written under the change is also read under it: keys and values are those of the changed pass. A
    model that keeps none runs the whole text for every token. Both continuations draw with the same random numbers.
    Each ends at a special token.

    Args:
        model: the language model with its tokenizer, as `live_model` takes it.
        sae: its latents are changed at its hook.
        text: the prompt.
        features: latent -> a change, such as Clamp(0.0).
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
    live = live_model(model)
    sae.check(live)
    prompt = prompt_ids(sae, live.tokenizer, text)
    if live.max_positions is not None and prompt.shape[1] + n_tokens - 1 > live.max_positions:
        raise ConfigError(
            f"steer: {live.identity['name']} has {live.max_positions} positions, {n_tokens} tokens after a text of "
            f"{prompt.shape[1]} do not fit; take a shorter text or fewer tokens"
        )

    def steered_after(past: Any, token_ids: Tensor) -> tuple[Tensor, Any]:
        with spliced(live, [_splice(live, sae, token_ids, features, keep_error=keep_error)]):
            if sae.reads_sequences:  # no past is kept, so each pass is of the whole text
                return live.logits(token_ids), None
            return live.logits_after(past, token_ids)

    before, after = (
        _continuation(logits_after, prompt, live.tokenizer, n_tokens=n_tokens, temperature=temperature, seed=seed)
        for logits_after in (live.logits_after, steered_after)
    )
    return Steered(prompt=text, before=before, after=after)


def steered_logits(
    model: Model | nn.Module,
    sae: SAE,
    token_ids: Int[Tensor, "sequence position"],
    features: Mapping[int, Change],
    *,
    keep_error: bool = True,
) -> Float[Tensor, "sequence position vocab"]:
    """The model's logits when the latents `features` are changed at every token that is not special.

    See `Splice` for what becomes of the hook's activation.

    Args:
        model: the language model, as `live_model` takes it.
        sae: its latents are changed.
        token_ids: the sequences to run.
        features: latent -> a change, such as Clamp(0.0).
        keep_error: whether the error term is added.

    Raises:
        ConfigError, CacheMismatch, ModelError: as `steer`.
    """
    live = live_model(model)
    with spliced(live, [_splice(live, sae, token_ids, features, keep_error=keep_error)]):
        return live.logits(token_ids)


def _splice(model: Model, sae: SAE, token_ids: Tensor, features: Mapping[int, Change], *, keep_error: bool) -> Splice:
    """The change of the latents at the tokens of a pass that are not special."""
    special_ids = model.tokenizer.all_special_ids if model.tokenizer else []
    special = torch.tensor(special_ids, dtype=torch.long, device=token_ids.device)
    return Splice(sae=sae, features=features, keep_error=keep_error, where=~torch.isin(token_ids, special))


def _continuation(
    logits_after: Callable[[Any, Tensor], tuple[Tensor, Any]],
    prompt: Int64[Tensor, "1 position"],
    tokenizer: Any,
    *,
    n_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The text that the model writes after the prompt."""
    generator, token_ids = torch.Generator().manual_seed(seed), prompt
    past, new = None, prompt
    for _ in range(n_tokens):
        logits, past = logits_after(past, new)
        token_id = _drawn(logits[0, -1], temperature, generator)
        if token_id in tokenizer.all_special_ids:
            break
        token_ids = torch.cat([token_ids, torch.tensor([[token_id]])], dim=1)
        new = token_ids if past is None else token_ids[:, -1:]
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
