"""A trained SAE for inference: `SAE` encodes, decodes and reconstructs raw activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.sae.activations import matching_pursuit

PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")  # settings of matching_pursuit
RESCALED = ("topk", "abstopk")  # their cfg has rescale_acts_by_decoder_norm
RANKED = (*RESCALED, "topk_transcoder", "topk_skip_transcoder")  # their cfg has k


def is_transcoder(architecture: str) -> bool:
    """Whether SAEs of this architecture predict the activation at another hook, hook_name_out."""
    return architecture.endswith("transcoder")


class SAE(nn.Module):
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

    It is a torch module. Its parameters are the tensors that SAELens saves, by the same names; they have no gradients
    before `requires_grad_()`. x may have any number of axes before d_in, as prompts [batch, position, d_in] have.
    """

    W_enc: nn.Parameter  # [d_in, d_sae]
    W_dec: nn.Parameter  # [d_sae, d_out]
    b_dec: nn.Parameter  # [d_out]
    b_enc: nn.Parameter | None  # [d_sae], as the four below
    threshold: nn.Parameter | None
    b_gate: nn.Parameter | None
    b_mag: nn.Parameter | None
    r_mag: nn.Parameter | None
    W_skip: nn.Parameter | None  # [d_out, d_in]

    def __init__(
        self,
        *,
        architecture: str,
        hook_name: str,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        W_enc: Float[Tensor, "d_in d_sae"] | None = None,
        hook_name_out: str | None = None,
        hook_names: tuple[str, ...] | None = None,
        hook_widths: tuple[int, ...] | None = None,
        W_skip: Float[Tensor, "d_out d_in"] | None = None,
        b_enc: Float[Tensor, " d_sae"] | None = None,
        threshold: Float[Tensor, " d_sae"] | None = None,
        b_gate: Float[Tensor, " d_sae"] | None = None,
        b_mag: Float[Tensor, " d_sae"] | None = None,
        r_mag: Float[Tensor, " d_sae"] | None = None,
        k: int | None = None,
        rescale_acts_by_decoder_norm: bool = False,
        residual_threshold: float = 0.0,
        max_iterations: int | None = None,
        stop_on_duplicate_support: bool = False,
        subtracts_b_dec: bool,
        metadata: Mapping[str, Any],
    ):
        """Make an SAE of tensors and settings, as the class describes them. The tensors are not copied.

        Args:
            W_enc: left out for matching_pursuit alone.
            hook_widths: d_in of each of hook_names.
            metadata: what else is known of the SAE, by SAELens' names: model_name, context_size, ...
        """
        super().__init__()
        self.architecture, self.metadata = architecture, metadata
        self.hook_name, self.hook_name_out = hook_name, hook_name_out
        self.hook_names, self.hook_widths = hook_names, hook_widths
        self.k, self.rescale_acts_by_decoder_norm = k, rescale_acts_by_decoder_norm
        self.residual_threshold, self.max_iterations = residual_threshold, max_iterations
        self.stop_on_duplicate_support = stop_on_duplicate_support
        self.subtracts_b_dec = subtracts_b_dec
        weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        weights |= {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag, "W_skip": W_skip}
        for name, weight in weights.items():
            held = None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
            self.register_parameter(name, held)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self.W_dec.T if found is None and name == "W_enc" else found

    @property
    def cfg(self) -> SAECfg:
        """The settings by SAELens' names, as of now. A change of it changes nothing here."""
        hook_out = {} if self.hook_name_out is None else {"hook_name_out": self.hook_name_out}
        cfg: dict[str, Any] = {
            "architecture": ArchitectureName(self.architecture),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "apply_b_dec_to_input": self.subtracts_b_dec,
            "normalize_activations": "none",
            # the activation of hook_z is [..., head, d_head]; SAELens flattens it only if it is told to
            "reshape_activations": "hook_z" if self.hook_name.endswith("hook_z") and not hook_out else "none",
            "metadata": SAEMetadata({**self.metadata, "hook_name": self.hook_name, **hook_out}),
        }
        if self.architecture in RANKED:
            cfg |= {"k": self.k}
        if self.architecture in RESCALED:
            cfg |= {"rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}
        if self.architecture == "matching_pursuit":
            cfg |= {name: getattr(self, name) for name in PURSUIT}
        if is_transcoder(self.architecture):
            cfg |= {"d_out": self.d_out}
        if self.hook_names is not None:
            cfg |= {"hook_names": list(self.hook_names), "hook_widths": list(self.hook_widths or ())}
        return SAECfg(cfg)

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
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights. x must be there too."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything is computed."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The feature activations of raw activations x, which may have any float dtype, in the weights' dtype."""
        x = x.to(self.dtype)
        centred = x - self.b_dec if self.subtracts_b_dec else x
        if self.architecture == "matching_pursuit":
            settings = {name: getattr(self, name) for name in PURSUIT}
            feature_acts = matching_pursuit(centred.reshape(-1, self.d_in), self.W_dec, **settings)
            return feature_acts.reshape(*x.shape[:-1], self.d_sae)
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

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """x_hat from the feature activations, in the weights' dtype. W_skip x, if there is one, is not part of it."""
        if self.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self.W_dec.norm(dim=-1))
        x_hat = feature_acts @ self.W_dec
        has_bias = self.subtracts_b_dec or self.architecture != "matching_pursuit"
        return x_hat + self.b_dec if has_bias else x_hat

    def reconstruct(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_out"]]:
        """(feature_acts, x_hat) of raw activations, in the weights' dtype."""
        feature_acts = self.encode(x)
        x_hat = self.decode(feature_acts)
        return feature_acts, x_hat if self.W_skip is None else x_hat + x.to(self.W_skip.dtype) @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x_hat of raw activations, in the weights' dtype."""
        return self.reconstruct(x)[1]

    def __repr__(self) -> str:
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        hooks = {"hook_name": " + ".join(self.input_hooks), "hook_name_out": self.hook_name_out}
        where = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        said = {"architecture": self.architecture, **sizes, **hooks, **where}
        return f"SAE({', '.join(f'{name}={value}' for name, value in said.items() if value is not None)})"


class SAECfg(dict[str, Any]):
    """An SAE's settings by SAELens' names. Keys are attributes too, and so are those of `metadata`.

    Versions of SAELens before 6 had the hook and the model among the settings, and later ones have them in `metadata`.
    """

    __slots__ = ()

    def __missing__(self, key: str) -> Any:
        return self.get("metadata", {})[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = ", ".join((*self, *self.get("metadata", {})))
            raise AttributeError(f"SAE.cfg: has {known}, got {name}; take one of these") from None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and texts."""
        return {**self, "architecture": str(self["architecture"]), "metadata": self["metadata"].to_dict()}


class SAEMetadata(dict[str, Any]):
    """What is known of an SAE beside its settings. Keys are attributes too. As in SAELens, an unknown one is None."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for methods
            raise AttributeError(name)
        return self.get(name)

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict."""
        return dict(self)


class ArchitectureName(str):
    """The name of an architecture. Calling it gives the name too: SAELens 6 has a method where 5 had a text."""

    __slots__ = ()

    def __call__(self) -> str:
        return str(self)
