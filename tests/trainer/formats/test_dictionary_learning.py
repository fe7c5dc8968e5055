"""Folders of sparsify and dictionary_learning against the formulas in float64, and against the libraries themselves."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign_saes import (
    D_IN,
    D_SAE,
    DICTIONARIES,
    SPARSIFY_KINDS,
    K,
    dictionary_folder,
    dictionary_tensors,
    sparsify_folder,
)
from torch import Tensor

from actcache.errors import ConfigError, ManifestError
from actcache.models.hook_names import hooks_of
from trainer.formats.dictionary_learning import dictionary_learning_sae
from trainer.formats.foreign import Names
from trainer.formats.sparsify import sparsify_sae
from trainer.sae.sae import SAE

U = 2.0**-24


def rows(n: int = 200) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(11)) * 3 + 1


def by_hand(w: dict[str, Tensor], x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(feature_acts, x_hat) by the formulas of each class, in the dtype of w."""
    relu, linear = torch.relu, "encoder.weight" in w
    W_enc, W_dec = (w["encoder.weight"].T, w.get("W_dec")) if linear else (w["W_enc"], w["W_dec"])
    W_dec = w["decoder.weight"].T if "decoder.weight" in w else W_dec
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w)
    b_enc = w.get("encoder.bias", w.get("b_enc"))
    centres = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder", "transcoder", "skip transcoder")
    u = (x - b_dec if centres else x) @ W_enc
    if kind == "GatedAutoEncoder":
        f = (u + w["gate_bias"] > 0) * relu(w["r_mag"].exp() * u + w["mag_bias"])
        return f, f @ W_dec + b_dec
    h = u + b_enc
    f = relu(h)
    if kind in ("AutoEncoderTopK", *SPARSIFY_KINDS):
        top = f.topk(K, dim=1)
        f = torch.zeros_like(f).scatter(1, top.indices, top.values)
    elif "threshold" in w:
        f = f * (h > w["threshold"])
    x_hat = f @ W_dec + b_dec + (x @ w["W_skip"].T if "W_skip" in w else 0.0)
    if kind == "AutoEncoder":  # load_dictionary brings decoder columns to norm 1, and the latents with them
        f = f * W_dec.norm(dim=1)
    return f, x_hat


