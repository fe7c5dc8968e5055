"""Sparse codes equal what the SAE encodes, and read back as they were written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.feature_cases import D_IN, as_stored, dense, double_run
from support.planted import make_sae
from support.tiny_saes import ARCHITECTURES, make_config, make_run, make_weights

from actcache.errors import ManifestError
from trainer.features.build import build_features
from trainer.features.feature_acts import SparseEncoder, map_arrays, map_codes, write_codes
from trainer.formats.saelens import load_sae


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_may_hold_special_tokens_alone(architecture, tmp_path):
    run = make_run(tmp_path, make_config(architecture), {"name": "tiny", "revision": None})
    assert [len(entry) for entry in SparseEncoder(load_sae(run)).entries(torch.empty(0, 16))] == [0, 0, 0]


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": CENTRED},
        {"metadata": CENTRED, "architecture": "groupmax", "k": 6},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"metadata": {"hook_head_index": 1}, "wide": 2},
    ],
    ids=str,
)
def test_what_an_sae_makes_of_its_rows_is_made_here_too(changes):
    """Centred and normalised rows, groups, and one head of rows that hold several."""
    sae = make_sae(**{name: value for name, value in changes.items() if name != "wide"})
    x = torch.randn(50, sae.d_in * changes.get("wide", 1), generator=torch.Generator().manual_seed(1)).double() + 0.5
    row, latent, act = SparseEncoder(sae).entries(x)
    got = torch.zeros(50, sae.d_sae, dtype=torch.float64).index_put((row, latent), act)
    torch.testing.assert_close(got, sae.encode(x))
    assert (got != 0).any()


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_may_be_ranked_by_the_decoders_norms(architecture, tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, architecture)
    path = run / "sae" / "cfg.json"
    plain = dense(run, tiny_cache)
    (run / "sae.crc32c.json").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_acts_by_decoder_norm": True}))
    acts = dense(run, tiny_cache)
    assert not np.array_equal(acts != 0, plain != 0)
    as_stored(build_features(run, tiny_cache), acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "gated", "standard"])
def test_shorter_weights_encode_as_the_sae_does(architecture, dtype, tmp_path):
    """What fires in one and not in the other lies within rounding of its cut, and the rest differs by rounding.

    Pre-activations are sums of 33 terms, rounded once or twice each in the weights' dtype: by at most 2 * 33 eps of the
    sum of their magnitudes. Of a topk the k-th is a cut.
    """
    config = make_config(architecture, d_in=D_IN, input_scale=1.0)
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(architecture, D_IN).items()}
    sae = load_sae(make_run(tmp_path, config, {"name": "tiny", "revision": None}, weights=weights))
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(3))
    row, latent, act = SparseEncoder(sae).entries(x)
    assert (row.diff() >= 0).all()
    assert (act != 0).all()
    got = torch.zeros(300, sae.d_sae, dtype=dtype).index_put((row, latent), act).double()
    expected = sae.encode(x).double()
    scale = (x.abs().double() + 4) @ (sae.W_enc.abs().double() * (1.0 if sae.r_mag is None else sae.r_mag.exp() + 1))
    rounding = 2 * 33 * torch.finfo(dtype).eps * (scale + 8)
    both = (got != 0) & (expected != 0)
    assert ((got - expected).abs() <= rounding)[both].all()
    one = (got != 0) ^ (expected != 0)
    assert one.double().mean() <= 0.02
    smallest = expected.abs().masked_fill(expected == 0, torch.inf).amin(1, keepdim=True)
    cut = smallest if sae.k is not None else torch.zeros(1) if sae.threshold is None else sae.threshold.double()
    at_cut = ((got + expected).abs() - cut).abs() <= rounding
    assert (at_cut | torch.tensor(architecture == "gated"))[one].all()


D_SAE = 4
TOKEN_ID = np.array([7, 0, 9, 7, 3], dtype=np.int32)
ENTRIES = [(0, 2, 1.5), (0, 0, -0.5), (2, 3, 2.0), (2, 0, 0.25), (4, 2, 4.0)]  # token, latent, activation


def written(path: Path) -> Path:
    token, latent, act = (torch.tensor(column) for column in zip(*ENTRIES, strict=True))
    write_codes(path, TOKEN_ID, token, latent, act, D_SAE)
    return path


def test_codes_read_back_by_token_and_by_latent(tmp_path):
    codes = map_codes(written(tmp_path / "codes"), 100, {})
    assert (codes.first_token, codes.stop) == (100, 105)
    assert codes.token_id.tolist() == TOKEN_ID.tolist()
    for token in range(len(TOKEN_ID)):
        at = slice(codes.token_start[token], codes.token_start[token + 1])
        found = list(zip(codes.latent[at].tolist(), codes.act[at].tolist(), strict=True))
        assert found == [(latent, act) for where, latent, act in ENTRIES if where == token]
    for latent in range(D_SAE):
        tokens, acts = codes.of_latent(latent)
        found = list(zip(tokens.tolist(), acts.tolist(), strict=True))
        assert found == [(token, act) for token, where, act in ENTRIES if where == latent]
    assert codes.latents_at(np.array([2, 1, 0], dtype=np.int32)).tolist() == [3, 0, 2, 0]


def test_codes_are_plain_safetensors(tmp_path):
    tensors = load_file(written(tmp_path / "codes"))
    arrays = map_arrays(tmp_path / "codes", {})
    assert {name: array.tolist() for name, array in arrays.items()} == {n: t.tolist() for n, t in tensors.items()}
    with pytest.raises(ValueError, match="read-only"):
        arrays["act"][0] = 1.0


def test_codes_whose_lengths_differ_are_damaged(tmp_path):
    tensors = load_file(written(tmp_path / "codes"))
    for name in ("token_start", "latent_start"):
        save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "codes")
        with pytest.raises(ManifestError, match=r"codes: must be as the features were written, got ValueError"):
            map_codes(tmp_path / "codes", 0, {})
    save_file({name: tensor for name, tensor in tensors.items() if name != "act"}, tmp_path / "codes")
    with pytest.raises(ManifestError, match="got KeyError: 'act'"):
        map_codes(tmp_path / "codes", 0, {})
