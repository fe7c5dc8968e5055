"""What single latents do: on the tokens of a text, to the logits, and beside the latents of another SAE.

What is said of logits is about the direct path: what a vector that is added to the residual stream does to them if
nothing in between reads it. The final norm is made linear: its gain is folded into the unembedding, with its centring
where it is a LayerNorm, and its scale is frozen. Logits are relative to their mean over the vocabulary, which the
softmax does not see.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from actcache.errors import ConfigError
from trainer.features.logit_lens import check_stream, directions
from trainer.features.text import Model, active_by_magnitude, check_width, prompt_ids
from trainer.features.token_strings import token_string
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What an active latent adds to a logit by the direct path."""

    latent: int
    activation: float
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitAttribution:
    """A logit, relative to its mean over the vocabulary, as a sum: features + bias + error + rest.

    position: of the token after which the logit predicts. features: of the active latents, the largest part in
    magnitude first. bias: of b_dec, and of W_skip x where there is one. error: of what the SAE leaves unexplained.
    rest: of everything else that the stream and the head hold.
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
def logit_attribution(sae: SAE, model: Model, text: str, position: int, token: str | int) -> LogitAttribution:
    """What the SAE's latents at one position of a text add to the logit of `token` as the next, by the direct path.

    Contribution i is f_i <W_U[token] less the mean row, gain * centred(d_i)> / scale, the final norm's scale frozen at
    what it is there. All in float64, so that the parts sum to the logit but for the rounding of the model's own pass.

    Args:
        position: index of a token of the text, BOS included as in `encode_text`; negative from the end.
        token: the id, or a text that is one token, with its leading space.

    Raises:
        ConfigError: the position or the token is not one, or the SAE's hooks are not of the residual stream.
        CacheMismatch, ModelError: as `encode_text` and `logit_lens`.
    """
    check_stream(sae, "logit_attribution")
    token_ids, token_id = prompt_ids(sae, model.tokenizer, text), _token_id(model.tokenizer, token)
    position = _position(position, token_ids.shape[1])
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    seen = model.activations(token_ids[:, : position + 1], [*sae.input_hooks, *sae.output_hooks, last])
    x, y, stream = (seen[name][0, position] for name in (sae.hook_name, *sae.output_hooks, last))
    check_width(sae, x[None])
    unembedding = model.unembedding()
    v, constant = unembedding.token_direction(token_id)
    stream = stream.double().cpu()
    v = v / unembedding.scale(stream)

    feature_acts = sae.encode(x[None].to(sae.device))[0]
    active = active_by_magnitude(feature_acts)
    acts, d = feature_acts[active].double().cpu(), directions(sae, active).double().cpu()
    bias = _bias(sae, x)
    error = y.double().cpu() - acts @ d - bias
    parts = zip(active, acts.tolist(), (acts * (d @ v)).tolist(), strict=True)
    features = [Contribution(latent=i, activation=act, logit=logit) for i, act, logit in parts]
    return LogitAttribution(
        token_id=token_id,
        token=token_string(model.tokenizer, token_id),
        position=position,
        logit=float(stream @ v) + constant,
        features=tuple(sorted(features, key=lambda feature: -abs(feature.logit))),
        bias=float(bias @ v),
        error=float(error @ v),
        rest=float((stream - y.double().cpu()) @ v) + constant,
    )


# What steering needs too


def _bias(sae: SAE, x: Float[Tensor, " d_in"]) -> Float64[Tensor, " d_out"]:
    """What of x_hat is of no latent: b_dec, and W_skip x where there is one."""
    b_dec = sae.b_dec.double().cpu()
    return b_dec if sae.W_skip is None else b_dec + sae.W_skip.double().cpu() @ x.double().cpu()


def _token_id(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        ids = [token] if 0 <= token < len(tokenizer) else []
    else:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    pieces = [token_string(tokenizer, i) for i in ids]
    raise ConfigError(f"logit_attribution: token must be one token of the model, got {token!r}, which is {pieces}")


def _position(position: int, n_tokens: int) -> int:
    if not -n_tokens <= position < n_tokens:
        raise ConfigError(f"logit_attribution: position must be in [-{n_tokens}, {n_tokens}), got {position}")
    return position % n_tokens
