"""A model or dataset that only a cache names is taken when the user has named it before, and not otherwise."""

import os
from pathlib import Path

import pytest
from support.command_line import actcache
from support.tiny_caches import HOOKS

from actcache.commands.named_sources import note_named, refuse_unnamed
from actcache.errors import ManifestError

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "actcache" / "models.jsonl"


def is_named(kind, source, revision=None):
    try:
        refuse_unnamed(kind, source, revision, Path("c"))
    except ManifestError:
        return False
    return True


def test_a_name_is_noted_once_and_is_no_other_name(state):
    assert not is_named("model", "openai-community/gpt2")
    for _ in range(2):
        note_named("model", "openai-community/gpt2", None)
    note_named("model", "a\nb", None)
    assert len(state.read_text().splitlines()) == 2
    for name in ("openai-community/gpt2", "a\nb"):
        assert is_named("model", name)
        assert not is_named("dataset", name)
    for name in ("a", "b", "gpt2", ""):
        assert not is_named("model", name)


def test_another_revision_is_another_name():
    """Anybody may add one at the hub."""
    note_named("model", "openai-community/gpt2", None)
    note_named("model", "openai-community/gpt2", "v1")
    assert is_named("model", "openai-community/gpt2", "v1")
    assert not is_named("model", "openai-community/gpt2", "refs/pr/13")
    note_named("model", "owner/other", "v1")
    assert not is_named("model", "owner/other")


def test_a_file_is_noted_by_its_whole_path(state, tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    note_named("dataset", "texts.jsonl", None)
    assert is_named("dataset", str(tmp_path / "texts.jsonl"))


def test_where_nothing_can_be_noted_the_user_is_asked_again(state, tmp_path):
    state.parent.parent.touch()
    note_named("model", "openai-community/gpt2", None)
    assert not is_named("model", "openai-community/gpt2")
    state.parent.parent.unlink()
    state.parent.mkdir(parents=True)
    (tmp_path / "victim").touch()
    os.link(tmp_path / "victim", state)
    note_named("model", "openai-community/gpt2", None)
    assert (tmp_path / "victim").read_text() == ""


def test_the_model_of_a_strangers_cache_is_loaded_when_it_was_named(copied, tiny_llama_dir, monkeypatch):
    sampled = ("verify", copied, "--sample-model", "--sequences", 1, "--device", "cpu")
    said = actcache(*sampled, code=1).stderr
    assert f"names the model {tiny_llama_dir}, which you have not named to actcache yet; if you trust it, pass" in said
    for path in (copied / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c" / "0").iterdir():
        path.unlink()
    assert "if you trust it" in actcache("repair", copied, "--device", "cpu", code=1).stderr
    actcache("repair", copied, "--device", "cpu", "--model", tiny_llama_dir)
    actcache(*sampled)


def test_what_was_harvested_here_needs_no_naming_again(tiny_llama_dir, tiny_texts, tmp_path):
    common = ("--model", tiny_llama_dir, "--dataset", tiny_texts, "--context-size", 16, "--tokens", 320)
    actcache("harvest", *common, "--hook", HOOKS[0], "--out", tmp_path / "c", "--device", "cpu")
    actcache("verify", tmp_path / "c", "--sample-model", "--sequences", 1, "--device", "cpu")


def test_the_dataset_of_a_strangers_cache_is_read_when_it_was_named(copied, tiny_llama_dir, tiny_texts):
    lost = copied / "acts.zarr" / "train" / "sequences" / "document" / "c" / "0"
    repaired = ("repair", copied, "--model", tiny_llama_dir, "--device", "cpu")
    for file in (found := [*lost.iterdir()]):
        file.unlink()
    said = actcache(*repaired, code=1).stderr
    assert f"names the dataset {tiny_texts}, which you have not named to actcache yet; if you trust it, pass" in said
    actcache(*repaired, "--dataset", tiny_texts)
    for file in found:
        file.unlink()
    actcache(*repaired)
