"""How a model may be loaded: spread by accelerate, with a chosen attention kernel; neither changes what it is."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from support.tiny_models import FAMILIES, make_model, make_model_dir, make_tokenizer
from transformers import AutoModelForCausalLM

from actcache.errors import ConfigError, ModelError
from actcache.models.identity import weights_sha256
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model, wrap_model

TOKENS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))
HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
# gpt2 and gemma2 tie the output head to the embedding, llama does not
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gemma2": "model.layers"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: make_model_dir(family, tmp_path_factory.mktemp("models") / family))


@pytest.fixture(scope="module")
def plain(directory) -> Callable[[str], LanguageModel]:
    return cache(lambda family: load_model(directory(family), device="cpu"))


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
def test_model_that_is_partly_or_wholly_on_disk(family, on_disk, directory, plain, tmp_path):
    """Parameters on disk are on the "meta" device but while their module runs; it is the same model all the time."""
    blocks, expected = BLOCKS[family], plain(family)
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
def test_model_in_host_memory(family, plain):
    """accelerate.cpu_offload leaves tied parameters as two."""
    model = make_model(family, 512)
    expected = wrap_model(model, make_tokenizer(), name="tiny").identity
    offloaded = wrap_model(cpu_offload(model, torch.device("cpu")), make_tokenizer(), name="tiny")
    assert offloaded.identity == expected
    assert_equal_activations(offloaded, plain(family))
    assert_begins_anywhere(offloaded)


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="weight must have values, is on the meta device"):
        weights_sha256(model)


# Attention


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_eager_attention_equals_transformers_bit_for_bit(family, directory, plain):
    model = load_model(directory(family), device="cpu", attention="eager")
    reference = AutoModelForCausalLM.from_pretrained(directory(family), attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model.logits(TOKENS), reference(TOKENS).logits)
    assert model.attention_kernel == "eager"
    assert model.identity == plain(family).identity


def test_what_auto_takes(plain):
    """Eager where the model caps attention scores, sdpa elsewhere."""
    kernels = {family: plain(family).attention_kernel for family in FAMILIES}
    assert kernels == dict.fromkeys(FAMILIES, "sdpa") | {"gemma2": "eager"}


def test_sdpa_asked_for(directory, plain):
    model = load_model(directory("llama"), device="cpu", attention="sdpa")
    assert model.attention_kernel == plain("llama").attention_kernel == "sdpa"
    assert_equal_activations(model, plain("llama"))


def test_bridge_keeps_eager(directory):
    model = load_model(directory("llama"), device="cpu", backend="transformer_lens", attention="eager")
    assert (model.attention_kernel, model.compiled) == ("eager", False)


def assert_one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def test_sdpa_where_the_model_has_none(directory):
    with pytest.raises(ModelError, match=r"Gemma2.* does not support .*scaled_dot.*; pass --attention auto") as error:
        load_model(directory("gemma2"), device="cpu", attention="sdpa")
    assert_one_line(error)


@pytest.mark.parametrize(("dtype", "got"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_flash_attention_needs_cuda(dtype, got, directory):
    with pytest.raises(ModelError, match=rf"needs a CUDA device .* got cpu and {got}; pass --attention auto") as error:
        load_model(directory("llama"), device="cpu", dtype=dtype, attention="flash_attention_2")
    assert_one_line(error)


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
