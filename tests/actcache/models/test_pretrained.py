"""A model that is missing, damaged or half there is one clear line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import ClassVar
from zlib import crc32

import pytest
import torch
from support.model_cases import TOKENS, hook_names, one_line
from support.places import CHILD
from support.remote_code import RemoteCode
from support.strangers import as_another_user, only_root
from support.tiny_models import D_MODEL, make_model, make_tokenizer
from transformers import AutoModel

from actcache.errors import ModelError
from actcache.models.load import load_model, wrap_model
from actcache.models.pretrained import check_flash_attention, load_config, weights_bytes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_model_without_a_head(directory, ours, tmp_path):
    """Activations as ever; logits are an error. The same for a checkpoint that was saved without its head."""
    headless = AutoModel.from_pretrained(directory("llama"))
    headless.save_pretrained(tmp_path / "headless")
    make_tokenizer().save_pretrained(tmp_path / "headless")
    names = hook_names("llama")
    expected = ours("llama").activations(TOKENS, names)
    for model in (wrap_model(headless, make_tokenizer()), load_model(tmp_path / "headless", device="cpu")):
        x = model.activations(TOKENS, names)
        assert all(torch.equal(x[name], expected[name]) for name in names)
        with pytest.raises(ModelError, match="no output head"):
            model.logits(TOKENS)


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./no-such-dir", "~/no-such-dir", "a/b/c", "model.safetensors", "m/x.gguf"]
)
def test_missing_directory(name):
    with pytest.raises(ModelError, match="no directory"):
        load_model(name)


@only_root
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_not_called_missing(directory, tmp_path, name):
    copied = shutil.copytree(directory("llama"), tmp_path / "model")
    for path in copied.iterdir():
        path.chmod(0o600 if path.name == name else 0o644)
    with as_another_user(copied), pytest.raises(ModelError, match=f"this user may not read {copied / name}; "):
        load_model(copied)


def test_a_hub_name_whose_owner_is_a_folder_here_may_be_either(tmp_path, monkeypatch):
    """The tests are offline, so the hub has nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(
        ModelError, match="cannot load 'models/tiny': the folder models is here and lacks it; the hub: "
    ):
        load_model("models/tiny")


def test_missing_hub_name():
    with pytest.raises(ModelError, match="cannot load 'no-such-owner/no-such-model' at revision v1") as error:
        load_model("no-such-owner/no-such-model", revision="v1")
    assert one_line(error)


