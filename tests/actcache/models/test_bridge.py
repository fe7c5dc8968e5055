"""TransformerLens' bridge against the transformers model with hooks."""

import sys

import pytest
import torch
from support.model_cases import TOKENS, hook_names, one_line, with_raw_hook
from support.tiny_models import D_MODEL, FAMILIES, N_LAYERS, make_model, make_multimodal_dir, make_tokenizer
from support.wheels import offer_wheel
from transformers import CTRLConfig, CTRLLMHeadModel

from actcache.errors import ModelError
from actcache.models.bridge import BridgeModel
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.load import load_model


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_activations_and_logits_equal_the_bridge_bit_for_bit(family, eager, bridge):
    x, y = (model(family).activations(TOKENS, hook_names(family)) for model in (eager, bridge))
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert torch.equal(eager(family).logits(TOKENS), bridge(family).logits(TOKENS))


def test_gpt2_equals_the_bridge_in_float64_within_its_rounding():
    """The bridge splits GPT-2's joint q, k, v projection, so sums are rounded in another order: not bit for bit.

    Each value is the end of at most `roundings` float64 operations a layer (norms and projections over d_model, scores
    over d_head, softmax and mix over positions, MLP over 4 d_model), each off by eps/2 of values no larger than the
    largest, on both sides. Another formula (an epsilon, a mask, a scale) would be off by 1e-6 and more.
    """
    ours = HuggingFaceModel(make_model("gpt2", 512).double(), make_tokenizer(), {"name": "gpt2"})
    theirs = BridgeModel(make_model("gpt2", 512).double(), make_tokenizer(), {"name": "gpt2"})
    x, y = (model.activations(TOKENS, hook_names("gpt2")) for model in (ours, theirs))
    roundings = N_LAYERS * (5 * D_MODEL + D_MODEL // 4 + 2 * TOKENS.shape[1] + 4 * D_MODEL)
    bound = roundings * torch.finfo(torch.float64).eps * max(value.abs().max().item() for value in x.values())
    assert max((x[name] - y[name]).abs().max().item() for name in x) <= bound < 1e-10


def test_bridge_serves_its_other_hooks_flattened(bridge):
    names = ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_in", "blocks.1.ln1.hook_scale", "ln_final.hook_out"]
    widths = bridge("llama").hook_widths(names)
    assert widths == dict(zip(names, [D_MODEL, D_MODEL, 1, D_MODEL], strict=True))
    assert bridge("llama").activations(TOKENS, names[:1])[names[0]].shape == (3, 20, D_MODEL)


def test_bridge_stops_after_the_last_hook(bridge):
    later = []
    model = bridge("llama")
    module = model._module.original_model.get_submodule("model.layers.2")
    with_raw_hook(
        module, "", lambda *_: later.append(1), lambda: model.activations(TOKENS, ["blocks.1.hook_resid_post"])
    )
    assert later == []


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox_sequential", "llama", "gemma2", "gemma3_text"])
def test_replacing_in_the_bridge_equals_ours_bit_for_bit(family, eager, bridge):
    direction = torch.linspace(-1, 1, D_MODEL)
    for name in hook_names(family):
        x, y = (model(family).logits_with(TOKENS, name, lambda x: x + direction) for model in (eager, bridge))
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"])
def test_bridge_refuses_hooks_without_a_vector_for_each_token(name, bridge):
    with pytest.raises(ModelError, match="no vector for each token"):
        bridge("llama").hook_widths([name])


def test_bridge_names_the_flag_of_a_hook_that_is_off(bridge):
    with pytest.raises(ModelError, match="hook_result because use_attn_result is False; choose another hook"):
        bridge("llama").hook_widths(["blocks.1.attn.hook_result"])


def test_bridge_refuses_a_model_that_it_does_not_know(tmp_path):
    config = CTRLConfig(vocab_size=512, n_positions=8, n_embd=8, dff=8, n_layer=1, n_head=1)
    CTRLLMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="TransformerLens cannot take model_type 'ctrl'") as error:
        load_model(tmp_path, device="cpu", backend="transformer_lens")
    assert one_line(error)


def test_transformer_lens_installs_no_torchvision_for_a_model_that_sees_pictures(tmp_path, monkeypatch, caplog):
    """It runs `pip install torchvision` where it finds none, and that changes the version of torch."""
    installed = offer_wheel("torchvision", tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were missing
    monkeypatch.setenv("PATH", "")  # TransformerLens takes uv where there is one
    model = load_model(make_multimodal_dir(tmp_path / "model"), device="cpu", backend="transformer_lens")
    assert model.activations(TOKENS, ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"].shape == (3, 20, D_MODEL)
    assert not installed.exists()
    assert "TransformerLens wanted to run" in caplog.text
    assert "-m pip install torchvision -q`; nothing was installed" in caplog.text


def test_the_hub_is_not_asked_for_the_name_of_a_folder(tmp_path, monkeypatch):
    """A model that sees pictures has a processor for them. TransformerLens loads it by the name that it is given."""
    asked = []
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name, **_: asked.append(name))
    load_model(make_multimodal_dir(tmp_path / "gemma-3-4b-it"), device="cpu", backend="transformer_lens")
    assert asked == [str(tmp_path / "gemma-3-4b-it")]
