"""An SAE as it is used, against the definitions of its architectures, one row at a time."""

import math

import pytest
import torch
from support.saelens_cases import raw_activations
from support.tiny_saes import make_config, make_weights

from trainer.formats.saelens import load_sae, save_inference_sae
from trainer.sae.sae import SAE


def test_bfloat16_weights_are_computed_in_bfloat16(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in make_weights("topk").items()}
    sae = load_sae(save_inference_sae(make_config("topk"), weights, tmp_path / "sae", metadata={}))
    assert sae.encode(raw_activations()).dtype == torch.bfloat16
    assert isinstance(sae, SAE)


D_IN, D_OUT, D_SAE = 6, 4, 9
U = 2.0**-53  # both sides compute in float64: a sum of n terms, together of size s, errs by n U s


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def an_sae(architecture: str, **settings: object) -> SAE:
    """Of random weights with every bias away from 0."""
    weights = {"W_enc": draw(D_IN, D_SAE, seed=1), "W_dec": draw(D_SAE, D_IN, seed=2)}
    weights |= {"b_enc": draw(D_SAE, seed=3), "b_dec": draw(D_IN, seed=4)}
    about = {"hook_name": "blocks.0.hook_resid_post", "subtracts_b_dec": True, "metadata": {}}
    return SAE(**{"architecture": architecture, **weights, **about, **settings})


def pre_acts_of(sae: SAE, row: list[float]) -> list[float]:
    """h of one row, one product after the other."""
    centred = [value - float(sae.b_dec[i]) * sae.subtracts_b_dec for i, value in enumerate(row)]
    h = [sum(centred[i] * float(sae.W_enc[i, j]) for i in range(D_IN)) for j in range(D_SAE)]
    return h if sae.b_enc is None else [value + float(sae.b_enc[j]) for j, value in enumerate(h)]


def largest(sizes: list[float], k: int) -> set[int]:
    return set(sorted(range(len(sizes)), key=lambda j: -sizes[j])[:k])


def norms(sae: SAE) -> list[float]:
    return [math.sqrt(sum(float(value) ** 2 for value in row)) for row in sae.W_dec]


def relu(value: float) -> float:
    return max(value, 0.0)


