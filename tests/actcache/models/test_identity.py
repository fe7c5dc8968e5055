import json
import shutil
import warnings
from itertools import product

import pytest
import torch
from support.adapters import activated, disabled, scaled, with_adapters
from support.remote_code import RemoteCode
from support.tiny_models import FAMILIES, make_model, make_tokenizer

from actcache.errors import ModelError
from actcache.models.identity import CONTENT, content_sha256, state_of
from actcache.models.load import load_model, wrap_model

TOKENS = torch.arange(24).reshape(2, 12) * 17 % 512


def test_identity_is_the_model_not_the_place(directory, ours, bridge, tmp_path):
    moved = shutil.copytree(directory("llama"), tmp_path / "elsewhere" / "llama")
    expected = ours("llama").identity
    assert expected["name"] == "llama"
    assert expected["revision"] is None
    assert json.loads(json.dumps(expected)) == expected
    assert load_model(moved, device="cpu").identity == expected
    assert bridge("llama").identity == expected
    assert bridge("llama").differences({**expected, "probe": ours("llama").probe()}) == []


def test_identity_of_other_weights_dtype_and_config(directory, ours):
    expected = ours("llama").identity
    other_seed = wrap_model(make_model("llama", 512, seed=1), make_tokenizer(), name="llama").identity
    other_dtype = load_model(directory("llama"), device="cpu", dtype="bfloat16").identity
    assert other_seed["config"] == other_dtype["config"] == expected["config"]
    assert len({i[CONTENT] for i in (expected, other_seed, other_dtype)}) == 3
    assert len({json.dumps(ours(family).identity["config"]) for family in FAMILIES}) == len(FAMILIES)


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = make_model("gpt2", 16)
    with pytest.raises(ModelError, match="weight must have values, is on the meta device"):
        content_sha256(model)


# Which models are one model


def merged(model):
    model.merge_adapter()
    return model


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to another package
        return torch.ao.quantization.quantize_dynamic(make_model("llama", 512), {torch.nn.Linear}, dtype=torch.qint8)


def otherwise_quantised():
    model = quantised()
    packed = model.get_submodule("model.layers.1.mlp.up_proj")._packed_params
    weight, bias = packed._weight_bias()
    packed.set_weight_bias(torch._make_per_tensor_quantized_tensor(-weight.int_repr(), weight.q_scale(), 0), bias)
    return model


def untied(added=0.0):
    """A GPT-2 with the numbers of the embedding in an output head of its own; `added` to one of them."""
    model = make_model("gpt2", 512)
    head = model.lm_head.weight.detach().clone()
    head[7, 3] += added
    model.lm_head.weight = torch.nn.Parameter(head)
    return model


def exchanged(one, other):
    """A Llama with the values of two weights of a block exchanged."""
    model = make_model("llama", 512)
    first, second = (model.get_parameter(f"model.layers.1.{path}.weight") for path in (one, other))
    first.data, second.data = second.data, first.data
    return model


