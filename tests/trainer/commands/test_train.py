"""`actcache train`: which sweep its options make, and what it says of SAEs that diverge."""

import json
from pathlib import Path

import pytest
from support.command_line import actcache
from support.tiny_caches import HOOKS

from actcache.errors import ConfigError
from trainer.commands.train import _given, _sweep_config, _TrainBar
from trainer.config.settings import TrainConfig
from trainer.training.sweep import SweepProgress

ONE = {"hook_name": HOOKS[2], "d_sae": 64, "k": 4}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"batch_tokens": 128, "seed": 3, "base": ONE | {"architecture": "topk"}}))
    return path


def test_options_that_were_not_given_are_left_out() -> None:
    assert _given({"lr": None, "seed": 0, "exclude_special_tokens": False}) == {
        "seed": 0,
        "exclude_special_tokens": False,
    }


def test_one_sae_is_a_topk_unless_architecture_or_preset_say_otherwise() -> None:
    (run,) = _sweep_config(None, ONE, {"tokens": 512}).runs
    assert run == ONE | {"architecture": "topk", "name": "topk-k4-d64"}
    (batch,) = _sweep_config(None, ONE | {"architecture": "batchtopk"}, {}).runs
    assert batch["architecture"] == "batchtopk"
    (preset,) = _sweep_config(None, ONE | {"preset": "bussmann_batchtopk"}, {}).runs
    assert "architecture" not in preset


def test_shared_options_win_over_the_file(sweep_file: Path) -> None:
    sweep = _sweep_config(sweep_file, {}, {"seed": 7, "exclude_special_tokens": False})
    assert sweep.train == TrainConfig(batch_tokens=128, seed=7, exclude_special_tokens=False)
    assert _sweep_config(None, ONE, {"epochs": 2}).train == TrainConfig(epochs=2)


def test_a_file_and_options_for_one_sae_are_too_much(sweep_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep\.yaml says what to train; leave out the options .*: hook_name, d_sae, k"
    ):
        _sweep_config(sweep_file, ONE, {})


@pytest.mark.parametrize("single", [{}, {"d_sae": 64, "k": 4}], ids=["nothing", "no hook"])
def test_neither_a_file_nor_a_hook_is_too_little(single: dict) -> None:
    with pytest.raises(ConfigError, match="train: name a sweep file, or give --hook"):
        _sweep_config(None, single, {})


def test_a_shared_option_that_breaks_a_rule_is_refused(sweep_file: Path) -> None:
    with pytest.raises(ConfigError, match="batch_tokens must be at least 1, got batch_tokens=0"):
        _sweep_config(sweep_file, {}, {"batch_tokens": 0})


def test_the_bar_says_how_fast_and_how_long_it_waits(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = _TrainBar()
    rates = {"n_tokens": 4000, "n_sae_tokens": 12_000, "seconds": 2.0, "wait_seconds": 0.5}
    bar(SweepProgress(step=5, n_steps=10, n_saes=3, metrics={}, **rates))
    bar.close()
    shown = capsys.readouterr().err
    assert "5/10" in shown
    assert "3 SAEs, 2,000 tok/s, 6,000 SAE*tok/s, waiting 25.0%" in shown


def test_saes_that_diverge_are_named_and_the_others_finish(tiny_cache, tmp_path: Path) -> None:
    topk = ONE | {"architecture": "topk"}
    runs = [topk | {"name": "calm"}, topk | {"name": "wild", "lr": 1e30}]
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"batch_tokens": 128, "tokens": 640, "runs": runs}))
    done = actcache("train", tiny_cache.path, path, "--out", tmp_path / "runs", "--device", "cpu", code=1)
    assert "error: train: 1 of 2 SAEs diverged: wild" in done.stderr
    assert f"{tmp_path / 'runs' / 'calm'}: finished" in done.stderr
    assert f"{tmp_path / 'runs' / 'wild'}: wild: " in done.stderr
    assert (tmp_path / "runs" / "calm" / "sae").is_dir()
    assert (tmp_path / "runs" / "wild" / "failed.json").is_file()
