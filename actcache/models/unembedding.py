"""The final norm and the output head of a language model as numbers, by which a direction is read as logits."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from actcache.errors import ModelError

# LARGE^2 is far above every eps in use, and SMALL^2 is near it; both numbers are exact in every dtype
LARGE, SMALL = 2.0**13, 2.0**-9
VOCAB_AT_ONCE = 4096  # rows of W_U of which a copy in float64 is made at a time
ROUNDINGS = 32  # within one norm: of the model's dtype, or of float32 if that is coarser


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unembedding:
    """Final norm and output head: logits = W_U (gain * centred(x) / scale(x) + bias) + b_U.

    x is the residual stream after the last block. Whatever a family does to its logits afterwards is left out; Gemma 2
    caps them. W_U and b_U are the model's own, in its dtype and on its device. gain and bias are float64 on the CPU.

    b_U: None if the head has no bias. is_centred: True for LayerNorm, False for RMSNorm, whose bias is 0.
    """

    W_U: Float[Tensor, "vocab d_model"]
    b_U: Float[Tensor, " vocab"] | None
    gain: Float64[Tensor, " d_model"]
    bias: Float64[Tensor, " d_model"]
    eps: float
    is_centred: bool

    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x minus its mean over d_model if the norm subtracts the mean, else x."""
        return x - x.mean(-1, keepdim=True) if self.is_centred else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The number that the norm divides by: sqrt(mean(centred(x)^2) + eps)."""
        return (self.centred(x).square().mean(-1) + self.eps).sqrt()

    def token_direction(self, token_id: int) -> tuple[Float64[Tensor, " d_model"], float]:
        """(v, c) such that <v, x> / scale(x) + c is the token's logit minus the mean logit of the whole vocabulary.

        The mean is subtracted because the softmax does not depend on it. v is float64 on the CPU.
        """
        copied = self.W_U.new_empty((VOCAB_AT_ONCE, self.W_U.shape[1]), dtype=torch.float64)  # one, for all parts
        total = copied.new_zeros(self.W_U.shape[1])
        for part in self.W_U.split(VOCAB_AT_ONCE):
            total += copied[: len(part)].copy_(part).sum(0)
        w = (self.W_U[token_id].double() - total / len(self.W_U)).cpu()
        b = 0.0 if self.b_U is None else float(self.b_U[token_id].double() - self.b_U.mean(dtype=torch.float64))
        return self.centred(self.gain * w), float(w @ self.bias) + b


def norm_probes(d_model: int) -> Float[Tensor, "probe d_model"]:
    """The rows that measure a norm: all 0; alternating +-LARGE; all 1; alternating +-SMALL; small whole numbers."""
    channel = torch.arange(d_model)
    turns = (1 - 2 * (channel % 2)).float()
    return torch.stack([0 * turns, LARGE * turns, turns.abs(), SMALL * turns, (7 * channel % 17 - 8).float()])


def measured_unembedding(
    normed: Float[Tensor, "probe d_model"],
    W_U: Float[Tensor, "vocab d_model"],
    b_U: Float[Tensor, " vocab"] | None,
    name: str | None,
) -> Unembedding:
    """The numbers of a norm, computed from its outputs for the rows of `norm_probes`.

    The row of zeros gives the bias. The large alternating row gives the gain, and the small one gives eps. For the
    constant row the output is the bias alone if the norm subtracts the mean. The last row is a test: these numbers must
    predict its output. The gain errs by a rounding of gain + bias in the model's dtype.

    Args:
        normed: the norm's output for each row of `norm_probes`.
        W_U: the weight of the output head.
        b_U: its bias, if it has one.
        name: the model's name, for messages.

    Raises:
        ModelError: the last row is not as predicted, so the norm is neither a LayerNorm nor an RMSNorm.
    """
    probes = norm_probes(normed.shape[1]).double()
    bias, large, constant, small, last = normed.detach().double().cpu()
    ratio = ((small - bias) @ (large - bias) / (large - bias).square().sum()).square()
    # ratio = SMALL^2 / (SMALL^2 + eps) over LARGE^2 / (LARGE^2 + eps), solved for eps
    eps = float((SMALL**2 * (1 - ratio) / (ratio - (SMALL / LARGE) ** 2)).clamp_min(0))
    gain = (large - bias) * probes[1].sign() * math.sqrt(1 + eps / LARGE**2)
    unembedding = Unembedding(
        W_U=W_U,
        b_U=b_U,
        gain=gain,
        bias=bias,
        eps=eps,
        is_centred=bool((constant - bias).norm() < gain.norm() / 2),
    )
    predicted = gain * unembedding.centred(probes[4]) / unembedding.scale(probes[4])
    rounding = ROUNDINGS * max(torch.finfo(normed.dtype).eps, torch.finfo(torch.float32).eps)
    if not (predicted + bias - last).norm() <= rounding * (predicted.norm() + bias.norm()):
        raise ModelError(
            f"{name}: between the last block and the output head there must be one LayerNorm or RMSNorm, there is "
            "something else; directions of this model cannot be read as logits"
        )
    return unembedding
