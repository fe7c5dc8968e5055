"""Models of strangers: nothing is fetched, no pickle is read unasked, and a file that is wrong is named in one line."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support.model_cases import TOKENS, one_line
from support.places import ROOT
from support.tiny_models import pickle_weights

from actcache.errors import ModelError
from actcache.models.load import load_model

NESTED = "[" * 100_000 + "]" * 100_000
REFUSED = r"must hold its weights as safetensors, and does not; .* pass --allow-pickle"


@pytest.fixture
def folder(directory, tmp_path) -> Path:
    """A tiny Llama, to be spoilt."""
    return Path(shutil.copytree(directory("llama"), tmp_path / "tiny"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("backend", ["hf", "transformer_lens"])
def test_a_pickle_of_weights_is_taken_only_if_it_is_allowed(backend, folder):
    expected = load_model(folder, device="cpu", backend=backend)
    pickle_weights(folder)
    with pytest.raises(ModelError, match=REFUSED) as error:
        load_model(folder, device="cpu", backend=backend)
    assert one_line(error)
    model = load_model(folder, device="cpu", backend=backend, allow_pickle=True)
    assert model.identity == expected.identity
    assert torch.equal(model.logits(TOKENS), expected.logits(TOKENS))


def test_a_pickle_that_is_allowed_runs_nothing(folder, tmp_path):
    """torch loads only tensors of it, and its advice to load it in another way is not passed on."""
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Touches(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle that holds more than tensors, and could run any code") as error:
        load_model(folder, device="cpu", allow_pickle=True)
    assert one_line(error)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/etc/passwd", 3])
def test_an_index_of_safetensors_names_only_safetensors_of_its_folder(name, folder):
    shutil.copy(folder / "model.safetensors", folder.parent)
    pickle_weights(folder)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"index.json: weight_map must name files .safetensors of the same fol"
    ) as error:
        load_model(folder, device="cpu")
    assert one_line(error)


def test_a_config_names_no_pickle_for_weights(folder):
    pickle_weights(folder).joinpath("pytorch_model.bin").rename(folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ModelError, match=r"config.json: transformers_weights must name files .safetensors of") as error:
        load_model(folder, device="cpu")
    assert one_line(error)


KERNELS = """
import pathlib
def get_kernel(name, *_, **__):
    pathlib.Path({canary!r}).touch()
    raise RuntimeError("there is no such kernel")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {{"__init__": lambda self, *_, **__: None}})
    return lambda *_, **__: lambda decorated: decorated
