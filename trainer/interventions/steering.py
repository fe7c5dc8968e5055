"""Text that a language model writes while latents of an SAE are changed at its hook."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from actcache.errors import ConfigError
from trainer.features.logit_lens import check_latents, directions
from trainer.features.text import check_width, prompt_ids
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True)
class Scale:
    """The activation times `factor`: 1 changes nothing, nothing changes a latent that is not active."""

    factor: float


@dataclass(frozen=True, slots=True)
class Clamp:
    """The activation is `value` at every token, whatever it was (Templeton et al. 2024); 0 ablates the latent."""

    value: float


@dataclass(frozen=True, slots=True)
class Add:
    """The activation plus `amount` at every token: with the error term kept, x + amount d_i and nothing else."""

    amount: float


Change = Scale | Clamp | Add


@runtime_checkable
class Model(Protocol):
    """What steering needs of a language model; `actcache.models.load.LanguageModel` is one."""

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
        """Logits when the hook's activation is replaced by `replace` of it; `hook_fns` see others in the same pass."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """How the model goes on after the prompt, left alone (`before`) and with the latents changed (`after`)."""

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
    """Let the model go on after `text` twice, without and with the change of `features`, as `steered_logits`.

    The whole context runs through the model for every token, so what was written under the change is read under it too.
    Both continuations draw with the same random numbers; each ends at a special token.

    Args:
        features: latent -> Scale, Clamp or Add.
        n_tokens: tokens to write at most.
        temperature: the logits are divided by it; 0 takes the likeliest token each time.
        keep_error: False puts the SAE's reconstruction in the place of the activation, in `after` alone.

    Raises:
        ConfigError: an argument is out of range, the text has no token or leaves no room for n_tokens, or the SAE is a
            crosscoder.
        CacheMismatch: the model's hook is of another width than the SAE takes.
        ModelError: the model lacks the hook, or has no output head.
    """
    _check_arguments(n_tokens, temperature)
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
    """The model's logits with the latents `features` changed at every token that is not special.

    With f' the changed activations, the hook's activation x becomes decode(f') + error, error = x - decode(f). That is
    x + sum_i (f'_i - f_i) d_i over the changed latents, and so computed: where nothing changes, x keeps every bit.
    Without the error term it becomes decode(f'). A transcoder changes what it predicts. Raises as `steer`.
    """
    check_latents(sae, list(features))
    if len(sae.output_hooks) != 1:
        raise ConfigError(f"steer: {' + '.join(sae.output_hooks)} are several hooks at once; steer with an SAE of one")
    (source,), (target,) = sae.input_hooks, sae.output_hooks
    special = torch.tensor(model.tokenizer.all_special_ids, dtype=torch.long, device=token_ids.device)
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
    """What takes the place of y, the activation that the SAE reconstructs from x."""
    check_width(sae, x)
    feature_acts, x_hat = sae.reconstruct(x.to(sae.device))
    latents = list(features)
    differences = [_difference(features[latent], feature_acts[:, latent]) for latent in latents]
    base = y.to(sae.device) if keep_error else x_hat
    return base + torch.stack(differences, dim=1) @ directions(sae, latents) if latents else base


def _difference(change: Change, acts: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """f' - f."""
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
    """The text that follows the prompt's."""
    generator, token_ids = torch.Generator().manual_seed(seed), prompt
    for _ in range(n_tokens):
        token_id = _drawn(logits(token_ids)[0, -1], temperature, generator)
        if token_id in tokenizer.all_special_ids:
            break
        token_ids = torch.cat([token_ids, torch.tensor([[token_id]])], dim=1)
    # decoded with the prompt: the first token of a text may lose its space, and a character may be of several tokens
    whole, start = (_decoded(tokenizer, ids[0].tolist()) for ids in (token_ids, prompt))
    return whole[len(start) :]


def _drawn(logits: Float[Tensor, " vocab"], temperature: float, generator: torch.Generator) -> int:
    """A token id drawn from softmax(logits / temperature), or the likeliest; on the CPU, in float64."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)  # no overflow, however cold
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check_arguments(n_tokens: int, temperature: float) -> None:
    if n_tokens < 1:
        raise ConfigError(f"steer: must write at least 1 token, got {n_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"steer: temperature must be 0 or a positive number, got {temperature}")