def rounding(sae: SAE, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """How far float32 may lie from the exact (feature_acts, x_hat): a dot product of n terms errs by (n + 2) u sum |ab|
    at most, u = 2^-24; a few more roundings are for scaled weights, norms and the exponential.
    """
    w = {name: getattr(sae, name).double() for name in ("W_enc", "W_dec", "b_dec")}
    biases = [getattr(sae, name) for name in ("b_enc", "b_gate", "b_mag") if getattr(sae, name) is not None]
    size = (x.abs() + w["b_dec"].abs() * sae.subtracts_b_dec) @ w["W_enc"].abs()
    acts = (D_IN + 12) * U * (size + torch.stack(biases).double().abs().amax(0))
    if sae.r_mag is not None:
        acts = acts * sae.r_mag.double().exp().clamp_min(1)
    through = acts * (f != 0) + (D_SAE + 6) * U * f
    out = through @ w["W_dec"].abs() + (D_SAE + 6) * U * w["b_dec"].abs()
    if sae.W_skip is not None:
        out = out + (D_IN + 6) * U * (x.abs() @ sae.W_skip.double().abs().T)
    return acts, out


def check(sae: SAE, tensors: dict[str, Tensor], kind: str, theirs: tuple[Tensor, Tensor] | None = None) -> None:
    """The SAE computes what the formulas do, and what the library did, where it is there."""
    x = rows()
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    f, x_hat = by_hand(exact, x.double(), kind)
    acts_error, x_hat_error = rounding(sae, x.double(), f)
    got = sae.reconstruct(x)
    assert torch.equal(got[0] != 0, f != 0), "no latent of these rows lies within rounding of the decision"
    assert ((got[0].double() - f).abs() <= acts_error).all()
    assert ((got[1].double() - x_hat).abs() <= x_hat_error).all()
    if theirs is not None:
        assert torch.equal(theirs[0] != 0, f != 0)
        assert ((theirs[0].double() - f).abs() <= acts_error).all()
        assert ((theirs[1].double() - x_hat).abs() <= x_hat_error).all()


def peer(name: str) -> Any:
    """The library, whose imports warn of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


# --- sparsify ---


@pytest.mark.parametrize("kind", SPARSIFY_KINDS)
def test_a_sparsify_folder_computes_the_formula(kind, tmp_path):
    folder = sparsify_folder(tmp_path, kind, hookpoint="layers.3.mlp")
    sae = sparsify_sae(folder, Names())
    check(sae, load_file(folder / "sae.safetensors"), kind)
    transcodes, source = "transcoder" in kind, "blocks.3.mlp.hook_in"
    assert sae.input_hooks == ((source,) if transcodes else ("blocks.3.hook_mlp_out",))
    assert sae.output_hooks == ("blocks.3.hook_mlp_out",)
    assert (sae.k, sae.subtracts_b_dec, sae.metadata["model_name"]) == (K, not transcodes, "EleutherAI/pythia-70m")
    names = {"sae": "topk", "transcoder": "topk_transcoder"}
    assert sae.architecture == names.get(kind, "topk_skip_transcoder")


@pytest.mark.parametrize("kind", SPARSIFY_KINDS)
def test_sparsify_itself_computes_the_same(kind, tmp_path):
    sparsify = peer("sparsify")
    tensors = load_file(sparsify_folder(tmp_path / "seen", kind) / "sae.safetensors")
    config = sparsify.SparseCoderConfig(
        num_latents=D_SAE, k=K, transcode="transcoder" in kind, skip_connection="skip" in kind
    )
    coder = sparsify.SparseCoder(D_IN, config)
    coder.load_state_dict(tensors)
    folder = tmp_path / "saved" / "layers.3"
    coder.save_to_disk(folder)
    with torch.no_grad():
        top = coder.encode(rows())
        f = torch.zeros(len(rows()), D_SAE).scatter(1, top.top_indices, top.top_acts)
        x_hat = coder(rows()).sae_out
    sae = sparsify_sae(folder, Names(model_name="m"))
    check(sae, tensors, kind, theirs=(f, x_hat))
    assert all(torch.equal(getattr(sae, name), tensors[name]) for name in ("W_dec", "b_dec"))


def test_a_sparsify_folder_is_named_after_its_hookpoint(tmp_path):
    hooks = {
        "layers.3": "blocks.3.hook_resid_post",
        "transformer.h.11": "blocks.11.hook_resid_post",
        "h.0.attn": "blocks.0.hook_attn_out",
        "model.layers.7.self_attn": "blocks.7.hook_attn_out",
        "layers_2": "blocks.2.hook_resid_post",
    }
    for number, (hookpoint, hook_name) in enumerate(hooks.items()):
        sae = sparsify_sae(sparsify_folder(tmp_path / str(number), hookpoint=hookpoint), Names())
        assert (sae.hook_name, sae.hook_name_out) == (hook_name, None)
    seeded = sparsify_folder(tmp_path / "seeds", hookpoint="layers.3/seed1")
    assert sparsify_sae(seeded, Names(model_name="mine")).hook_name == "blocks.3.hook_resid_post"
    embedding = sparsify_folder(tmp_path / "embedding", "transcoder", hookpoint="embed_in")
    with pytest.raises(ConfigError, match=r"hookpoint 'embed_in'; pass --hook-name, --hook-name-out \(a hook is named"):
        sparsify_sae(embedding, Names())
    given = sparsify_sae(embedding, Names(hook_name="hook_embed", hook_name_out="blocks.0.hook_mlp_out"))
    assert (given.hook_name, given.hook_name_out) == ("hook_embed", "blocks.0.hook_mlp_out")
    (tmp_path / "embedding" / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match="pass --model-name"):
        sparsify_sae(embedding, Names(hook_name="hook_embed", hook_name_out="blocks.0.hook_mlp_out"))


def test_a_hook_of_gemma_is_not_guessed_inside_a_block():
    assert hooks_of("layers.3", "google/gemma-2-2b") == ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")
    assert hooks_of("layers.3.mlp", "google/gemma-2-2b") is None
    for other in ("blocks.3.hook_resid_post", "layers.x", "wte", "layers.3.mlp.act", "layers.3.norm", "layers.3."):
        assert hooks_of(other, "gpt2") is None, other


@pytest.mark.parametrize("changes", [{"activation": "groupmax"}, {"signed": True}], ids=str)
def test_a_sparsify_activation_that_is_not_topk_is_refused(changes, tmp_path):
    with pytest.raises(ManifestError, match=r"activation must be topk, got '(groupmax|signed)'"):
        sparsify_sae(sparsify_folder(tmp_path, **changes), Names())


def test_a_malformed_sparsify_folder_is_refused(tmp_path):
    folder = sparsify_folder(tmp_path)
    tensors = load_file(folder / "sae.safetensors")
    for wrong, says in (
        ({name: t for name, t in tensors.items() if name != "encoder.weight"}, "must hold encoder.weight"),
        (tensors | {"encoder.weight": tensors["b_dec"].clone()}, r"must hold encoder.weight, a matrix .* got \(16,\)"),
        (tensors | {"b_dec": tensors["b_dec"][:3].clone()}, "must hold .*'b_dec'"),
        (tensors | {"b_dec": tensors["b_dec"] / 0}, "b_dec must be finite"),
    ):
        save_file(wrong, folder / "sae.safetensors")
        with pytest.raises(ManifestError, match=says):
            sparsify_sae(folder, Names())
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": D_SAE + 1}))
    with pytest.raises(ManifestError, match="k must be at most d_sae=48"):
        sparsify_sae(folder, Names())


# --- dictionary_learning ---


@pytest.mark.parametrize("dict_class", DICTIONARIES)
def test_a_dictionary_computes_the_formula(dict_class, tmp_path):
    sae = dictionary_learning_sae(dictionary_folder(tmp_path, dict_class), Names())
    check(sae, dictionary_tensors(dict_class), dict_class)
    assert (sae.hook_name, sae.metadata["model_name"]) == ("blocks.3.hook_resid_post", "EleutherAI/pythia-70m")
    trained_as = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}
    assert sae.metadata["training_architecture"] == trained_as.get(dict_class, sae.architecture)
    assert sae.metadata["training_architecture_details"]["k"] == K


@pytest.mark.parametrize("dict_class", DICTIONARIES)
def test_dictionary_learning_itself_computes_the_same(dict_class, tmp_path):
    utils = peer("dictionary_learning.utils")
    folder = dictionary_folder(tmp_path, dict_class)
    dictionary, _ = utils.load_dictionary(str(folder), device="cpu")
    with torch.no_grad():
        f = dictionary.encode(rows())
        theirs = f, dictionary.decode(f)
    check(dictionary_learning_sae(folder, Names()), dictionary_tensors(dict_class), dict_class, theirs)


def test_a_threshold_that_was_never_set_lets_all_pass(tmp_path):
    folder = dictionary_folder(tmp_path, "BatchTopKSAE")
    tensors = dictionary_tensors("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    torch.save(tensors, folder / "ae.pt")
    check(dictionary_learning_sae(folder, Names()), tensors, "BatchTopKSAE")


def test_a_decoder_of_norm_one_is_left_as_it_is(tmp_path):
    folder, tensors = dictionary_folder(tmp_path, "AutoEncoder"), dictionary_tensors("AutoEncoder")
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    torch.save(tensors, folder / "ae.pt")
    sae = dictionary_learning_sae(folder, Names())
    assert torch.equal(sae.W_enc, tensors["encoder.weight"].T)
    assert torch.equal(sae.W_dec, tensors["decoder.weight"].T)


def test_what_the_layer_alone_does_not_say_is_asked(tmp_path):
    unsaid = dictionary_folder(tmp_path / "1", "AutoEncoder", submodule_name=None)
    with pytest.raises(ConfigError, match="submodule_name None of layer 3; pass --hook-name"):
        dictionary_learning_sae(unsaid, Names())
    given = dictionary_learning_sae(unsaid, Names(hook_name="blocks.3.hook_mlp_out", model_name="mine"))
    assert (given.hook_name, given.metadata["model_name"]) == ("blocks.3.hook_mlp_out", "mine")
    module = dictionary_folder(tmp_path / "2", "AutoEncoder", submodule_name="gpt_neox.layers.3.mlp")
    assert dictionary_learning_sae(module, Names()).hook_name == "blocks.3.hook_mlp_out"
    fed_by = json.loads((module / "config.json").read_text())
    fed_by["buffer"]["io"] = "in"
    (module / "config.json").write_text(json.dumps(fed_by))
    with pytest.raises(ConfigError, match="pass --hook-name"):
        dictionary_learning_sae(module, Names())


class Payload:
    """What a hostile pickle does when it is loaded as pickles usually are."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    folder, touched = dictionary_folder(tmp_path, "AutoEncoder"), tmp_path / "touched"
    torch.save({"bias": Payload(touched)}, folder / "ae.pt")
    with pytest.raises(ManifestError, match="must be a state dict of tensors, got UnpicklingError"):
        dictionary_learning_sae(folder, Names())
    (folder / "ae.pt").write_bytes(pickle.dumps(Payload(touched), protocol=2))
    with pytest.raises(ManifestError, match="must be a state dict of tensors"):
        dictionary_learning_sae(folder, Names())
    assert not touched.exists()


def test_a_malformed_dictionary_is_refused(tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoder")
    for damage in (b"", b"not a pickle", (folder / "ae.pt").read_bytes()[:-50]):
        (folder / "ae.pt").write_bytes(damage)
        with pytest.raises(ManifestError, match="must be a state dict of tensors"):
            dictionary_learning_sae(folder, Names())
    torch.save([1, 2], folder / "ae.pt")
    with pytest.raises(ManifestError, match="must be a state dict of tensors, got list"):
        dictionary_learning_sae(folder, Names())
    torch.save({"bias": torch.zeros(3)}, folder / "ae.pt")
    with pytest.raises(ManifestError, match=r"must hold encoder\.weight, a matrix if it is weights; got bias"):
        dictionary_learning_sae(folder, Names())
    for config in ({"trainer": {"dict_class": "IdentityDict"}}, {"trainer": 3}, {}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ManifestError, match="dict_class must be one of AutoEncoder, AutoEncoderNew"):
            dictionary_learning_sae(folder, Names())