THRESHOLD, GATES = draw(D_SAE, seed=5).abs(), {name: draw(D_SAE, seed=6 + i) / 2 for i, name in enumerate("gmr")}
GATED = {"b_enc": None, "b_gate": GATES["g"], "b_mag": GATES["m"], "r_mag": GATES["r"]}
DEFINITIONS = {  # settings, and f of (sae, h)
    "standard": ({}, lambda sae, h: [relu(value) for value in h]),
    "standard of x": ({"subtracts_b_dec": False}, lambda sae, h: [relu(value) for value in h]),
    "topk": ({"k": 3}, lambda sae, h: [relu(v) * (j in largest(h, 3)) for j, v in enumerate(h)]),
    "topk rescaled": (
        {"k": 3, "rescale_acts_by_decoder_norm": True},
        lambda sae, h: [
            relu(v * n) * (j in largest([a * b for a, b in zip(h, norms(sae), strict=True)], 3))
            for j, (v, n) in enumerate(zip(h, norms(sae), strict=True))
        ],
    ),
    "abstopk": ({"k": 3}, lambda sae, h: [v * (j in largest([abs(each) for each in h], 3)) for j, v in enumerate(h)]),
    "jumprelu": (
        {"threshold": THRESHOLD},
        lambda sae, h: [v * (v > t) for v, t in zip(h, THRESHOLD.tolist(), strict=True)],
    ),
    "gated": (
        GATED,
        lambda sae, h: [
            (v + g > 0) * relu(math.exp(r) * v + m)
            for v, g, m, r in zip(h, *(GATES[name].tolist() for name in "gmr"), strict=True)
        ],
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_architecture_is_its_definition_row_by_row(name: str) -> None:
    settings, definition = DEFINITIONS[name]
    sae, x = an_sae(name.split()[0], **settings), draw(20, D_IN, seed=9)
    expected = torch.tensor([definition(sae, pre_acts_of(sae, row)) for row in x.tolist()], dtype=torch.float64)
    f, x_hat = sae.reconstruct(x)
    # h is a sum of d_in + 2 products and biases; a norm or exp(r_mag) multiplies it
    stretch = max(1.0, *norms(sae), 1.0 if sae.r_mag is None else float(sae.r_mag.exp().max()))
    size_of_h = float(((x.abs() + sae.b_dec.abs()) @ sae.W_enc.abs()).max()) + 5
    error = (D_IN + D_SAE + 6) * U * stretch * size_of_h
    torch.testing.assert_close(f, expected, rtol=0, atol=error)
    assert torch.equal(f, sae.encode(x))
    assert 0 < int((f != 0).sum()) < f.numel(), "some are active, not all"
    length = torch.tensor(norms(sae) if sae.rescale_acts_by_decoder_norm else [1.0] * D_SAE, dtype=torch.float64)
    by_hand = (expected / length) @ sae.W_dec + sae.b_dec
    through = float((sae.W_dec.abs() / length[:, None]).sum(0).max())
    size = float((expected.abs() @ sae.W_dec.abs() + sae.b_dec.abs()).max())
    torch.testing.assert_close(x_hat, by_hand, rtol=0, atol=error * through + (D_SAE + 6) * U * size)


def test_a_skip_transcoder_predicts_another_hook_and_adds_what_it_skips() -> None:
    W_skip, W_dec, b_dec = draw(D_OUT, D_IN, seed=1), draw(D_SAE, D_OUT, seed=2), draw(D_OUT, seed=3)
    names = {"hook_name_out": "blocks.0.hook_mlp_out", "subtracts_b_dec": False}
    sae = an_sae("skip_transcoder", W_skip=W_skip, W_dec=W_dec, b_dec=b_dec, **names)
    assert (sae.d_in, sae.d_out, sae.d_sae) == (D_IN, D_OUT, D_SAE)
    assert (sae.input_hooks, sae.output_hooks) == (("blocks.0.hook_resid_post",), ("blocks.0.hook_mlp_out",))
    x = draw(5, D_IN, seed=9)
    f, y_hat = sae.reconstruct(x)
    assert torch.equal(f, (x @ sae.W_enc + sae.b_enc).relu())
    assert torch.equal(y_hat, f @ W_dec + b_dec + x @ W_skip.T), "the same operations in the same order"
    assert torch.equal(sae.decode(f), f @ W_dec + b_dec), "without what it skips"


def test_a_crosscoder_reads_and_gives_all_of_its_hooks() -> None:
    names = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    sae = an_sae("crosscoder", hook_names=names, hook_widths=(4, 2), subtracts_b_dec=False)
    assert sae.input_hooks == sae.output_hooks == names


@pytest.mark.parametrize("subtracts_b_dec", [True, False])
def test_pursuit_adds_the_bias_only_where_it_was_subtracted(subtracts_b_dec: bool) -> None:
    """With orthonormal directions pursuit ends with the positive part of each product: x = 3 e_0 - 2 e_1 + b_dec."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    settings = {"b_enc": None, "W_enc": eye, "W_dec": eye, "residual_threshold": 1e-6, "max_iterations": 20}
    sae = an_sae("matching_pursuit", subtracts_b_dec=subtracts_b_dec, **settings)
    x = (3 * eye[0] - 2 * eye[1])[None] + sae.b_dec * subtracts_b_dec
    f, x_hat = sae.reconstruct(x)
    torch.testing.assert_close(f, 3 * eye[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(x_hat, 3 * eye[:1] + sae.b_dec * subtracts_b_dec, rtol=0, atol=1e-12)
