"""A trained SAE for inference: `SAE` encodes, decodes and reconstructs raw activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.sae.activations import matching_pursuit

PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")  # settings of matching_pursuit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SAE:
    """A sparse autoencoder for inference on raw activations, with SAELens' definitions of the architectures.

    h = x W_enc + b_enc, or (x - b_dec) W_enc + b_enc where subtracts_b_dec is set. x_hat = feature_acts W_dec + b_dec.
    Everything is computed in the weights' dtype, on their device.

    feature_acts, by architecture:
        standard          ReLU(h).
        topk              ReLU of the k largest h of a row.
        abstopk           the k entries of a row with the largest |h|, with their signs.
        jumprelu          ReLU(h) where h > threshold, else 0.
        gated             ReLU(exp(r_mag) h + b_mag) where h + b_gate > 0, else 0. h has no b_enc here.
        matching_pursuit  as `activations.matching_pursuit`. W_enc is W_dec transposed. b_dec is added to x_hat only
                          where it is subtracted from x.
        crosscoder        as standard, where x and x_hat are the activations at all hook_names, side by side.

    With rescale_acts_by_decoder_norm, topk and abstopk multiply h by ||d_i|| first, and the decoder divides by it.
    A transcoder is as standard, but x_hat predicts the activation at hook_name_out. jumprelu_transcoder and
    topk_transcoder are as jumprelu and topk in the same way. Where the name holds `skip`, W_skip x is added to x_hat.
    """

    architecture: str
    hook_name: str
    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    hook_name_out: str | None = None
    hook_names: tuple[str, ...] | None = None
    hook_widths: tuple[int, ...] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    b_enc: Float[Tensor, " d_sae"] | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None
    b_mag: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    residual_threshold: float = 0.0
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = False
    subtracts_b_dec: bool
    metadata: Mapping[str, Any]

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations are x, side by side."""
        return self.hook_names or (self.hook_name,)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations x_hat reconstructs, side by side."""
        return self.input_hooks if self.hook_name_out is None else (self.hook_name_out,)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of x_hat."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the weights. x must be there too."""
        return self.W_enc.device

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The feature activations of raw activations x, which may have any float dtype, in the weights' dtype."""
        x = x.to(self.W_enc.dtype)
        centred = x - self.b_dec if self.subtracts_b_dec else x
        if self.architecture == "matching_pursuit":
            return matching_pursuit(centred, self.W_dec, **{name: getattr(self, name) for name in PURSUIT})
        pre_acts = centred @ self.W_enc
        if self.b_gate is not None and self.b_mag is not None and self.r_mag is not None:
            magnitude = centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag  # rounded as SAELens rounds it
            return (pre_acts + self.b_gate > 0) * magnitude.relu()
        if self.b_enc is not None:
            pre_acts = pre_acts + self.b_enc
        if self.rescale_acts_by_decoder_norm:
            pre_acts = pre_acts * self.W_dec.norm(dim=-1)
        if self.k is not None:
            signed = self.architecture == "abstopk"
            top = (pre_acts.abs() if signed else pre_acts).topk(self.k, dim=-1, sorted=False).indices
            active = pre_acts.gather(-1, top)
            return torch.zeros_like(pre_acts).scatter_(-1, top, active if signed else active.relu())
        if self.threshold is not None:
            return pre_acts.relu() * (pre_acts > self.threshold)
        return pre_acts.relu()

    def reconstruct(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_out"]]:
        """(feature_acts, x_hat) of raw activations, in the weights' dtype."""
        feature_acts = self.encode(x)
        x_hat = self.decode(feature_acts)
        return feature_acts, x_hat if self.W_skip is None else x_hat + x.to(self.W_skip.dtype) @ self.W_skip.T

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """x_hat from the feature activations, in the weights' dtype. W_skip x, if there is one, is not part of it."""
        if self.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self.W_dec.norm(dim=-1))
        x_hat = feature_acts @ self.W_dec
        has_bias = self.subtracts_b_dec or self.architecture != "matching_pursuit"
        return x_hat + self.b_dec if has_bias else x_hat
