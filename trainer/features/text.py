"""What fires on the tokens of a text: the language model runs, and the SAE encodes its activations.

This module also holds what the other readers of a text share: its token ids, the rows of a hook, and checks of widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from actcache.errors import CacheMismatch, ConfigError, ModelError
from actcache.models.live import live_model
from actcache.models.unembedding import Unembedding
from trainer.features.token_strings import token_string
from trainer.sae.sae import SAE

ROWS_AT_ONCE = 128  # tokens encoded at a time, or latents read as logits or compared


@runtime_checkable
class Model(Protocol):
    """What this room needs of a language model. `actcache.models.language_model.LanguageModel` is one."""

    tokenizer: Any
    n_layers: int

    def activations(
        self, token_ids: Int[Tensor, "sequence position"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "sequence position d_in"]]:
        """The activations at `hook_names`."""
        ...

    def unembedding(self) -> Unembedding:
        """The final norm and the output head."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFeatures:
    """A token and its active latents.

    Attributes:
        token_id: the id of the token.
        token: the token as it stands in a text.
        is_special: whether it is BOS, EOS or the like. SAEs are usually not trained on these, so their latents mean
            little there.
        features: (latent, activation) of each active latent, of largest magnitude first.
    """

    token_id: int
    token: str
    is_special: bool
    features: tuple[tuple[int, float], ...]


@torch.no_grad()
def encode_text(sae: SAE, model: Model | nn.Module, text: str) -> tuple[TokenFeatures, ...]:
    """The active latents of every token of a text.

    BOS is the first token if the sequences of the SAE's cache begin with it.

    Args:
        sae: encodes the activations at its hooks.
        model: the language model that the SAE was trained on, as `live_model` takes it.
        text: at least one token long.

    Returns:
        One value for each token, in the order of the text.

    Raises:
        ConfigError: the text has no token.
        CacheMismatch: the model's hook has another width than the SAE takes.
        ModelError: the model lacks the hook, or the text is too long for it.
    """
    live = live_model(model)
    token_ids = prompt_ids(sae, live.tokenizer, text)
    special = set(live.tokenizer.all_special_ids)
    rows = _active(sae, hook_rows(sae, live, token_ids))
    return tuple(
        TokenFeatures(
            token_id=token_id,
            token=token_string(live.tokenizer, token_id),
            is_special=token_id in special,
            features=features,
        )
        for token_id, features in zip(token_ids[0].tolist(), rows, strict=True)
    )


def prompt_ids(sae: SAE, tokenizer: Any, text: str) -> Int64[Tensor, "1 position"]:
    """The token ids of a text. BOS comes first if the sequences of the SAE's cache begin with it.

    Raises:
        ConfigError: the text has no token.
        ModelError: the model has no tokenizer.
    """
    if tokenizer is None:
        raise ModelError(
            f"{sae.hook_name}: a text needs a tokenizer, the model has none; pass live_model(model, tokenizer)"
        )
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos_id = tokenizer.bos_token_id if sae.metadata.get("prepend_bos", True) else None
    if bos_id is not None and ids[:1] != [bos_id]:
        ids = [bos_id, *ids]
    if not ids:
        raise ConfigError(f"{sae.hook_name}: a text must have at least one token, got {text!r}")
    return torch.tensor([ids])


def hook_rows(sae: SAE, model: Model, token_ids: Int[Tensor, "1 position"]) -> Float[Tensor, "position d_in"]:
    """The activations that the SAE takes, on its device.

    Raises CacheMismatch if they have another width, or are of another stream than the SAE's.
    """
    sae.check(model)
    x = model.activations(token_ids, sae.input_hooks)
    rows = torch.cat([x[name][0].to(sae.device) for name in sae.input_hooks], dim=1)
    check_width(sae, rows)
    return rows


def check_width(sae: SAE, x: Float[Tensor, "*row width"]) -> None:
    """Raise CacheMismatch unless x has the width that the SAE takes."""
    if not sae.takes(x.shape[-1]):
        raise CacheMismatch(
            f"{sae.hook_name}: the SAE takes activations of width {sae.d_in}, the model gives {x.shape[-1]}; pass the "
            "model that it was trained on"
        )


def active_by_magnitude(feature_acts: Float[Tensor, " d_sae"]) -> list[int]:
    """The active latents, of largest magnitude first."""
    active = feature_acts.nonzero()[:, 0]
    return active[feature_acts[active].abs().argsort(descending=True, stable=True)].tolist()


def _active(sae: SAE, rows: Float[Tensor, "position d_in"]) -> Iterator[tuple[tuple[int, float], ...]]:
    """(latent, activation) of each row's active latents, of largest magnitude first."""
    for part in rows.split(len(rows) if sae.reads_sequences else ROWS_AT_ONCE):
        for acts in sae.encode(part):
            latents = active_by_magnitude(acts)
            yield tuple(zip(latents, acts[latents].tolist(), strict=True))
