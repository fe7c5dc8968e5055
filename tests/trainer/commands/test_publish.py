"""`actcache report`, `export` and `import`: where they write, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from support.command_line import actcache
from support.foreign_saes import sparsify_folder
from support.tiny_saes import make_config, make_run

from trainer.formats.saelens import load_sae


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs", make_config("jumprelu"), {"name": "tiny", "revision": None})


def test_a_report_says_where_it_is(run: Path, tmp_path: Path) -> None:
    done = actcache("report", run.parent, "--out", tmp_path / "page.html")
    assert (done.stdout, done.stderr) == ("", f"report: {(tmp_path / 'page.html').resolve()}\n")
    assert run.name in (tmp_path / "page.html").read_text()


def test_an_export_is_the_sae_and_says_where_it_is(run: Path, tmp_path: Path) -> None:
    done = actcache("export", run, "--out", tmp_path / "out")
    assert (done.stdout, done.stderr) == ("", f"export: {(tmp_path / 'out').resolve()}\n")
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_sae(tmp_path / "out").encode(x), load_sae(run).encode(x))
    wrong = actcache("export", run, "--out", tmp_path / "other", "--format", "zip", code=2)
    assert "--format must be one of saelens, neuronpedia, got 'zip'" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_the_names_that_are_said_go_into_the_run(tmp_path: Path) -> None:
    folder = sparsify_folder(tmp_path, "transcoder", hookpoint="embed_in")
    names = ["--model-name", "mine", "--hook-name", "hook_embed", "--hook-name-out", "blocks.0.hook_mlp_out"]
    done = actcache("import", folder, "--out", tmp_path / "imported", *names)
    assert (done.stdout, done.stderr) == ("", f"import: {(tmp_path / 'imported').resolve()}\n")
    sae = load_sae(tmp_path / "imported")
    assert (sae.hook_name, sae.hook_name_out) == ("hook_embed", "blocks.0.hook_mlp_out")
    assert json.loads((tmp_path / "imported" / "config.json").read_text())["model"]["name"] == "mine"


@pytest.mark.parametrize(
    "options",
    [[], ["--release", "r"], ["--sae-id", "s"], ["DIR", "--release", "r"], ["DIR", "--sae-id", "s"]],
    ids=" ".join,
)
def test_a_folder_or_a_release_with_its_sae_but_not_both(options: list[str], tmp_path: Path) -> None:
    done = actcache("import", *options, "--out", tmp_path / "run", code=2)
    assert "import: name a folder DIR, or else a --release with its --sae-id" in done.stderr
    assert not (tmp_path / "run").exists()
