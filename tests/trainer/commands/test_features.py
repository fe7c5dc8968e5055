"""`actcache features`, `steer`, `similar`, `stability`: what their options mean, and runs whose model nobody knows."""

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import actcache
from support.tiny_caches import HOOKS
from support.tiny_saes import make_config, make_run

from actcache.commands.remembered import ModelOfCache
from actcache.errors import ConfigError
from actcache.store.cache import open_cache
from trainer.commands.features import STEERINGS, _change, built_features, describe
from trainer.features.read import open_features
from trainer.features.words import has_words
from trainer.interventions.splice import Add, Clamp, Scale


@pytest.fixture
def run(tiny_cache, tmp_path: Path) -> Path:
    return make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])


def test_what_each_mode_of_steering_does() -> None:
    assert _change("add", 4.0) == Add(4.0)
    assert _change("scale", 0.5) == Scale(0.5)
    assert _change("clamp", 0.0) == Clamp(0.0), "a strength of 0 is one"
    assert _change("ablate", None) == Clamp(0.0)
    for mode in STEERINGS:
        with pytest.raises(ConfigError, match="must be given with add, scale and clamp, and left out with ablate"):
            _change(mode, 1.0 if mode == "ablate" else None)
    with pytest.raises(ConfigError, match="--mode must be one of add, scale, clamp, ablate, got 'push'"):
        _change("push", 1.0)


def test_a_rate_is_of_what_was_encoded_in_this_call(run: Path, tiny_cache) -> None:
    built, rate = built_features(run, tiny_cache, "cpu")
    assert rate is not None
    assert rate > 0
    again, no_rate = built_features(run, tiny_cache, "cpu")
    assert no_rate is None, "they were there already"
    assert again.n_fired.tolist() == built.n_fired.tolist()


def test_words_are_written_once(run: Path, tiny_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    built_features(run, tiny_cache, "cpu")
    describe(run, tiny_cache, ModelOfCache(device="cpu"))
    assert has_words(run)

    def none_is_loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded for words that are there")

    monkeypatch.setattr(ModelOfCache, "load", none_is_loaded)
    describe(run, tiny_cache, ModelOfCache(device="cpu"))


def test_the_features_of_a_cache_that_forgot_its_model_have_no_words(run: Path, tiny_cache, tmp_path, capsys) -> None:
    forgetful = open_cache(shutil.copytree(tiny_cache.path, tmp_path / "cache"))
    origin = forgetful.path / "log" / "origin.json"
    origin.write_text(json.dumps({**forgetful.origin, "model": None}))  # as of a model that was in memory
    describe(run, forgetful, ModelOfCache(device="cpu"))
    assert capsys.readouterr().err == (
        f"{run}: a report cannot show its features, for nobody knows the model; pass --model\n"
    )
    assert not has_words(run)


def test_features_of_a_named_cache(run: Path, tiny_cache) -> None:
    asked = ["features", run, "--cache", tiny_cache.path, "--device", "cpu"]
    found = json.loads(actcache(*asked, "--top", 2, "--json").stdout)
    features = open_features(run)
    fired = features.n_fired.tolist()
    assert [row["feature"] for row in found["features"]] == sorted(range(48), key=lambda i: -fired[i])[:2]
    assert found["never_fired"] == fired.count(0)
    assert "features: --predict says what --text adds to a logit; give --text too" in (
        actcache(*asked, "--predict", " the", code=2).stderr
    )


def test_steering_takes_the_model_of_a_named_cache(run: Path, tiny_cache, tiny_llama_dir) -> None:
    """The run remembers a cache that is not there; later it remembers none."""
    sampled = ["--tokens", 3, "--temperature", 0, "--device", "cpu", "--json"]
    asked = ["steer", run, "--feature", 3, "--strength", 9, "--text", "The cat", *sampled]
    assert "not a cache" in actcache(*asked, code=1).stderr
    found = actcache(*asked, "--cache", tiny_cache.path).stdout
    assert found == actcache(*asked, "--model", tiny_llama_dir).stdout
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "cache"}))
    assert "train first, or pass --cache or --model" in actcache(*asked, code=1).stderr
    assert found == actcache(*asked, "--cache", tiny_cache.path).stdout
    assert found == actcache(*asked, "--cache", tiny_cache.path, "--model", tiny_llama_dir).stdout


def test_a_narrow_sae_has_fewer_neighbours_than_are_shown(tmp_path: Path) -> None:
    model = {"name": "tiny", "revision": None}
    wide = make_run(tmp_path, make_config("topk", name="wide"), model)
    narrow = make_run(tmp_path, make_config("topk", name="narrow", d_sae=6), model)
    found = json.loads(actcache("similar", wide, narrow, "--feature", 3, "--device", "cpu", "--json").stdout)
    assert found["feature"] == 3
    assert sorted(each["feature"] for each in found["similar"]) == list(range(6))
    stable = json.loads(actcache("stability", wide, narrow, "--device", "cpu", "--json").stdout)
    assert stable["features"][3] == pytest.approx(found["similar"][0]["cosine"], abs=1e-6)