def renamed():
    """A Llama with a weight of each block under another name, registered before the others."""
    model = make_model("llama", 512)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp._modules = {"to_narrow": mlp._modules.pop("down_proj"), **mlp._modules}
        mlp.forward = lambda x, mlp=mlp: mlp.to_narrow(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return model


def configured(**settings):
    """A Llama with the same weights and other settings."""
    model = make_model("llama", 512)
    made = type(model)(type(model.config)(**{**model.config.to_dict(), **settings})).eval()
    made.load_state_dict(model.state_dict())
    return made


MATRIX = {
    "base": lambda: make_model("llama", 512),
    "other seed": lambda: make_model("llama", 512, seed=1),
    "first": with_adapters,
    "second": lambda: activated(with_adapters(), "second"),
    "both": lambda: activated(with_adapters(), "first", "second"),
    "scaled": lambda: scaled(with_adapters(), 2),
    "scaled up and down": lambda: scaled(scaled(with_adapters(), 4), 0.5),
    "disabled": lambda: disabled(with_adapters()),
    "merged": lambda: merged(with_adapters()),
    "merged and unloaded": lambda: with_adapters().merge_and_unload(),
    "first with a head": lambda: with_adapters(["lm_head"]),
    "second with a head": lambda: activated(with_adapters(["lm_head"]), "second"),
    "heads disabled": lambda: disabled(with_adapters(["lm_head"])),
    "int8": quantised,
    "other int8": otherwise_quantised,
    "renamed": renamed,
    "gate and up exchanged": lambda: exchanged("mlp.gate_proj", "mlp.up_proj"),
    "key and value exchanged": lambda: exchanged("self_attn.k_proj", "self_attn.v_proj"),
    "other norm": lambda: configured(rms_norm_eps=1e-2),
    "other positions": lambda: configured(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "other training": lambda: configured(attention_dropout=0.5, initializer_range=1.0),
    "tied": lambda: make_model("gpt2", 512),
    "untied": untied,
    "other head": lambda: untied(added=1.0),
}
THE_SAME = (
    {"base", "disabled", "heads disabled", "renamed", "other training"},
    {"scaled", "scaled up and down"},
    {"merged", "merged and unloaded"},
    {"tied", "untied"},
)


@pytest.fixture(scope="module")
def matrix():
    """Name -> the model of each row."""
    return {name: wrap_model(make(), make_tokenizer(), name=name) for name, make in MATRIX.items()}


def test_identities_are_equal_exactly_where_outputs_are(matrix):
    logits = {name: model.logits(TOKENS) for name, model in matrix.items()}
    known = {name: {**model.identity, "probe": model.probe()} for name, model in matrix.items()}
    for one, other in product(matrix, matrix):
        same = one == other or any({one, other} <= group for group in THE_SAME)
        assert torch.equal(logits[one], logits[other]) == same, (one, other)
        assert (matrix[other].differences(known[one]) == []) == same, (one, other)


def test_what_differs_is_said(matrix):
    known = {name: {**model.identity, "probe": model.probe()} for name, model in matrix.items()}
    for name, words in {
        "second": "its weights are others (content_sha256 ",
        "other norm": "config.rms_norm_eps is 1e-06 there, 0.01 here",
        "other positions": "config.rope_parameters.rope_theta is 10000.0 there, 500.0 here",
        "gate and up exchanged": "it computes other values for the same tokens (",
    }.items():
        (difference,) = matrix[name].differences(known["base"])
        assert difference.startswith(words)


def test_an_adapter_that_is_switched_later_counts():
    module = with_adapters()
    model = wrap_model(module, make_tokenizer(), name="adapted")
    first, known = model.identity, {**model.identity, "probe": model.probe()}
    activated(module, "second")
    assert model.differences(known)
    activated(module, "first")
    assert model.identity == first
    scaled(module, 0.5)
    assert model.differences(known)
    scaled(module, 2)
    with torch.no_grad():
        module.get_parameter("base_model.model.model.norm.weight")[0] += 1
    assert model.differences(known)


def test_the_hash_of_a_quantised_model_is_one():
    """Its integers are made for the asking, each of them perhaps where one lay that is gone."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to another package
        model = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(64))), {torch.nn.Linear}, dtype=torch.qint8
        )
    assert len({content_sha256(model) for _ in range(20)}) == 1
    known = state_of(model)
    assert known == state_of(model)
    packed = model[40]._packed_params
    weight, bias = packed._weight_bias()
    packed.set_weight_bias(torch._make_per_tensor_quantized_tensor(-weight.int_repr(), weight.q_scale(), 0), bias)
    assert known != state_of(model)


def test_of_an_imported_cache_only_the_name_is_known():
    model = wrap_model(make_model("gpt2", 512), make_tokenizer(), name="openai-community/gpt2")
    unknown = {"revision": None, "config_sha256": None, "weights_sha256": None}
    assert model.differences({"name": "gpt2-small", **unknown}) == []
    (name,) = model.differences({"name": "gpt2-medium", **unknown})
    assert name == "its name is 'gpt2-medium' there, 'openai-community/gpt2' here"


def test_a_config_with_more_or_fewer_keys_is_the_same_model(ours):
    """Another version of transformers knows other keys; what a key does that only one knows, the probe tells."""
    model = ours("llama")
    known = {**model.identity, "probe": model.probe()}
    assert model.differences({**known, "config": {**known["config"], "new_key": True}}) == []
    assert model.differences({**known, "config": {k: v for k, v in known["config"].items() if k != "head_dim"}}) == []
    assert model.differences({**known, "config": {**known["config"], "head_dim": 9}}) != []


def test_the_code_that_a_model_brings_is_part_of_its_identity(directory, ours, tmp_path):
    made = RemoteCode(directory("llama"), tmp_path)
    plain = load_model(made.model("own", model_type="llama"), device="cpu").identity
    first, again, other = (
        load_model(
            made.model(f"{place}/own", comment=comment, model_type="llama"), device="cpu", trust_remote_code=True
        ).identity
        for place, comment in (("a", "one"), ("b", "one"), ("c", "another"))
    )
    assert set(plain) == set(ours("llama").identity) == set(first) - {"code_sha256"}
    assert first == again
    assert {**first, "code_sha256": ""} == {**other, "code_sha256": ""}
    assert first["code_sha256"] != other["code_sha256"]
    trusted = load_model(directory("llama"), device="cpu", trust_remote_code=True).identity
    assert trusted == ours("llama").identity
