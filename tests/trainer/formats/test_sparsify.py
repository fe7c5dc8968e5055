"""Folders of sparsify against the formulas in float64, and against the library itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign_formulas import check, peer, rows
from support.foreign_saes import D_IN, D_SAE, SPARSIFY_KINDS, K, sparsify_folder

from actcache.errors import ConfigError, ManifestError
from actcache.models.hook_names import hooks_of
from trainer.formats.foreign import Names
from trainer.formats.sparsify import sparsify_sae
from trainer.sae.sae import SAE


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


@pytest.mark.parametrize("kind", SPARSIFY_KINDS)
def test_groupmax_takes_the_largest_of_each_group(kind, tmp_path):
    """By a loop over the groups: k of them, each of neighbours."""
    groups = 6
    folder = sparsify_folder(tmp_path, kind, activation="groupmax", k=groups)
    names = Names(hook_name="blocks.3.hook_resid_pre", hook_name_out="blocks.3.hook_mlp_out")
    sae = sparsify_sae(folder, names if kind != "sae" else Names())
    x, size = rows(), D_SAE // groups
    h = ((x - sae.b_dec if sae.subtracts_b_dec else x) @ sae.W_enc + sae.b_enc).relu()
    expected = torch.zeros_like(h)
    for row in range(len(x)):
        for start in range(0, D_SAE, size):
            best = start + int(h[row, start : start + size].argmax())
            expected[row, best] = h[row, best]
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(SAE.load_from_disk(sae.save(tmp_path / "copy"))(x), sae(x))
    with pytest.raises(ManifestError, match=r"d_sae=48 must be k groups of one size, got k=7"):
        sparsify_sae(sparsify_folder(tmp_path / "odd", activation="groupmax", k=7), Names())


@pytest.mark.parametrize("changes", [{"activation": "relu"}, {"signed": True}], ids=str)
def test_a_sparsify_activation_that_is_not_topk_is_refused(changes, tmp_path):
    with pytest.raises(ManifestError, match=r"activation must be topk or groupmax, got '(relu|signed)'"):
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
