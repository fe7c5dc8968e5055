"""A LoRA adapter computes what peft computes with it; of a stranger's nothing is imported and no memory is taken."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import save_adapter
from support.model_cases import one_line
from transformers import AutoModelForCausalLM

from actcache.errors import ConfigError, ModelError
from actcache.models.adapters import WEIGHTS
from actcache.models.load import load_model, wrap_model
from actcache.models.model_files import ADAPTER

TOKENS = torch.tensor([[0, 5, 9, 3, 44, 7]])
COMMIT = "c" * 40
KINDS = {
    "attention": {},
    "a regular expression": {"target_modules": r".*\.(1|2)\..*_proj", "exclude_modules": r".*gate.*"},
    "all linear layers, other ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"up_proj": 5},
    },
    "scaled by the root of the rank": {"use_rslora": True, "lora_alpha": 3},
    "magnitudes": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "some layers": {"layers_to_transform": [2], "layers_pattern": "layers"},
    "biases": {"lora_bias": True},
}


@pytest.fixture
def adapter(tiny_llama_dir, tmp_path) -> Path:
    return save_adapter(tiny_llama_dir, tmp_path / "adapter")


def change(folder: Path, **values: object) -> None:
    path = folder / ADAPTER
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # peft asks transformers by names that are going away
def test_it_computes_what_peft_computes(kind, tiny_llama_dir, tmp_path):
    folder = save_adapter(tiny_llama_dir, tmp_path / "adapter", **KINDS[kind])
    change(folder, base_model_name_or_path="stranger/base")  # which nobody asks for
    loaded = load_model(tiny_llama_dir, adapter=folder, device="cpu")
    truth = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), folder).eval()
    hook = "blocks.2.hook_resid_pre"
    with torch.no_grad():
        expected = truth(TOKENS, output_hidden_states=True)
    assert torch.equal(loaded.logits(TOKENS), expected.logits)
    assert torch.equal(loaded.activations(TOKENS, [hook])[hook], expected.hidden_states[2])
    assert not torch.equal(load_model(tiny_llama_dir, device="cpu").logits(TOKENS), expected.logits)
    assert loaded.differences(wrap_model(truth, loaded.tokenizer, name="wrapped").identity) == []
    assert loaded.identity["name"] == f"{tiny_llama_dir.name}+adapter"


def test_an_adapter_of_a_hub_name_is_of_a_commit(adapter, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--lora"
    shutil.copytree(adapter, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    loaded = load_model(tiny_llama_dir, adapter="owner/lora", device="cpu")
    assert loaded.adapter is not None
    assert (loaded.adapter.source, loaded.adapter.revision) == ("owner/lora", COMMIT)
    here = load_model(tiny_llama_dir, adapter=adapter, device="cpu")
    assert {**here.identity, "name": ""} == {**loaded.identity, "name": ""}


STRANGE = {
    "of another kind": ({"peft_type": "IA3"}, "must be of LoRA, is of 'IA3'; merge it"),
    "of no kind": ({"peft_type": None}, "must be of LoRA, is of None"),
    "a package to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        "plain LoRA, has 'megatron_config'",
    ),
    "layers many times": ({"layer_replication": [[0, 3]] * 10**4}, "must be plain LoRA, has 'layer_replication'"),
    "only after some tokens": ({"alora_invocation_tokens": [5]}, "has 'alora_invocation_tokens'; merge it"),
    "what nobody knows yet": ({"use_something": True}, "must be plain LoRA, has 'use_something'"),
    "another rank": ({"r": 3}, "does not fit tiny-llama: .*size mismatch"),
    "a rank that fills the memory": ({"r": 1 << 40}, "does not fit tiny-llama: "),
    "no rank": ({"r": 0}, "does not fit tiny-llama: "),
    "words as a rank": ({"r": "2"}, "adapter_config.json that is malformed: r; get it again"),
    "an endless expression": ({"rank_pattern": {"(a+)+b": 2}}, "malformed: the names of a pattern"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_plain_lora_is_one_line(kind, adapter, tiny_llama_dir):
    values, words = STRANGE[kind]
    change(adapter, **values)
    tracemalloc.start()
    with pytest.raises(ModelError, match=words.replace("tiny-llama", tiny_llama_dir.name)) as error:
        load_model(tiny_llama_dir, adapter=adapter, device="cpu")
    assert one_line(error)
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


def without_one(tensors):
    return dict(list(tensors.items())[1:])


FILES = {
    "no config": (lambda folder: (folder / ADAPTER).unlink(), "must hold adapter_config.json, and does not"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "must hold adapter_model.safetensors, and does not"),
    "no JSON": (lambda folder: (folder / ADAPTER).write_text("{"), "adapter_config.json that cannot be read"),
    "a list": (lambda folder: (folder / ADAPTER).write_text("[]"), "adapter_config.json that cannot be read"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_text("x"), "adapter_model.safetensors that cannot be"),
    "a weight less": (
        lambda folder: save_file(without_one(load_file(folder / WEIGHTS)), folder / WEIGHTS),
        "1 weights are missing or too many, such as .*lora_",
    ),
    "a weight more": (
        lambda folder: save_file(load_file(folder / WEIGHTS) | {"x": torch.ones(1)}, folder / WEIGHTS),
        "1 weights are missing or too many, such as .*x",
    ),
    "other weights": (lambda folder: save_file({"x": torch.ones(1)}, folder / WEIGHTS), "has no LoRA weights"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_adapter_is_one_line(what, adapter, tiny_llama_dir):
    damage, words = FILES[what]
    damage(adapter)
    with pytest.raises(ModelError, match=words) as error:
        load_model(tiny_llama_dir, adapter=adapter, device="cpu")
    assert one_line(error)


def test_an_adapter_of_another_model_is_one_line(adapter, directory):
    with pytest.raises(ModelError, match=r"does not fit .*: Target modules") as error:
        load_model(directory("gpt2"), adapter=adapter, device="cpu")
    assert one_line(error)


def test_an_adapter_that_is_nowhere_is_one_line(tiny_llama_dir, tmp_path):
    for source in (tmp_path / "none", "owner/none"):
        with pytest.raises(ModelError, match=r"cannot load the adapter .*; pass a folder with an adapter") as error:
            load_model(tiny_llama_dir, adapter=source, device="cpu")
        assert one_line(error)


def test_without_peft_the_way_out_is_said(adapter, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr("actcache.models.adapters.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs peft, which is not installed; pip install 'actcache\[peft\]'"):
        load_model(tiny_llama_dir, adapter=adapter, device="cpu")


def test_the_bridge_takes_no_adapter(adapter, tiny_llama_dir):
    with pytest.raises(ConfigError, match="backend transformer_lens runs no adapter"):
        load_model(tiny_llama_dir, adapter=adapter, backend="transformer_lens", device="cpu")
