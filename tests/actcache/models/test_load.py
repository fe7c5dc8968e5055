"""How a model may be loaded: spread by accelerate, with a chosen attention kernel; neither changes what it is."""

import shutil

import pytest
import torch
from accelerate import cpu_offload
from support.model_cases import TOKENS
from support.tiny_models import FAMILIES, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from actcache.errors import ConfigError, ModelError
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model, wrap_model

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
# gpt2 and gemma2 tie the output head to the embedding, llama does not
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gemma2": "model.layers"}


def assert_equal_activations(model: LanguageModel, expected: LanguageModel) -> None:
    x, y = (m.activations(TOKENS, HOOKS) for m in (model, expected))
    assert [name for name in HOOKS if not torch.equal(x[name].cpu(), y[name].cpu())] == []


def assert_begins_anywhere(model: LanguageModel) -> None:
    """A pass from a known stream is the whole one, and leaves what wraps the blocks it has skipped."""
    logits, start = model.logits(TOKENS), model.activations(TOKENS, ["blocks.2.hook_resid_pre"])
    for name in HOOKS[3], "blocks.2.hook_mlp_out":
        begun = model.logits_from(TOKENS, start["blocks.2.hook_resid_pre"], name, torch.zeros_like)
        assert torch.equal(begun, model.logits_with(TOKENS, name, torch.zeros_like)), name
    assert torch.equal(model.logits(TOKENS), logits)


# Spread


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_device_map_changes_neither_activations_nor_identity(device_map, directory):
    expected = load_model(directory("llama"), dtype="float32")
    model = load_model(directory("llama"), device_map=device_map, dtype="float32")
    assert_equal_activations(model, expected)
    assert model.device.type == expected.device.type
    assert model.identity == expected.identity


@pytest.mark.parametrize("on_disk", ["blocks", "everything"])
@pytest.mark.parametrize("family", BLOCKS)
def test_model_that_is_partly_or_wholly_on_disk(family, on_disk, directory, ours, tmp_path):
    """Parameters on disk are on the "meta" device but while their module runs; it is the same model all the time."""
    blocks, expected = BLOCKS[family], ours(family)
    if on_disk == "everything":
        device_map = {"": "disk"}
    else:
        root, _, leaf = blocks.partition(".")
        children = expected._model.get_submodule(root).named_children()
        device_map = {f"{root}.{name}": "cpu" for name, _ in children if name != leaf}
        device_map |= {f"{blocks}.0": "cpu", f"{blocks}.1": "disk", f"{blocks}.2": "disk", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        directory(family), device_map=device_map, offload_folder=tmp_path, dtype=torch.float32
    )
    n_offloaded = sum(parameter.is_meta for parameter in spread.parameters())
    assert n_offloaded > 0
    model = wrap_model(spread, make_tokenizer())
    assert model.device == torch.device("cpu")
    assert model.identity == expected.identity
    for name in HOOKS:  # each alone: the pass stops early, and what was fetched for it is let go
        assert torch.equal(model.activations(TOKENS, [name])[name], expected.activations(TOKENS, [name])[name]), name
    assert torch.equal(model.logits(TOKENS), expected.logits(TOKENS))
    assert_begins_anywhere(model)
    assert sum(parameter.is_meta for parameter in spread.parameters()) >= n_offloaded
    assert wrap_model(spread, make_tokenizer()).identity == expected.identity


@pytest.mark.parametrize("family", BLOCKS)
def test_model_in_host_memory(family, ours):
    """accelerate.cpu_offload leaves tied parameters as two."""
    model = make_model(family, 512)
    expected = wrap_model(model, make_tokenizer(), name="tiny").identity
    offloaded = wrap_model(cpu_offload(model, torch.device("cpu")), make_tokenizer(), name="tiny")
    assert offloaded.identity == expected
    assert_equal_activations(offloaded, ours(family))
    assert_begins_anywhere(offloaded)


# Attention


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_eager_attention_equals_transformers_bit_for_bit(family, directory, ours):
    model = load_model(directory(family), device="cpu", attention="eager")
    reference = AutoModelForCausalLM.from_pretrained(directory(family), attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model.logits(TOKENS), reference(TOKENS).logits)
    assert model.attention_kernel == "eager"
    assert model.identity == ours(family).identity


def test_what_auto_takes(ours):
    """Eager where the model caps attention scores, sdpa elsewhere."""
    kernels = {family: ours(family).attention_kernel for family in FAMILIES}
    assert kernels == dict.fromkeys(FAMILIES, "sdpa") | {"gemma2": "eager"}


def test_sdpa_asked_for(directory, ours):
    model = load_model(directory("llama"), device="cpu", attention="sdpa")
    assert model.attention_kernel == ours("llama").attention_kernel == "sdpa"
    assert_equal_activations(model, ours("llama"))


def test_bridge_keeps_eager(directory):
    model = load_model(directory("llama"), device="cpu", backend="transformer_lens", attention="eager")
    assert (model.attention_kernel, model.compiled) == ("eager", False)


# Arguments


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device_map": "spread"}, "device_map must be one of .*balanced.*got 'spread'"),
        ({"device_map": "auto", "device": "cpu"}, "device must be auto, got 'cpu' with device_map 'auto'"),
        ({"device_map": "auto", "compile": True}, "compile needs the model on one device, got device_map 'auto'"),
        ({"attention": "flash"}, "attention must be one of .*flash_attention_2.*got 'flash'"),
        ({"backend": "transformer_lens", "attention": "sdpa"}, "transformer_lens .*got attention 'sdpa'"),
        ({"backend": "transformer_lens", "compile": True}, "transformer_lens .*compile True"),
        ({"backend": "transformer_lens", "device_map": "auto"}, "transformer_lens .*device_map 'auto'"),
    ],
)
def test_settings_that_are_wrong_alone(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_model("nowhere/at-all", **setting)


def test_wrap_model_refuses_training_mode():
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        wrap_model(make_model("gpt2", 512).train(), make_tokenizer())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "vllm"}, "backend must be one of .*got 'vllm'"),
        ({"device": "warp"}, "device must be auto, cpu, cuda .*got 'warp'"),
        ({"device": "cpu", "dtype": "int8"}, "dtype must be auto or .*got 'int8'"),
    ],
)
def test_arguments_that_are_wrong_alone(setting, message, directory):
    with pytest.raises(ConfigError, match=message):
        load_model(directory("gpt2"), **setting)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "hf") for family in ("llama", "gpt2", "gpt_neox", "gemma2", "qwen2")),
        *((family, "transformer_lens") for family in ("llama", "gpt2")),
    ],
)
def test_a_folder_without_a_tokenizer_is_a_model_of_token_ids(family, backend, directory, ours, tmp_path):
    """transformers makes an empty tokenizer for some families, whose only tokens are special; others raise."""
    folder = shutil.copytree(directory(family), tmp_path / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    model = load_model(folder, device="cpu", backend=backend)
    assert model.tokenizer is None
    assert model.logits(TOKENS).shape == ours(family).logits(TOKENS).shape
    assert model.identity["content_sha256"] == ours(family).identity["content_sha256"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder, device="cpu", backend=backend)
