"""Temporal SAEs against a loop over tokens and heads, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.sae.temporal import PROJECTIONS, TemporalSAE, temporal_shapes

D_IN, D_SAE, N_HEADS, BOTTLENECK = 6, 16, 2, 2
N_LAYERS, K = 2, 3


def parts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    shapes = temporal_shapes(D_SAE, N_LAYERS, BOTTLENECK)
    layers = [
        {
            f"{name}.{part}": some(*shapes[f"attn_layers.{layer}.{name}.{part}"])
            for name in PROJECTIONS
            for part in ("weight", "bias")
        }
        for layer in range(N_LAYERS)
    ]
    return {"W_dec": some(D_SAE, D_IN), "b_dec": some(D_IN), "attn_layers": layers}


def make(**changes: Any) -> TemporalSAE:
    settings = {
        **{"n_heads": N_HEADS, "bottleneck_factor": BOTTLENECK, "sae_diff_type": "topk", "kval_topk": K},
        **{"activation_normalization_factor": 1.0, "subtracts_b_dec": True, "metadata": {}},
    }
    return TemporalSAE(
        architecture="temporal", hook_name="blocks.1.hook_resid_post", **{**parts(), **settings, **changes}
    )


def of_head(layer: dict[str, Tensor], name: str, v: Tensor, head: int) -> Tensor:
    return (layer[f"{name}.weight"] @ v + layer[f"{name}.bias"]).view(N_HEADS, -1)[head]


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """(new codes, predicted codes) of one sequence, token by token: the equations of the paper's appendix."""
    given, rate = parts(), 1 / (4 * D_IN)
    W = given["W_dec"]
    rest = x - given["b_dec"]
    predicted = torch.zeros(len(x), D_SAE).double()
    for layer in given["attn_layers"]:
        z = [torch.relu(W @ row * rate) for row in rest]
        before = [torch.zeros(D_SAE).double(), *z[:-1]]
        codes = []
        for t in range(len(x)):
            heads = []
            for head in range(N_HEADS):
                q = of_head(layer, "q_target", z[t], head)
                keys = torch.stack([of_head(layer, "k_ctx", before[s], head) for s in range(t + 1)])
                values = torch.stack([of_head(layer, "v_ctx", before[s], head) for s in range(t + 1)])
                heads.append(torch.softmax(keys @ q / math.sqrt(len(q)), 0) @ values)
            codes.append(torch.relu(layer["c_proj.weight"] @ torch.cat(heads) + layer["c_proj.bias"]))
        for t, code in enumerate(codes):
            direction = code @ W
            share = (direction @ rest[t]) / (direction.norm() + 1e-6) ** 2
            predicted[t] += code * share
            rest[t] = rest[t] - share * direction
    new = torch.zeros_like(predicted)
    for t, row in enumerate(rest):
        z = torch.relu(W @ row * rate)
        for latent in z.argsort(descending=True)[:K]:
            new[t, latent] = z[latent]
    return new, predicted


def test_codes_and_reconstruction_by_hand():
    sae, x = make(), torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(1)).double() * 4
    new, predicted = (torch.stack(each) for each in zip(*(by_hand(sequence) for sequence in x), strict=True))
    got_new, got_predicted = sae.codes(x)
    torch.testing.assert_close(got_new, new)
    torch.testing.assert_close(got_predicted, predicted)
    torch.testing.assert_close(sae(x), (new + predicted) @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.decode(new), new @ sae.W_dec + sae.b_dec)


def test_what_comes_later_changes_nothing_before_it():
    sae, x = make(), torch.randn(1, 6, D_IN).double()
    y = x.clone()
    y[:, 4:] += 1.0
    assert torch.equal(sae(x)[:, :4], sae(y)[:, :4])
    assert not torch.equal(sae(x)[:, 4:], sae(y)[:, 4:])


def test_a_number_scales_the_rows_and_the_way_back():
    scaled = make(normalize_activations="constant_scalar_rescale", activation_normalization_factor=0.25)
    x = torch.randn(1, 6, D_IN).double()
    torch.testing.assert_close(scaled.encode(4 * x), make().encode(x))
    torch.testing.assert_close(scaled(4 * x), 4 * make()(x))
    new = make().encode(x)
    torch.testing.assert_close(scaled.decode(new), 4 * make().decode(new))


def test_its_settings_are_those_of_saelens():
    cfg = make().cfg
    assert {name: cfg[name] for name in ("n_heads", "n_attn_layers", "kval_topk", "tied_weights")} == {
        **{"n_heads": N_HEADS, "n_attn_layers": N_LAYERS, "kval_topk": K, "tied_weights": True}
    }
    with pytest.raises(TypeError):
        make(unknown=1)
