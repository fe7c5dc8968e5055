"""An SAE as it is used: against the definitions of its architectures, one row at a time, and against SAELens'."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from support.saelens_cases import raw_activations
from support.saelens_peers import METADATA, VARIANTS, rows, their_sae
from support.tiny_saes import changed, make_config, make_weights

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
    settings = {"b_enc": None, "W_enc": None, "W_dec": eye, "residual_threshold": 1e-6, "max_iterations": 20}
    sae = an_sae("matching_pursuit", subtracts_b_dec=subtracts_b_dec, **settings)
    x = (3 * eye[0] - 2 * eye[1])[None] + sae.b_dec * subtracts_b_dec
    f, x_hat = sae.reconstruct(x)
    torch.testing.assert_close(f, 3 * eye[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(x_hat, 3 * eye[:1] + sae.b_dec * subtracts_b_dec, rtol=0, atol=1e-12)


# --- as a torch module, beside SAELens' own ---


def both(variant: str, folder: Path, **changes: object):
    """(theirs, ours) of the same weights."""
    pytest.importorskip("sae_lens")
    theirs = their_sae(variant, **changes)
    theirs.save_model(folder)
    return theirs, load_sae(folder)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16,), (6, 16), (2, 5, 16), (2, 1, 3, 16)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_saelens_computes_on_any_axes(variant: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Bit for bit: the same operations in the same order on the same shapes."""
    theirs, ours = both(variant, tmp_path)
    x = rows(math.prod(shape[:-1])).view(shape)
    if len(shape) > 1 or variant != "matching_pursuit":  # SAELens' pursuit takes no row alone
        feature_acts = theirs.encode(x)
        assert torch.equal(feature_acts, ours.encode(x))
        assert torch.equal(theirs.decode(feature_acts), ours.decode(feature_acts))
        assert torch.equal(theirs(x), ours(x))
    assert torch.equal(ours(x), ours.reconstruct(x)[1])
    assert ours(x.bfloat16()).dtype == torch.float32, "any float dtype comes in"


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_state_and_cfg_are_those_of_saelens(variant: str, tmp_path: Path) -> None:
    theirs, ours = both(variant, tmp_path)
    state = ours.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in state.items())
    assert ours.W_enc.shape == theirs.W_enc.shape
    theirs.load_state_dict(state)
    said, expected = ours.cfg.to_dict(), theirs.cfg.to_dict()
    assert {key: said[key] for key in expected} == expected
    assert json.loads(json.dumps(said)) == said
    assert type(said["architecture"]) is str
    assert ours.cfg.architecture() == ours.cfg.architecture == theirs.cfg.architecture()
    assert (ours.cfg.d_in, ours.cfg["d_sae"], ours.cfg.dtype, ours.cfg.device) == (16, 48, "float32", "cpu")
    assert ours.cfg.metadata.hook_name == theirs.cfg.metadata.hook_name == ours.cfg.hook_name == ours.cfg["hook_name"]
    assert ours.cfg.metadata.neuronpedia_id == METADATA["neuronpedia_id"]
    assert ours.cfg.metadata.unheard_of is theirs.cfg.metadata.unheard_of is None
    with pytest.raises(AttributeError, match=r"SAE\.cfg: has architecture, d_in, .*, got unheard_of"):
        _ = ours.cfg.unheard_of
    with pytest.raises(KeyError):
        _ = ours.cfg["unheard_of"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_saelens_once_they_are_switched_on(variant: str, tmp_path: Path) -> None:
    """Float64: each gradient is a sum of fewer than 10^4 products. What only decides which latents fire has none."""
    theirs, ours = (sae.to(torch.float64) for sae in both(variant, tmp_path))
    assert not any(weight.requires_grad for weight in ours.parameters())
    x = rows(30).double()
    assert not ours(x).requires_grad
    ours.requires_grad_(True)
    grads: list[dict[str, torch.Tensor | None]] = []
    for sae in (theirs, ours):
        leaf = x.clone().requires_grad_()
        sae(leaf).square().mean().backward()
        grads.append({"x": leaf.grad, **{name: weight.grad for name, weight in sae.named_parameters()}})
    for name, expected in grads[0].items():
        got = grads[1][name]
        assert (got is None) == (expected is None) == (name in ("threshold", "b_gate")), name
        if got is not None and expected is not None:
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(got, expected, rtol=0, atol=1e4 * U * float(expected.abs().max()))


@pytest.mark.parametrize("variant", ["gated", "matching_pursuit", "jumprelu_skip_transcoder"])
def test_it_moves_copies_and_pickles(variant: str, tmp_path: Path) -> None:
    _, ours = both(variant, tmp_path)
    x, x_hat = rows(20), ours(rows(20))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), changed(ours)):
        assert torch.equal(copied(x), x_hat)
        assert (repr(copied), copied.cfg, copied.metadata) == (repr(ours), ours.cfg, ours.metadata)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        copied.W_dec.zero_()
    assert torch.equal(ours(x), x_hat), "its weights are its own"
    for cfg in (copy.deepcopy(ours.cfg), pickle.loads(pickle.dumps(ours.cfg))):
        assert cfg == ours.cfg
        assert cfg.metadata.model_name == "tiny"
    half = ours.to(torch.bfloat16)
    assert half is ours
    assert (ours.dtype, ours.cfg.dtype, ours.encode(x).dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    meta = ours.to(device="meta")
    assert (meta.device.type, meta.cfg.device, "device=meta" in repr(meta)) == ("meta", "meta", True)


def test_what_it_says_of_itself_is_short() -> None:
    assert repr(an_sae("topk", k=3)) == (
        "SAE(architecture=topk, d_in=6, d_sae=9, k=3, hook_name=blocks.0.hook_resid_post, dtype=float64, device=cpu)"
    )


def test_it_is_a_part_of_a_module() -> None:
    sae = an_sae("standard")
    whole = torch.nn.Sequential(sae, torch.nn.Identity())
    assert set(whole.state_dict()) == {"0.W_enc", "0.W_dec", "0.b_enc", "0.b_dec"}
    assert torch.equal(whole(draw(2, 3, D_IN, seed=9)), sae(draw(2, 3, D_IN, seed=9)))
