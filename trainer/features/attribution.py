"""Logit attribution: how much each active latent adds to the logit of a token by the direct path.

The direct path is what a vector in the residual stream does to a logit if no later block reads it. The final norm is
made linear: its gain, and its centring if it is a LayerNorm, are folded into the unembedding, and its scale is frozen.
Logits are relative to their mean over the vocabulary, which a softmax does not see.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from actcache.arguments import typed
from actcache.errors import ConfigError
from actcache.models.live import live_model
from trainer.features.logit_lens import check_stream, directions
from trainer.features.text import Model, active_by_magnitude, check_width, prompt_ids
from trainer.features.token_strings import token_string
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What an active latent adds to a logit by the direct path.

    Attributes:
        latent: the number of the latent.
        activation: its activation at the position.
        logit: what it adds.
    """

    latent: int
    activation: float
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitAttribution:
    """A logit, relative to its mean over the vocabulary, as the sum features + bias + error + rest.

    Attributes:
        token_id: the token whose logit it is.
        token: this token as it stands in a text.
        position: the position of the text that predicts the token after it.
        logit: the whole logit.
        features: what each active latent adds, the largest in magnitude first.
        bias: what b_dec adds, with W_skip x where there is one.
        error: what the SAE's error adds, which is the activation less its reconstruction.
        rest: what everything else in the residual stream and in the head adds.
    """

    token_id: int
    token: str
    position: int
    logit: float
    features: tuple[Contribution, ...]
    bias: float
    error: float
    rest: float

    @property
    def direct(self) -> float:
        """What the activation at the hook adds: features + bias + error."""
        return math.fsum([*(feature.logit for feature in self.features), self.bias, self.error])


@torch.no_grad()
def logit_attribution(
    sae: SAE, model: Model | nn.Module, text: str, position: int, token: str | int
) -> LogitAttribution:
    """What each latent at one position of a text adds, by the direct path, to the logit of `token` as the next token.

    Latent i adds f_i <u, gain * centred(d_i)> / scale, where u is W_U[token] less the mean row of W_U. The final norm's
    scale is frozen at its value at this position. All parts are float64, so their sum differs from the model's logit
    only by the rounding of the model's own pass.

    Args:
        sae: its latents are directions of the residual stream.
        model: the language model of its hook, as `live_model` takes it.
        text: the text that the model reads.
        position: index of a token of the text, with BOS counted as in `encode_text`; negative counts from the end.
        token: a token id, or a text that is exactly one token, with its leading space.

    Returns:
        The logit and its parts.

    Raises:
        ConfigError: there is no such position or token, or the SAE's hooks are not of the residual stream.
        CacheMismatch, ModelError: as `encode_text` and `logit_lens`.
    """
    check_stream(sae, "logit_attribution")
    live = live_model(model)
    token_ids, token_id = prompt_ids(sae, live.tokenizer, text), _token_id(live.tokenizer, token)
    position = _position(position, token_ids.shape[1])
    last = f"blocks.{live.n_layers - 1}.hook_resid_post"
    sae.check(live)
    seen = live.activations(token_ids[:, : position + 1], [*sae.input_hooks, *sae.output_hooks, last])
    before, y, stream = seen[sae.hook_name][0], *(seen[name][0, position] for name in (*sae.output_hooks, last))
    check_width(sae, before)
    unembedding = live.unembedding()
    if token_id >= (n_logits := len(unembedding.W_U)):
        raise ConfigError(
            f"logit_attribution: token must be one token of the model, got {token!r}, which is {token_id}; the model "
            f"has {n_logits} logits"
        )
    v, constant = unembedding.token_direction(token_id)
    stream = stream.double().cpu()
    v = v / unembedding.scale(stream)

    x = (before if sae.reads_sequences else before[-1:]).to(sae.device)
    feature_acts, x_hat = (each[-1] for each in sae.reconstruct(x))
    active = active_by_magnitude(feature_acts)
    scale = sae.output_scale(x[-1:])
    acts, d = feature_acts[active].double().cpu(), directions(sae, active).double().cpu()
    d = d if scale is None else d * scale.double().cpu()
    bias = x_hat.double().cpu() - acts @ d if sae.reads_sequences else _bias(sae, x[0])
    error = y.double().cpu() - acts @ d - bias
    parts = zip(active, acts.tolist(), (acts * (d @ v)).tolist(), strict=True)
    features = [Contribution(latent=i, activation=act, logit=logit) for i, act, logit in parts]
    return LogitAttribution(
        token_id=token_id,
        token=token_string(live.tokenizer, token_id),
        position=position,
        logit=float(stream @ v) + constant,
        features=tuple(sorted(features, key=lambda feature: -abs(feature.logit))),
        bias=float(bias @ v),
        error=float(error @ v),
        rest=float((stream - y.double().cpu()) @ v) + constant,
    )


def _bias(sae: SAE, x: Float[Tensor, " width"]) -> Float64[Tensor, " d_out"]:
    """The part of x_hat that no latent makes: what zeros are decoded to, and W_skip x where there is one."""
    none = sae.decode(sae.W_dec.new_zeros(sae.d_sae), x).double().cpu()
    return none if sae.W_skip is None else none + sae.W_skip.double().cpu() @ sae.seen(x).double().cpu()


def _token_id(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, str):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    else:
        ids = [token] if 0 <= typed("logit_attribution", "token", token, int) < len(tokenizer) else []
    if len(ids) == 1:
        return ids[0]
    pieces = [token_string(tokenizer, i) for i in ids]
    raise ConfigError(f"logit_attribution: token must be one token of the model, got {token!r}, which is {pieces}")


def _position(position: int, n_tokens: int) -> int:
    if not -n_tokens <= typed("logit_attribution", "position", position, int) < n_tokens:
        raise ConfigError(f"logit_attribution: position must be in [-{n_tokens}, {n_tokens}), got {position}")
    return position % n_tokens
