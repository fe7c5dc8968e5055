"""`actcache eval`: which rows it leaves out, and that it measures what `evaluate_runs` does."""

import json
from pathlib import Path

import pytest
from support.command_line import actcache
from support.tiny_caches import HOOKS
from support.tiny_saes import make_config, make_run

from actcache.errors import ConfigError
from trainer.commands.evaluate import is_excluding
from trainer.evaluation.evaluate import evaluate_runs


def test_rows_of_special_tokens_are_left_out_kept_or_not_spoken_of() -> None:
    assert is_excluding(False, False) is None
    assert is_excluding(True, False) is True
    assert is_excluding(False, True) is False
    with pytest.raises(ConfigError, match="--exclude-special-tokens and --keep-special-tokens exclude each other"):
        is_excluding(True, True)


@pytest.mark.parametrize(
    ("options", "excluded"), [([], True), (["--exclude-special-tokens"], True), (["--keep-special-tokens"], False)]
)
def test_it_measures_what_the_library_does(options, excluded, tiny_cache, tiny_model, tmp_path: Path) -> None:
    config = make_config("topk", d_in=32, hook_name=HOOKS[2])
    run = make_run(tmp_path, config, tiny_cache.identity["model"])
    asked = ["eval", run, "--cache", tiny_cache.path, "--device", "cpu", *options]
    (row,) = json.loads(actcache(*asked, "--json").stdout)["runs"]
    assert row["exclude_special_tokens"] is excluded
    (expected,) = evaluate_runs(run, tiny_cache, tiny_model, exclude_special_tokens=excluded)
    assert row == json.loads(json.dumps(expected))
    *_, measured, good, header, line = actcache(*asked).stderr.splitlines()
    assert (measured, good[:5]) == (f"measured on {row['n_tokens']:,} held-out tokens", "good:")
    assert header.split()[:3] == ["name", "architecture", "l0"]
    assert line.split()[:5] == [run.name, "topk", f"{row['l0']:.1f}", "low", f"{row['explained_variance']:.4f}"]


def test_a_run_that_remembers_no_cache_asks_for_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_config("topk"), {"name": "tiny", "revision": None})
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "cache"}))
    assert "holds no run that remembers its cache; train first, or pass --cache" in actcache("eval", run, code=1).stderr