"""


FETCHING = (
    {"attn_implementation": "kernels-community/evil"},
    {"_attn_implementation": {"": "kernels-community/evil"}},
    {"attn_implementation": "flash_attention_2"},
    {"experts_implementation": "sonicmoe"},
    {"quantization_config": {"quant_method": "mxfp4"}},
)


def test_no_kernel_that_a_config_names_is_fetched(folder, tmp_path):
    """Where the package kernels is installed, transformers fetches them from the hub and runs them."""
    place, canary = tmp_path / "site", tmp_path / "canary"
    (place / "kernels-0.18.2.dist-info").mkdir(parents=True)
    (place / "kernels-0.18.2.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    (place / "kernels").mkdir()
    (place / "kernels" / "__init__.py").write_text(KERNELS.format(canary=str(canary)))
    spoilt = [Path(shutil.copytree(folder, tmp_path / str(number) / "tiny")) for number in range(len(FETCHING))]
    for path, values in zip(spoilt, FETCHING, strict=True):
        change(path / "config.json", **values)
    said = loaded_elsewhere(spoilt, PYTHONPATH=f"{ROOT}:{place}")
    assert not canary.exists()
    assert [line.startswith("ModelError: load_model: config.json of tiny: ") for line in said] == [True] * len(FETCHING)
    assert all("transformers would fetch code for; " in line for line in said)


class Hub(BaseHTTPRequestHandler):
    """The model owner/tiny of a hub, whose weights are a pickle. asked: the paths of all requests."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, whole: bool) -> None:
        self.asked.append(self.path)
        commit, path = "c" * 40, self.folder / self.path.rpartition("/")[2]
        content = json.dumps({"id": "owner/tiny", "sha": commit, "siblings": []}).encode()
        if "/resolve/" in self.path:
            content = path.read_bytes() if path.is_file() else b""
        is_there = bool(content) and not any(part in self.path for part in ("/discussions", "/tree/"))
        self.send_response(200 if is_there else 404)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        if not is_there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_nobody_on_the_hub_is_asked_to_convert_a_pickle(allow_pickle, folder, tmp_path):
    served = type("Served", (Hub,), {"folder": pickle_weights(folder), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        online = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0") | {"HF_HUB_DISABLE_XET": "1"}
        (said,) = loaded_elsewhere(["owner/tiny"], allow_pickle, **home, **online)
        server.shutdown()
    assert any(path.endswith("/config.json") for path in served.asked)
    assert [path for path in served.asked if "discussions" in path or "convert" in path] == []
    if allow_pickle:
        assert said == "loaded"
    else:
        assert "ModelError: load_model: 'owner/tiny' must hold its weights as safetensors, and does not; " in said
        assert [path for path in served.asked if path.endswith(".bin")] == []


LOADS = """
import sys
from actcache.models.load import load_model
for name in sys.argv[2:]:
    try:
        load_model(name, device="cpu", **({"allow_pickle": True} if sys.argv[1] == "True" else {}))
        print("loaded")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def loaded_elsewhere(models: Sequence[Path | str], allow_pickle: bool = False, **environment: str) -> list[str]:
    """What `load_model` says of each model in a process of its own: "loaded", or its error."""
    command = [sys.executable, "-c", LOADS, str(allow_pickle), *map(str, models)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


DAMAGES = (
    *((name, NESTED, f"{name} is nested too deep") for name in ("config.json", "tokenizer.json", "added_tokens.json")),
    *((name, NESTED, f"{name} is nested too deep") for name in ("tokenizer_config.json", "generation_config.json")),
    ("config.json", "null", "config.json must hold a JSON object"),
    ("config.json", '{"vocab_size": %s}' % ("9" * 5000), "config.json is damaged: Exceeds the limit"),
    ("tokenizer_config.json", '{"model_max_length": %s}' % ("9" * 5000), "tokenizer_config.json is damaged: Exceeds"),
    ("tokenizer.json", "[]", "tokenizer.json must hold a JSON object"),
    ("tokenizer.json", "{}", "a file of its tokenizer holds what it may not, KeyError: 'added_tokens'"),
    ("tokenizer_config.json", '{"bos_token": []}', "a file of its tokenizer holds what it may not, TypeError: "),
    ("tokenizer_config.json", '{"auto_map": 3}', "a file of its tokenizer holds what it may not, AttributeError: "),
    ("generation_config.json", "[]", "generation_config.json must hold a JSON object"),
    ("special_tokens_map.json", "3", "special_tokens_map.json must hold a JSON object"),
)


@pytest.mark.parametrize(("name", "text", "message"), DAMAGES, ids=lambda value: value[:30])
def test_a_file_that_is_no_object_or_too_deep_is_named(name, text, message, folder):
    (folder / name).write_text(text)
    with pytest.raises(ModelError) as error:
        load_model(folder, device="cpu")
    assert message in str(error.value)
    assert one_line(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 0, "must have one list 'layers' of 0 blocks"),
        ("num_hidden_layers", 10**6, "num_hidden_layers must be at most 2,000, got 1000000"),
        ("num_labels", 1 << 40, "num_labels must be at most 50,000, got 1099511627776"),
        ("num_labels", "x" * 10_000, "config.json holds what it may not, TypeError: "),
        ("hidden_act", "x" * 10_000, "config.json or the weights hold what they may not, KeyError: "),
        ("head_dim", 0, "config.json or the weights hold what they may not, ZeroDivisionError: "),
        ("model_type", [], "config.json holds what it may not, TypeError: "),
        ("save_pretrained", "x", "config.json of tiny must have no field 'save_pretrained'"),
        ("text_config", "x", "config.json of tiny: the config of its text must be an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_field_of_a_config_that_is_wrong_is_one_line(field, value, message, folder):
    change(folder / "config.json", **{field: value})
    with pytest.raises(ModelError) as error:
        load_model(folder, device="cpu")
    assert message in str(error.value)
    assert one_line(error)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "head_dim", "hidden_size"])
def test_a_config_asks_for_no_more_memory_than_there_is(field, folder):
    change(folder / "config.json", **{field: 1 << 34})
    with pytest.raises(MemoryError, match=r"the weights of tiny, as its config.json asks for them, may take "):
        load_model(folder, device="cpu")


def test_an_index_of_weights_that_is_damaged_is_named(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    for text in ("{}", NESTED, '{"weight_map": []}', '{"weight_map": 1e999}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"model.safetensors.index.json is damaged \(\w+\); get") as error:
            load_model(folder, device="cpu")
        assert one_line(error)


def test_a_file_that_is_a_large_hole_is_not_read(folder):
    os.truncate(folder / "tokenizer.json", 100 << 30)
    with pytest.raises(ModelError, match=r"tokenizer.json must have at most 268,435,456 bytes, has 107,374,182,400"):
        load_model(folder, device="cpu")
