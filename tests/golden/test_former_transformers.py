"""What an older transformers made goes on with the newest: models are the same, caches grow, runs are evaluated.

Each former version is in a folder of its own, into which `make test-long` installs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.command_line import actcache
from support.former_models import TOKENS
from support.places import CHILD, ROOT
from support.tiny_caches import write_texts
from support.tiny_models import FAMILIES

from actcache.models.load import load_model
from actcache.store.cache import open_cache

pytestmark = pytest.mark.long

FORMER = ROOT / ".venv" / "former"
VERSIONS = ("5.0.0", "5.12.1")  # the oldest that is supported; the last that named the head of a GPT-NeoX otherwise
HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")


def formerly(version: str, *arguments: object) -> None:
    """Run Python with an older transformers in the place of the newest."""
    paths = os.pathsep.join([str(FORMER / version), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**CHILD, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=VERSIONS)
def former(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(version, the folder of its models)."""
    said = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env={**CHILD, "PYTHONPATH": str(FORMER / request.param)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == request.param != transformers.__version__
    folder = tmp_path_factory.mktemp("former")
    formerly(request.param, "-m", "support.former_models", folder)
    return request.param, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same(family, former, tmp_path):
    _, folder = former
    known = json.loads((folder / "known.json").read_text())[family]
    model = load_model(folder / family, device="cpu")
    torch.testing.assert_close(model.logits(TOKENS), torch.tensor(known["logits"]))
    assert model.differences(known["identity"]) == []
    model._model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", device="cpu")
    assert again.differences(known["identity"]) == []
    others = [json.loads((folder / "known.json").read_text())[each] for each in FAMILIES if each != family]
    assert all(model.differences(other["identity"]) for other in others)


def test_a_cache_grows_and_its_run_is_evaluated(former, tmp_path):
    version, folder = former
    texts, cache, runs = write_texts(tmp_path / "texts.jsonl"), tmp_path / "cache", tmp_path / "runs"
    (tmp_path / "sweep.yaml").write_text(
        f"base: {{hook_name: {HOOKS[0]}, architecture: topk, d_sae: 32, k: 2, lr: 1.0e-3}}\ngrid: {{seed: [0]}}\n"
    )
    asked = ("--model", folder / "gpt_neox", "--dataset", texts, "--device", "cpu", "--context-size", 16)
    asked = ("harvest", *asked, "--holdout", 0.2, "--hook", HOOKS[0], "--out", cache)
    cli = ("-c", "import cli; cli.main()")
    formerly(version, *cli, *asked, "--tokens", 1024)
    formerly(version, *cli, "train", cache, tmp_path / "sweep.yaml", "--out", runs, "--device", "cpu")
    formerly(version, *cli, "eval", runs, "--device", "cpu")
    (before,) = (json.loads(path.read_text()) for path in runs.glob("topk-*/eval.json"))
    n_rows = open_cache(cache).n_rows("train")

    actcache("eval", runs, "--device", "cpu")  # on the rows of before
    (after,) = (json.loads(path.read_text()) for path in runs.glob("topk-*/eval.json"))
    assert after["ce_loss_with_sae"] == pytest.approx(before["ce_loss_with_sae"], rel=1e-6)
    actcache(*asked, "--tokens", 2048)
    actcache(*asked, "--hook", HOOKS[1])
    grown = open_cache(cache)
    assert grown.n_rows("train") > n_rows
    assert set(grown.hook_names) == set(HOOKS)
    assert "are what the model gives" in actcache("verify", cache, "--sample-model", "--device", "cpu").stderr
    actcache("eval", runs, "--device", "cpu")
