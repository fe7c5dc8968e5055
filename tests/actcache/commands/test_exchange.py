import json

import datasets
import numpy as np
from support.command_line import actcache


def test_a_split_goes_out_and_comes_back(tiny_cache, tiny_llama_dir, tmp_path):
    arrow, back = tmp_path / "arrow", tmp_path / "back"
    done = actcache("export-cache", tiny_cache.path, "--out", arrow, "--split", "validation")
    assert (done.stdout, done.stderr.splitlines()[-1]) == ("", f"export-cache: {arrow}")
    ids = np.array(datasets.load_from_disk(str(arrow))["token_ids"])
    assert np.array_equal(ids, tiny_cache.sequences("validation"))
    command = ["import-cache", arrow, "--out", back, "--model", tiny_llama_dir, "--special-token", 0, "--holdout", 0]
    assert f"{back} is finished" in actcache(*command).stderr
    assert "was already there, nothing was done" in actcache(*command).stderr
    facts = json.loads(actcache("info", back, "--json").stdout)
    assert facts["rows"] == {"train": tiny_cache.n_rows("validation"), "validation": 0}
    assert facts["hooks"] == {name: tiny_cache.hook(name).d_in for name in tiny_cache.hook_names}


def test_wrong_use_is_one_line(tiny_cache, tmp_path):
    wrong = actcache("export-cache", tiny_cache.path, "--out", tmp_path / "x", "--split", "test", code=2)
    assert wrong.stderr == "error: cache: split must be one of train, validation, got 'test'\n"
    (tmp_path / "thesis.tex").touch()
    there = actcache("export-cache", tiny_cache.path, "--out", tmp_path, code=1)
    assert "must be new or empty, it holds thesis.tex" in there.stderr
    nothing = actcache("import-cache", tmp_path / "none", "--out", tmp_path / "c", "--model", "m", code=1)
    assert nothing.stderr.startswith("error: ")
    assert nothing.stderr.count("\n") == 1
