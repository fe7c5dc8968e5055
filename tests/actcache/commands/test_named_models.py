"""A model that only a cache names is loaded when the user has named it before, and not otherwise."""

import os

import pytest
from support.command_line import actcache
from support.tiny_caches import HOOKS

from actcache.commands.named_models import note_named, was_named

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "actcache" / "models.jsonl"


def test_a_name_is_noted_once_and_is_no_other_name(state, tmp_path):
    assert not was_named("openai-community/gpt2")
    for _ in range(2):
        note_named("openai-community/gpt2")
    note_named("a\nb")
    assert len(state.read_text().splitlines()) == 2
    assert [was_named(name) for name in ("openai-community/gpt2", "a\nb", "a", "b", "gpt2", "")] == [True, True] + [
        False
    ] * 4


def test_where_nothing_can_be_noted_the_user_is_asked_again(state, tmp_path):
    state.parent.parent.touch()
    note_named("openai-community/gpt2")
    assert not was_named("openai-community/gpt2")
    state.parent.parent.unlink()
    state.parent.mkdir(parents=True)
    (tmp_path / "victim").touch()
    os.link(tmp_path / "victim", state)
    note_named("openai-community/gpt2")
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
