"""The logit lens of a latent: which tokens its decoder direction promotes and suppresses.

This module also holds what other readers of decoder directions share: the directions, and checks of latents and hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actcache.arguments import typed
from actcache.errors import ConfigError
from actcache.models.live import live_model
from actcache.models.unembedding import Unembedding
from trainer.features.text import ROWS_AT_ONCE, Model
from trainer.features.token_strings import token_string
from trainer.sae.sae import SAE

STREAM_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
VOCAB_AT_ONCE = 16_384  # rows of W_U that are float32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogit:
    """A token, and what one unit of a latent's activation adds to its logit, times the final norm's scale."""

    token_id: int
    token: str
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLens:
    """The tokens whose logits a latent raises most, and those that it lowers most, the most changed first."""

    latent: int
    promoted: tuple[TokenLogit, ...]
    suppressed: tuple[TokenLogit, ...]


@torch.no_grad()
def logit_lens(sae: SAE, model: Model | nn.Module, latents: Sequence[int], n: int = 10) -> tuple[LogitLens, ...]:
    """The `n` tokens that each of `latents` promotes most, and those that it suppresses most.

    It is the logit lens (nostalgebraist 2020) of decoder directions. The logits are W_U (gain * centred(d_i)), less
    their mean over the vocabulary: what one unit of activation adds by the direct path, times the final norm's scale.
    The norm's gain is folded in. Its scale depends on the text and is left out. The logits are float32, or float64 for
    a float64 model. Tokens that the tokenizer does not know, which pad the vocabulary, are left out.

    Args:
        sae: its latents are directions of the residual stream.
        model: the language model of its hook, as `live_model` takes it.
        latents: which latents to read.
        n: how many tokens at either end.

    Returns:
        One value for each of `latents`, in their order.

    Raises:
        ConfigError: a latent or n is out of range, or the SAE's hook is not of the residual stream.
        ModelError: the model has no output head, or no LayerNorm or RMSNorm before it.
    """
    check_latents(sae, latents)
    check_stream(sae, "logit_lens")
    live = live_model(model)
    unembedding = live.unembedding()
    n_logits = len(unembedding.W_U)
    n_tokens = n_logits if live.tokenizer is None else min(len(live.tokenizer), n_logits)
    if not 1 <= typed("logit_lens", "n", n, int) <= n_tokens:
        raise ConfigError(f"logit_lens: n must be in [1, {n_tokens}], got {n}")
    lenses: list[LogitLens] = []
    for part in in_parts(latents):
        logits = _lens_logits(unembedding, directions(sae, part))[:, :n_tokens]
        ends = [_extremes(live.tokenizer, logits, n, largest=largest) for largest in (True, False)]
        lenses += [LogitLens(latent=i, promoted=p, suppressed=s) for i, p, s in zip(part, *ends, strict=True)]
    return tuple(lenses)


def directions(sae: SAE, latents: Sequence[int] | None) -> Float[Tensor, "latent d_out"]:
    """What one unit of activation of each latent adds to x_hat, in normalised units if the SAE normalises each row.

    That is its decoder row. Where the SAE rescales activations by the decoder norm, it is the row at norm 1. None for
    all latents.
    """
    rows = sae.W_dec if latents is None else sae.W_dec[list(latents)]
    return rows * (1 / rows.norm(dim=-1, keepdim=True)) if sae.rescale_acts_by_decoder_norm else rows


def check_latents(sae: SAE, latents: Sequence[int]) -> None:
    """Raise ConfigError for a latent that the SAE does not have."""
    wrong = [latent for latent in latents if not 0 <= typed(sae.hook_name, "a feature", latent, int) < sae.d_sae]
    if wrong:
        raise ConfigError(f"{sae.hook_name}: a feature must be in [0, d_sae={sae.d_sae}), got {wrong[0]}")


def in_parts(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    """The latents, ROWS_AT_ONCE at a time."""
    for first in range(0, len(latents), ROWS_AT_ONCE):
        yield latents[first : first + ROWS_AT_ONCE]


def check_stream(sae: SAE, who: str) -> None:
    """Raise ConfigError for an SAE whose latents are not directions of the residual stream."""
    if len(sae.output_hooks) != 1 or not sae.output_hooks[0].endswith(STREAM_SITES):
        raise ConfigError(
            f"{who}: x_hat must be at one of {', '.join(STREAM_SITES)}, whose vectors are those of the residual "
            f"stream; got {' + '.join(sae.output_hooks)}"
        )


def _lens_logits(unembedding: Unembedding, d: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent vocab"]:
    """What the directions add to every logit, as `logit_lens` defines it, on the device of W_U."""
    W_U = unembedding.W_U
    dtype = torch.promote_types(W_U.dtype, torch.float32)
    rows = (unembedding.centred(d.double().cpu()) * unembedding.gain).to(W_U.device, dtype)
    logits = torch.cat([rows @ part.to(dtype).T for part in W_U.split(VOCAB_AT_ONCE)], dim=1)
    return logits - logits.mean(1, keepdim=True)


def _extremes(
    tokenizer: Any, logits: Float[Tensor, "latent vocab"], n: int, *, largest: bool
) -> list[tuple[TokenLogit, ...]]:
    """For each latent the n tokens with the largest logits, or with the smallest."""
    top = logits.topk(n, largest=largest)
    return [
        tuple(
            TokenLogit(token_id=token_id, token=token_string(tokenizer, token_id), logit=logit)
            for token_id, logit in zip(ids, values, strict=True)
        )
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
