"""Temporal SAEs (Lubana et al. 2025, arXiv:2511.01836) as SAELens runs them: what attention predicts, what is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.sae.normalisation import Normalised
from trainer.sae.sae import SAE

EPS = 1e-6  # added to the norm of a prediction
SCALAR = "constant_scalar_rescale"  # a normalisation that only these SAEs have: x times one number
PROJECTIONS = ("k_ctx", "q_target", "v_ctx", "c_proj")
OWN_SETTINGS = ("n_heads", "bottleneck_factor", "sae_diff_type", "kval_topk", "activation_normalization_factor")


class TemporalSAE(SAE):
    """An SAE that reads whole sequences, [*batch, position, d_in], and attends to the positions before each.

    Each attention layer predicts codes from earlier positions. What they make of x is subtracted from it. The latents
    encode what is left, with z = ReLU(lambda x W_enc), lambda = 1 / (4 d_in), of which the k largest are kept if
    sae_diff_type is "topk". x_hat stands for both parts. `encode` gives the new codes alone, and `decode` decodes them
    alone; `reconstruct` and `forward` add the prediction.
    """

    reads_sequences = True

    def __init__(
        self,
        *,
        attn_layers: list[dict[str, Tensor]],
        n_heads: int,
        bottleneck_factor: int,
        sae_diff_type: str,
        kval_topk: int | None,
        activation_normalization_factor: float,
        **known: Any,
    ):
        """Make one of tensors and settings, by SAELens' names.

        Args:
            attn_layers: of each layer "k_ctx.weight", "k_ctx.bias" and so on, of PROJECTIONS.
            n_heads: of each layer.
            bottleneck_factor: d_sae over the width of keys and queries.
            sae_diff_type: "relu" or "topk".
            kval_topk: k; None keeps all.
            activation_normalization_factor: for normalize_activations "constant_scalar_rescale".
            known: as `SAE`. Without W_enc the encoder is W_dec transposed.
        """
        super().__init__(**known)
        self.n_heads, self.bottleneck_factor = n_heads, bottleneck_factor
        self.sae_diff_type, self.kval_topk = sae_diff_type, kval_topk
        self.activation_normalization_factor = activation_normalization_factor
        self.tied_weights = known.get("W_enc") is None
        self.attn_layers = nn.ModuleList(nn.ModuleDict({n: _linear(t, n) for n in PROJECTIONS}) for t in attn_layers)

    @property
    def _own_cfg(self) -> dict[str, Any]:
        """The settings that only these SAEs have, by SAELens' names."""
        own = {name: getattr(self, name) for name in (*OWN_SETTINGS, "tied_weights")}
        return {**own, "n_attn_layers": len(self.attn_layers)}

    def codes(self, x: Float[Tensor, "*batch position width"]) -> tuple[Tensor, Tensor]:
        """(new codes, predicted codes), [*batch, position, d_sae] each."""
        return self._codes(self._normalised(x).z)

    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """What the new codes add to x_hat, with b_dec. Arguments and errors as `SAE.decode`."""
        if self.normalize_activations == SCALAR:  # one number for all rows, so none of them is needed
            return self._decode(feature_acts) / self.activation_normalization_factor
        return super().decode(feature_acts, x)

    def reconstruct(self, x: Float[Tensor, "*batch position width"]) -> tuple[Tensor, Tensor]:
        """(new codes, x_hat of both parts)."""
        given = self._normalised(x)
        new, predicted = self._codes(given.z)
        return new, given.undone(self._decode(new + predicted))

    def _normalised(self, x: Tensor) -> Normalised:
        if self.normalize_activations != SCALAR:
            return super()._normalised(x)
        x = self.seen(x).to(self.dtype)
        factor = self.activation_normalization_factor
        return Normalised(x * factor, torch.full_like(x[..., :1], 1 / factor))

    def _encode(self, x: Tensor) -> Tensor:
        return self._codes(x)[0]

    def _decode(self, feature_acts: Tensor) -> Tensor:
        x_hat = feature_acts @ self.W_dec
        return x_hat if self.tied_weights and not self.subtracts_b_dec else x_hat + self.b_dec

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = x.reshape(-1, *x.shape[-2:]) - self.b_dec if self.subtracts_b_dec else x.reshape(-1, *x.shape[-2:])
        rate, predicted = 1 / (4 * self.d_in), rest.new_zeros(*rest.shape[:2], self.d_sae)
        for layer in self.attn_layers:
            z = (rest * rate @ self.W_enc).relu()
            before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)
            codes = self._attended(layer, before, z).relu()
            direction = codes @ self.W_dec
            norm = direction.norm(dim=-1, keepdim=True) + EPS
            share = (direction * rest).sum(-1, keepdim=True) / norm.square()
            predicted, rest = predicted + codes * share, rest - share * direction
        new = (rest * rate @ self.W_enc).relu()
        if self.sae_diff_type == "topk" and self.kval_topk is not None:
            top = new.topk(self.kval_topk, dim=-1)
            new = torch.zeros_like(new).scatter(-1, top.indices, top.values)
        shape = (*x.shape[:-1], self.d_sae)
        return new.view(shape), predicted.view(shape)

    def _attended(self, layer: Any, before: Tensor, z: Tensor) -> Tensor:
        """What a layer makes of the codes before each position, asked by those at it."""
        heads = [
            each.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for each in (layer.q_target(z), layer.k_ctx(before), layer.v_ctx(before))
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return layer.c_proj(attended.transpose(1, 2).flatten(-2))


def _linear(tensors: dict[str, Tensor], name: str) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"].detach(), tensors[f"{name}.bias"].detach()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    return linear


def temporal_shapes(d_sae: int, n_layers: int, bottleneck_factor: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the attention layers, as SAELens saves them."""
    width = d_sae // bottleneck_factor
    sizes = {"k_ctx": width, "q_target": width, "v_ctx": d_sae, "c_proj": d_sae}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(n_layers):
        for name, n_out in sizes.items():
            shapes |= {
                f"attn_layers.{layer}.{name}.weight": (n_out, d_sae),
                f"attn_layers.{layer}.{name}.bias": (n_out,),
            }
    return shapes


def temporal_parts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors as `TemporalSAE` takes them: those of the attention layers as a list of dicts."""
    layers: dict[int, dict[str, Tensor]] = {}
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("attn_layers."):
            _, layer, rest = name.split(".", 2)
            layers.setdefault(int(layer), {})[rest] = tensor
        else:
            parts[name] = tensor
    return {**parts, "attn_layers": [layers[layer] for layer in sorted(layers)]}
