"""`actcache harvest --from-saelens`: its table, and what the command line says otherwise."""

import json
from pathlib import Path

from support.command_line import actcache
from support.saelens_configs import FLAT_CALL

import actcache as package
from actcache.commands.from_saelens import row_lines
from actcache.interop.saelens_config import read_saelens_config


def test_the_table_is_aligned_and_cuts_what_is_long():
    lines = row_lines(read_saelens_config({"hook_name": "h" * 90, "noise_scale": 1, "c" * 90: "red"}).rows("train"))
    assert lines[0].split() == ["field", "value", "here"]
    place = lines[0].index("here")
    assert all(line[place - 2 : place] == "  " and line[place] != " " for line in lines)
    assert lines[1].split()[:3] == ["noise_scale", "1", "refused"]
    assert any(f"{'h' * 45}... " in line for line in lines)
    assert any(line.startswith("adam_beta1 ") and "0.0 (default)" in line for line in lines)


def test_a_config_harvests_and_the_command_line_wins(tiny_gpt2_dir: Path, tiny_texts: Path, tmp_path: Path):
    path = tmp_path / "cfg.py"
    path.write_text(
        FLAT_CALL.replace("blocks.8", "blocks.1").replace("context_size=128", "context_size=32, prepend_bos=False")
    )
    stand_in = ("--model", tiny_gpt2_dir, "--dataset", tiny_texts, "--tokens", 640, "--seed", 3, "--device", "cpu")
    done = actcache("harvest", "--from-saelens", path, *stand_in, "--out", tmp_path / "cache")
    assert done.stderr.splitlines()[0].split() == ["field", "value", "here"]
    assert "lr " not in done.stderr  # which is no field of a harvest
    cache = package.open_cache(tmp_path / "cache")
    assert (cache.hook_names, cache.context_size) == (("blocks.1.hook_resid_pre",), 32)
    assert cache.n_rows("train") + cache.n_rows("validation") == 640
    said = {name: cache.identity[name] for name in ("prepend_bos", "separator", "seed")}
    assert said == {"prepend_bos": False, "separator": "none", "seed": 3}
    assert cache.hook("blocks.1.hook_resid_pre").dtype == "float32"


def test_a_refusal_comes_after_the_table_and_before_any_work(tmp_path: Path):
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({"use_chat_formatting": True, "model_name": "no such model"}))
    done = actcache("harvest", "--from-saelens", path, "--out", tmp_path / "cache", code=2)
    assert "model_name" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}: would train or harvest something else")
    assert not (tmp_path / "cache").exists()
