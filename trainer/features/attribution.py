"""What single latents do: on the tokens of a text, to the logits, and beside the latents of another SAE.

What is said of logits is about the direct path: what a vector that is added to the residual stream does to them if
nothing in between reads it. The final norm is made linear: its gain is folded into the unembedding, with its centring
where it is a LayerNorm, and its scale is frozen. Logits are relative to their mean over the vocabulary, which the
softmax does not see.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from actcache.errors import CacheMismatch, ConfigError
from actcache.models.unembedding import Unembedding
from trainer.formats.saelens import SAE

STREAM_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
ROWS_AT_ONCE = 128  # tokens encoded, latents read as logits, latents compared
VOCAB_AT_ONCE = 16_384  # rows of W_U in float32 at a time


@runtime_checkable
class Model(Protocol):
    """What analysis needs of a language model; `actcache.models.load.LanguageModel` is one."""

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
    """The active latents of one token: (latent, activation), of largest magnitude first.

    is_special: BOS and the like, which an SAE is not trained on unless asked: its latents there mean little.
    """

    token_id: int
    token: str
    is_special: bool
    features: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogit:
    """A token and what a direction does to its logit."""

    token_id: int
    token: str
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLens:
    """The tokens whose logits a latent raises most, and those it lowers most; the most changed first."""

    latent: int
    promoted: tuple[TokenLogit, ...]
    suppressed: tuple[TokenLogit, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimilarFeatures:
    """For some latents of one SAE those of another with the nearest decoder directions, and the cosines; nearest first.

    On the CPU.
    """

    latents: Int64[Tensor, "latent n"]
    cosines: Float[Tensor, "latent n"]


@torch.no_grad()
def encode_text(sae: SAE, model: Model, text: str) -> tuple[TokenFeatures, ...]:
    """The active latents of every token of a text, BOS first where the SAE's cache begins sequences with it.

    Raises:
        ConfigError: the text has no token.
        CacheMismatch: the model's hook is of another width than the SAE takes.
        ModelError: the model lacks the hook, or takes no text as long.
    """
    token_ids = prompt_ids(sae, model.tokenizer, text)
    special = set(model.tokenizer.all_special_ids)
    rows = _active(sae, hook_rows(sae, model, token_ids))
    return tuple(
        TokenFeatures(
            token_id=token_id,
            token=token_string(model.tokenizer, token_id),
            is_special=token_id in special,
            features=features,
        )
        for token_id, features in zip(token_ids[0].tolist(), rows, strict=True)
    )


@torch.no_grad()
def logit_lens(sae: SAE, model: Model, latents: Sequence[int], n: int = 10) -> tuple[LogitLens, ...]:
    """The `n` tokens that each of `latents` promotes and suppresses most, in the order given.

    The logit lens (nostalgebraist 2020) of decoder directions, as `lens_logits`. Tokens that the tokenizer does not
    know (padding of the vocabulary) are left out.

    Raises:
        ConfigError: a latent or n is out of range, or the SAE's hook is not of the residual stream.
        ModelError: the model has no output head, or no LayerNorm or RMSNorm before it.
    """
    n_tokens = len(model.tokenizer)
    if not 1 <= n <= n_tokens:
        raise ConfigError(f"logit_lens: n must be in [1, {n_tokens}], got {n}")
    check_latents(sae, latents)
    _check_stream(sae, "logit_lens")
    unembedding = model.unembedding()
    lenses: list[LogitLens] = []
    for part in _parts(latents):
        logits = _lens_logits(unembedding, directions(sae, part))[:, :n_tokens]
        ends = [_extremes(model.tokenizer, logits, n, largest=largest) for largest in (True, False)]
        lenses += [LogitLens(latent=i, promoted=p, suppressed=s) for i, p, s in zip(part, *ends, strict=True)]
    return tuple(lenses)


@torch.no_grad()
def lens_logits(sae: SAE, model: Model, latents: Sequence[int]) -> Float[Tensor, "latent vocab"]:
    """What one unit of activation of each latent adds to every logit by the direct path, times the final norm's scale.

    W_U (gain * centred(d_i)), less its mean over the vocabulary, in float32 (float64 for a float64 model) on the device
    of W_U: the norm's gain is folded and its scale, which depends on the text, left out. Raises as `logit_lens`.
    """
    check_latents(sae, latents)
    _check_stream(sae, "logit_lens")
    return _lens_logits(model.unembedding(), directions(sae, latents))


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
    _check_stream(sae, "logit_attribution")
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
    active = _by_magnitude(feature_acts)
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


@torch.no_grad()
def similar_features(a: SAE, b: SAE, n: int = 1, *, latents: Sequence[int] | None = None) -> SimilarFeatures:
    """For each of `latents` of `a` (all if None) the `n` of `b` whose decoder rows have the largest cosine with it.

    One pass over those rows of `a`, 128 at a time, against all of `b`: two matrices [128, d_sae of b] and one copy of
    b's decoder are in memory. A row of zeros has cosine 0 with every other.

    Raises:
        CacheMismatch: the decoders are of different widths.
        ConfigError: n is outside [1, d_sae of b], or a latent is not one of `a`.
    """
    chosen = range(a.d_sae) if latents is None else latents
    check_latents(a, chosen)
    if a.d_out != b.d_out:
        raise CacheMismatch(
            f"similar: both SAEs must reconstruct activations of one width, got {a.d_out} and {b.d_out}; compare SAEs "
            "of one hook"
        )
    if not 1 <= n <= b.d_sae:
        raise ConfigError(f"similar: n must be in [1, d_sae={b.d_sae}], got {n}")
    others = _unit_rows(b.W_dec.to(a.device)).T
    tops = [(_unit_rows(a.W_dec[list(part)]) @ others).topk(n) for part in _parts(chosen)]
    return SimilarFeatures(
        latents=torch.cat([top.indices for top in tops]).cpu(), cosines=torch.cat([top.values for top in tops]).cpu()
    )


def stability(saes: Sequence[SAE]) -> Float[Tensor, " d_sae"]:
    """For each latent of the first SAE the mean over the others of its largest cosine with a latent of theirs.

    The max cosine similarity across seeds; its mean over latents is the MMCS of Sharkey et al. 2022 ("Taking features
    out of superposition with sparse autoencoders"). 1 is found in every SAE; random directions reach about
    sqrt(2 ln(d_sae) / d_in).

    Raises:
        ConfigError: there are fewer than two SAEs.
        CacheMismatch: they are not of one width.
    """
    if len(saes) < 2:
        raise ConfigError(f"stability: needs SAEs of at least two seeds, got {len(saes)}")
    first, *others = saes
    return torch.stack([similar_features(first, other).cosines[:, 0] for other in others]).mean(0)


# What steering needs too


def prompt_ids(sae: SAE, tokenizer: Any, text: str) -> Int64[Tensor, "1 position"]:
    """Token ids of a text as the SAE's cache had them: BOS comes first where its sequences begin with BOS.

    Raises:
        ConfigError: there is no token.
    """
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos_id = tokenizer.bos_token_id if sae.metadata.get("prepend_bos", True) else None
    if bos_id is not None and ids[:1] != [bos_id]:
        ids = [bos_id, *ids]
    if not ids:
        raise ConfigError(f"{sae.hook_name}: a text must have at least one token, got {text!r}")
    return torch.tensor([ids])


def hook_rows(sae: SAE, model: Model, token_ids: Int[Tensor, "1 position"]) -> Float[Tensor, "position d_in"]:
    """The activations that the SAE takes, on its device. Raises CacheMismatch if they are of another width."""
    x = model.activations(token_ids, sae.input_hooks)
    rows = torch.cat([x[name][0].to(sae.device) for name in sae.input_hooks], dim=1)
    check_width(sae, rows)
    return rows


def directions(sae: SAE, latents: Sequence[int]) -> Float[Tensor, "latent d_out"]:
    """What one unit of activation of each latent adds to x_hat: its decoder row, of norm 1 where the SAE rescales."""
    rows = sae.W_dec[list(latents)]
    return rows * (1 / rows.norm(dim=-1, keepdim=True)) if sae.rescale_acts_by_decoder_norm else rows


def check_latents(sae: SAE, latents: Sequence[int]) -> None:
    """Raise ConfigError for a latent that the SAE does not have."""
    wrong = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if wrong:
        raise ConfigError(f"{sae.hook_name}: a feature must be in [0, d_sae={sae.d_sae}), got {wrong[0]}")


def check_width(sae: SAE, x: Float[Tensor, "row width"]) -> None:
    """Raise CacheMismatch unless x is as wide as the SAE takes it."""
    if x.shape[1] != sae.d_in:
        raise CacheMismatch(
            f"{sae.hook_name}: the SAE takes activations of width {sae.d_in}, the model gives {x.shape[1]}; pass the "
            "model that it was trained on"
        )


def token_string(tokenizer: Any, token_id: int) -> str:
    """A token as it stands in a text, with its leading space; U+FFFD for a piece of a character."""
    text = tokenizer.decode([token_id])
    # a tokenizer of the SentencePiece kind takes the space of a first token for its own mark
    marked = str(tokenizer.convert_ids_to_tokens(token_id)).startswith("▁")
    return f" {text}" if marked and not text.startswith(" ") else text


def _parts(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(latents), ROWS_AT_ONCE):
        yield latents[first : first + ROWS_AT_ONCE]


def _active(sae: SAE, rows: Float[Tensor, "position d_in"]) -> Iterator[tuple[tuple[int, float], ...]]:
    """(latent, activation) of each row's active latents, of largest magnitude first."""
    for part in rows.split(ROWS_AT_ONCE):
        for acts in sae.encode(part):
            latents = _by_magnitude(acts)
            yield tuple(zip(latents, acts[latents].tolist(), strict=True))


def _by_magnitude(feature_acts: Float[Tensor, " d_sae"]) -> list[int]:
    """The active latents, of largest magnitude first."""
    active = feature_acts.nonzero()[:, 0]
    return active[feature_acts[active].abs().argsort(descending=True, stable=True)].tolist()


def _lens_logits(unembedding: Unembedding, d: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent vocab"]:
    W_U = unembedding.W_U
    dtype = torch.promote_types(W_U.dtype, torch.float32)
    rows = (unembedding.centred(d.double().cpu()) * unembedding.gain).to(W_U.device, dtype)
    logits = torch.cat([rows @ part.to(dtype).T for part in W_U.split(VOCAB_AT_ONCE)], dim=1)
    return logits - logits.mean(1, keepdim=True)


def _extremes(
    tokenizer: Any, logits: Float[Tensor, "latent vocab"], n: int, *, largest: bool
) -> list[tuple[TokenLogit, ...]]:
    """The n tokens of largest, or of smallest, logits for each latent."""
    top = logits.topk(n, largest=largest)
    return [
        tuple(
            TokenLogit(token_id=token_id, token=token_string(tokenizer, token_id), logit=logit)
            for token_id, logit in zip(ids, values, strict=True)
        )
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _bias(sae: SAE, x: Float[Tensor, " d_in"]) -> Float64[Tensor, " d_out"]:
    """What of x_hat is of no latent: b_dec, and W_skip x where there is one."""
    b_dec = sae.b_dec.double().cpu()
    return b_dec if sae.W_skip is None else b_dec + sae.W_skip.double().cpu() @ x.double().cpu()


def _unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
    return torch.nn.functional.normalize(W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)), dim=1)


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


def _check_stream(sae: SAE, who: str) -> None:
    """Raise ConfigError for an SAE whose latents are not directions of the residual stream."""
    if len(sae.output_hooks) != 1 or not sae.output_hooks[0].endswith(STREAM_SITES):
        raise ConfigError(
            f"{who}: x_hat must be at one of {', '.join(STREAM_SITES)}, whose vectors are those of the residual "
            f"stream; got {' + '.join(sae.output_hooks)}"
        )
