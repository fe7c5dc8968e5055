import json
import shutil

import pytest
from support.command_line import actcache
from support.no_locks import forbid_locks
from support.remote_code import RemoteCode
from support.strangers import as_another_user, only_root
from support.tiny_caches import HOOKS, promised_files

from actcache.store.cache import open_cache


@pytest.fixture
def command(tiny_llama_dir, tiny_texts):
    """As the tiny cache was harvested from Python."""
    hooks = [part for hook in HOOKS for part in ("--hook", hook)]
    sizes = ["--context-size", 16, "--holdout", 0.2, "--batch-size", 8, "--device", "cpu"]
    return ["harvest", "--model", tiny_llama_dir, "--dataset", tiny_texts, *hooks, *sizes]


def test_the_command_makes_the_cache_that_python_makes(command, tiny_cache, tmp_path):
    done = actcache(*command, "--out", tmp_path / "c")
    assert done.stdout == ""
    assert f"{tmp_path / 'c'} is finished" in done.stderr
    assert promised_files(tmp_path / "c") == promised_files(tiny_cache.path)
    assert "was already there, nothing was done" in actcache(*command, "--out", tmp_path / "c").stderr


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(command, tiny_cache, tmp_path):
    said = actcache(*command, "--out", tmp_path / "c", "--dry-run").stderr
    n_rows = tiny_cache.n_rows("train") + tiny_cache.n_rows("validation")
    assert said.startswith(f"to harvest: {n_rows:,} rows, at most about ")
    assert not (tmp_path / "c").exists()


def test_workers_finish_it_together(command, tiny_cache, tmp_path):
    out = ["--out", tmp_path / "c"]
    said = actcache(*command, *out, "--worker", "1/2").stderr
    assert "harvest: worker 1 of 2 (--worker) takes one of 2 shards" in said.splitlines()
    assert "is finished" not in said
    assert "is finished" in actcache(*command, *out, "--worker", "0/2").stderr
    assert promised_files(tmp_path / "c") == promised_files(tiny_cache.path)


def test_without_locks_it_ends_in_one_line_and_goes_on_with_no_lock(command, tiny_cache, tmp_path, monkeypatch):
    forbid_locks(monkeypatch, tmp_path)
    out = ["--out", tmp_path / "c"]
    (line,) = actcache(*command, *out, code=1).stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/c/manifest/settling.lock: the file system must have locks, it says")
    said = actcache(*command, *out, "--no-lock").stderr
    assert f"{tmp_path}/c: no lock is taken; no other process may write here until this command ends" in said
    assert promised_files(tmp_path / "c") == promised_files(tiny_cache.path)
    said = actcache(*command, *out, "--no-lock", "--worker", "0/2", code=2).stderr
    assert "--no-lock is for one process alone, got worker 0/2" in said


@only_root
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(command, tmp_path):
    with as_another_user(tmp_path):
        (line,) = actcache(*command, "--model", "/nowhere", "--out", tmp_path / "a" / "c", code=1).stderr.splitlines()
    assert line.startswith("error: [Errno 13] Permission denied: this has to write the cache; pass another --out")
    assert line.endswith(f"'{tmp_path}/a/c'")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--codec", "zip"], "codec: must be one of lossless, fast, raw"),
        (["--separator", "comma"], "separator must be one of bos, eos, none"),
        (["--worker", "2/2"], "0 <= i < n, got 2/2"),
        (["--sample-by", "word"], "sample_by must be one of line"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_alone_ends_it_with_2(command, wrong, message, tmp_path):
    said = actcache(*command, *wrong, "--out", tmp_path / "c", code=2).stderr
    assert message in " ".join(said.split())
    assert not (tmp_path / "c").exists()


def test_a_model_with_code_of_its_own_has_to_be_trusted(tiny_llama_dir, tiny_texts, tmp_path):
    made, out = RemoteCode(tiny_llama_dir, tmp_path), tmp_path / "c"
    model = ("--model", made.model("own"), "--backend", "transformer_lens", "--device", "cpu")
    hook = ("--hook", "blocks.1.hook_resid_post", "--context-size", 16, "--batch-size", 8)
    command = ("harvest", *model, *hook, "--dataset", tiny_texts, "--tokens", 64, "--out", out)
    assert "pass --trust-remote-code" in actcache(*command, code=1).stderr
    assert made.ran == set()
    assert not out.exists()
    actcache(*command, "--trust-remote-code")
    assert "code_sha256" in json.loads(actcache("info", out, "--json").stdout)["model"]


def test_the_split_of_a_folder_is_taken_and_told_and_a_bad_row_is_named_or_left_out(
    command, tiny_texts, tmp_path, caplog
):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text("# No data\n" * 100)
    shutil.copy(tiny_texts, folder / "test.jsonl")
    (folder / "train.jsonl").write_text(tiny_texts.read_text() + '{"text": null}\n')
    given = [*command, "--dataset", folder, "--out"]
    actcache(*given, tmp_path / "a", "--split", "test")
    assert f"dataset: column 'text' of split 'test' of 1 json file: '{folder}/test.jsonl'; left out: " in caplog.text
    assert "dataset: 60 rows were read" in caplog.text
    (line,) = actcache(*given, tmp_path / "b", "--split", "dev", code=1).stderr.splitlines()
    assert "it has no split 'dev', it has 'train', 'test'); pass one of them as --split" in line
    line = actcache(*given, tmp_path / "b", code=1).stderr.splitlines()[-1]
    assert f"(line 61 of {folder}/train.jsonl holds null: " in line
    assert line.endswith("mend that row, or pass --on-bad-row skip")
    caplog.clear()
    actcache(*given, tmp_path / "b", "--on-bad-row", "skip")
    assert "dataset: 61 rows were read" in caplog.text
    assert f"1 of them were left out, the first: line 61 of {folder}/train.jsonl holds null" in caplog.text
    tokens = [open_cache(tmp_path / out).sequences("train").tolist() for out in ("a", "b")]
    assert tokens[0] == tokens[1]