def test_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def broken(source: Path, target: Path, file_name: str, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(source, target)
    (target / file_name).write_bytes(change((target / file_name).read_bytes()))
    return target


@pytest.mark.parametrize(
    ("file_name", "change", "message"),
    [
        ("config.json", lambda text: text[:20], "cannot load"),
        ("config.json", lambda text: text.replace(b'"hidden_size": 32', b'"hidden_size": "wide"'), "cannot load"),
        ("config.json", lambda text: text.replace(b'"llama"', b'"unheard-of"'), "cannot load.*unheard-of"),
        ("config.json", lambda text: text.replace(b'_layers": 3', b'_layers": 4'), "9 are missing.*layers.3"),
        ("config.json", lambda text: text.replace(b'_size": 48', b'_size": 64'), "another shape.*layers.0.mlp"),
        ("model.safetensors", lambda data: data[:-100], "cannot load"),
        ("tokenizer.json", lambda text: text[:-100], "cannot load"),
    ],
)
def test_damaged_directory(file_name, change, message, directory, tmp_path):
    with pytest.raises(ModelError, match=message) as error:
        load_model(broken(directory("llama"), tmp_path / "broken", file_name, change), device="cpu")
    assert one_line(error)


@pytest.mark.parametrize("backend", ["hf", "transformer_lens"])
def test_loading_prints_nothing_whatever_the_path_says(backend, directory, tmp_path, capfd):
    """A path with another family's name in it leads nobody astray."""
    path = shutil.copytree(directory("gpt2"), tmp_path / "llama-gemma-mistral")
    capfd.readouterr()
    model = load_model(path, device="cpu", backend=backend)
    model.logits(TOKENS)
    assert capfd.readouterr() == ("", "")
    assert model.hook_widths(["blocks.0.hook_resid_mid"]) == {"blocks.0.hook_resid_mid": D_MODEL}


def test_sdpa_does_not_cap_attention_logits(directory):
    with pytest.raises(
        ModelError, match="gemma2 caps its attention logits, which sdpa does not; pass --attention"
    ) as error:
        load_model(directory("gemma2"), device="cpu", attention="sdpa")
    assert one_line(error)


@pytest.mark.parametrize(("dtype", "got"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_flash_attention_needs_cuda(dtype, got, directory):
    with pytest.raises(ModelError, match=rf"needs a CUDA device .* got cpu and {got}; pass --attention auto") as error:
        load_model(directory("llama"), device="cpu", dtype=dtype, attention="flash_attention_2")
    assert one_line(error)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_no_kernel_is_fetched_from_the_hub_in_place_of_flash_attn(ours):
    with pytest.raises(ModelError, match="needs the package flash_attn, which is not installed") as error:
        check_flash_attention(torch.device("cuda"), torch.bfloat16, ours("llama")._model.config)
    assert one_line(error)


@pytest.fixture
def remote_code(directory, tmp_path, monkeypatch) -> RemoteCode:
    """Whoever asks the terminal is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return RemoteCode(directory("llama"), tmp_path)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("backend", ["hf", "transformer_lens"])
def test_code_of_a_model_is_refused_in_one_line_and_nobody_is_asked(part, backend, remote_code):
    path = getattr(remote_code, part)("own")
    with pytest.raises(ModelError, match=r"own' brings code of its own, .* pass --trust-remote-code") as error:
        load_model(path, device="cpu", backend=backend)
    assert one_line(error)
    assert remote_code.ran == set()


def test_code_that_loading_does_not_need_does_not_run(remote_code, ours):
    model = load_model(remote_code.elsewhere("own"), device="cpu")
    assert torch.equal(model.logits(TOKENS), ours("llama").logits(TOKENS))
    assert remote_code.ran == set()


def test_code_of_a_model_runs_for_those_who_trust_it(remote_code, bridge):
    model = load_model(remote_code.model("own"), device="cpu", backend="transformer_lens", trust_remote_code=True)
    assert remote_code.ran == {"config"}
    assert torch.equal(model.logits(TOKENS), bridge("llama").logits(TOKENS))


def test_where_transformers_has_the_model_itself_its_own_code_runs(remote_code, ours):
    model = load_model(remote_code.model("llama", model_type="llama"), device="cpu")
    assert remote_code.ran == set()
    assert torch.equal(model.logits(TOKENS), ours("llama").logits(TOKENS))


def test_code_that_fails_is_one_line(remote_code):
    path = remote_code.model("own")
    (path / "config.py").write_text("raise ZeroDivisionError('a fault of its own')")
    with pytest.raises(ModelError, match=r"cannot load .*own': a fault of its own; check the name") as error:
        load_model(path, device="cpu", trust_remote_code=True)
    assert one_line(error)


INDEX = '{"metadata": {"total_size": %s}, "weight_map": {}}'


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_llama_dir, tmp_path):
    """1,000 GB of weights, which are a hole in a file: on a CPU without room the kernel would end the process."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "large"))
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    config, n_bytes = load_config(str(folder), None, False), weights.stat().st_size
    index.write_text(INDEX % 5e12)  # is not looked at: the weights are in one file
    for dtype in (torch.float32, torch.bfloat16):
        found = weights_bytes(str(folder), None, config, dtype, allow_pickle=False)
        assert found == n_bytes * dtype.itemsize // config.dtype.itemsize
    os.truncate(weights, 10**12)
    with pytest.raises(MemoryError, match=r"the weights of large may take \d{4}\.\d\d GB"):
        load_model(folder, device="cpu")
    weights.rename(folder / "consolidated.safetensors")
    with pytest.raises(MemoryError, match="the weights of large may take"):
        load_model(folder, device="cpu")
    for total in ('"all"', "1e999", "[]", "{"):
        index.write_text(INDEX % total)
        assert weights_bytes(str(folder), None, config, torch.float32, allow_pickle=True) == 0
    index.unlink()
    assert weights_bytes(str(folder), None, config, torch.float32, allow_pickle=True) == 0
    (folder / "consolidated.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MemoryError, match="the weights of large may take"):
        load_model(folder, device="cpu", allow_pickle=True)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_weights_of_a_hub_name_that_do_not_fit(revision, tiny_llama_dir, tmp_path, monkeypatch):
    """They are found where an earlier download has left them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = shutil.copytree(tiny_llama_dir, tmp_path / "models--owner--large" / "snapshots" / COMMIT)
    reference = snapshot.parent.parent / "refs" / (revision or "main")
    reference.parent.mkdir()
    reference.write_text(COMMIT)
    blob = (snapshot / "model.safetensors").rename(tmp_path / "blob")
    (snapshot / "model.safetensors").symlink_to(blob)
    load_model("owner/large", revision=revision, device="cpu")  # as it is, there is room for it
    os.truncate(blob, 10**12)
    with pytest.raises(MemoryError, match=r"the weights of owner/large may take \d{4}\.\d\d GB"):
        load_model("owner/large", revision=revision, device="cpu")


class Hub(SimpleHTTPRequestHandler):
    """A hub with the files of one model."""

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.rpartition("/")[2])

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{crc32(self.path.encode())}"')
        super().end_headers()


def test_of_weights_at_the_hub_only_the_index_is_fetched(tiny_llama_dir, tmp_path):
    """It tells how much memory they take."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(INDEX % 5e12)
    code = """
from actcache.models.pretrained import load_config, weights_bytes
config = load_config("owner/large", None, False)
print(weights_bytes("owner/large", None, config, config.dtype, allow_pickle=True))
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=folder)) as server:
        Thread(target=server.serve_forever).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        asked = [sys.executable, "-c", code]
        done = subprocess.run(asked, env={**CHILD, **here, **online}, capture_output=True, text=True)
        server.shutdown()
    assert (done.stdout, done.returncode) == ("5000000000000\n", 0), done.stderr
    fetched = {path.name for path in (tmp_path / "home").glob("hub/*/snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors.index.json"}


OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The folder where the hub's files are kept, and nothing in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def kept(hub_cache: Path, model: Path, commit: str, revision: str | None = "main") -> Path:
    """Keep the files of a model as a download of `owner/model` does; returns their folder."""
    repository = hub_cache / "models--owner--model"
    if revision is not None:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(model, repository / "snapshots" / commit))


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_the_commit_of_a_hub_name_is_recorded(revision, tiny_llama_dir, hub_cache):
    kept(hub_cache, tiny_llama_dir, COMMIT, revision if revision in ("v1", None) else "main")
    if revision is None:
        kept(hub_cache, tiny_llama_dir, OTHER, "main")
    model = load_model("owner/model", revision=revision, device="cpu")
    assert model.identity["revision"] == (OTHER if revision is None else COMMIT)
    assert model.source == "owner/model"


def test_a_directory_has_no_commit(tiny_llama_dir):
    assert load_model(tiny_llama_dir, device="cpu").identity["revision"] is None


class TwoCommits(Hub):
    """A hub whose branch has moved to OTHER since config.json was fetched; `served` notes what it was asked for."""

    served: ClassVar[list[str]] = []

    def translate_path(self, path: str) -> str:
        *_, revision, name = path.partition("?")[0].split("/")
        self.commit = COMMIT if revision == COMMIT else OTHER
        self.served.append(f"{self.commit}/{name}")
        return str(Path(self.directory) / self.commit / name)

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{crc32((self.commit + self.path).encode())}"')
        SimpleHTTPRequestHandler.end_headers(self)


def test_config_tokenizer_and_weights_are_of_one_commit(tiny_llama_dir, hub_cache, tmp_path):
    """config.json is here, and the weights are not; meanwhile the branch has other weights."""
    for commit, seed in ((COMMIT, 0), (OTHER, 1)):
        shutil.copytree(tiny_llama_dir, tmp_path / "served" / commit)
        make_model("llama", 512, seed=seed).save_pretrained(tmp_path / "served" / commit)
    begun = kept(tmp_path / "home" / "hub", tiny_llama_dir, COMMIT)
    for path in begun.iterdir():
        if path.name != "config.json":
            path.unlink()
    code = """
import json
from actcache.models.load import load_model
print(json.dumps(load_model("owner/model", device="cpu").identity))
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(TwoCommits, directory=tmp_path / "served")) as server:
        Thread(target=server.serve_forever).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        asked = [sys.executable, "-c", code]
        done = subprocess.run(asked, env={**CHILD, **here, **online}, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    expected = load_model(tmp_path / "served" / COMMIT, device="cpu").identity
    assert json.loads(done.stdout) == {**expected, "name": "owner/model", "revision": COMMIT}
    assert {line.partition("/")[0] for line in TwoCommits.served if line.endswith((".safetensors", ".json"))} == {
        COMMIT
    }


ADAPTER = '{"base_model_name_or_path": "stranger/base", "peft_type": "LORA"}'
ADAPTS = r"holds an adapter of .?stranger/base.?, not a whole model; pass that model, and the adapter as --adapter"


@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_with_an_adapter_is_said_to_be_one(alone, tiny_llama_dir, tmp_path):
    """With a whole model beside it the adapter would be left out, or, with peft, another model be loaded."""
    folder = tmp_path / "adapter"
    folder.mkdir() if alone else shutil.copytree(tiny_llama_dir, folder)
    (folder / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(ModelError, match=ADAPTS) as error:
        load_model(folder, device="cpu")
    assert one_line(error)
    for damaged in ("{", "[]", "{}"):
        (folder / "adapter_config.json").write_text(damaged)
        with pytest.raises(ModelError, match="holds an adapter of another model"):
            load_model(folder, device="cpu")


def test_a_hub_name_with_an_adapter_is_said_to_be_one(tiny_llama_dir, hub_cache, tmp_path):
    adapted = Path(shutil.copytree(tiny_llama_dir, tmp_path / "adapted"))
    (adapted / "adapter_config.json").write_text(ADAPTER)
    config = kept(hub_cache, adapted, COMMIT) / "config.json"
    for _ in range(2):
        with pytest.raises(ModelError, match=ADAPTS):
            load_model("owner/model", device="cpu")
        config.unlink(missing_ok=True)  # then there is nothing but the adapter
