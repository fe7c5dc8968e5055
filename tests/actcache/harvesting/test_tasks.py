"""A cache that grows, is shared by several processes, or is asked for again: who harvests which shards."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.no_locks import forbid_locks
from support.strangers import as_another_user, only_root
from support.tiny_caches import HOOKS, TOKENS, harvest_tiny, promised_files

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, DatasetError, LocksMissing, ManifestError
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import Journal
from actcache.store.locks import without_locks


@pytest.mark.parametrize("first", [16, 1000, 1111, 1984])
def test_a_grown_cache_is_the_one_harvested_at_once(tiny_model, tiny_texts, tmp_path, whole, first):
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=first)
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=TOKENS)
    assert grown.identity["shard_rows"] == whole.identity["shard_rows"] == 128, "else the bytes could not be equal"
    assert promised_files(grown.path) == promised_files(whole.path)
    assert verify(grown.path).problems == ()


def test_growth_takes_every_hook_with_it(tiny_model, tiny_texts, tmp_path, whole):
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1111)
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=TOKENS, hook_names=HOOKS[:1])
    assert promised_files(grown.path) == promised_files(whole.path)


def test_a_hook_added_after_growth_is_the_one_harvested_at_once(tiny_model, tiny_texts, tmp_path, whole):
    for tokens, hooks in ((1111, HOOKS[1:]), (TOKENS, HOOKS[1:]), (TOKENS, HOOKS[:1])):
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=tokens, hook_names=hooks)
    assert promised_files(cache.path) == promised_files(whole.path)


def test_asked_again_or_for_less_it_does_nothing(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (root / "log" / ".harvest.json.0123456789abcdef0123456789abcdef.partial").touch()  # of a killed harvest
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    del before[root / "log" / ".harvest.json.0123456789abcdef0123456789abcdef.partial"]
    for tokens in (1000, 500):
        assert harvest_tiny(tiny_model, tiny_texts, root, tokens=tokens, hook_names=HOOKS[1:]).n_rows() > 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


@only_root
def test_a_finished_cache_of_another_user_is_there_and_nothing_more_is_written(
    tiny_model, tiny_texts, tmp_path, monkeypatch
):
    texts = shutil.copy(tiny_texts, tmp_path)
    root = harvest_tiny(tiny_model, texts, tmp_path / "c", tokens=1000, hook_names=HOOKS[1:]).path
    (root / "log" / ".harvest.json.0123456789abcdef0123456789abcdef.partial").touch()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr("actcache.harvesting.run.packed_sequences", None)
    with as_another_user(root):
        assert harvest_tiny(tiny_model, texts, root, tokens=1000, hook_names=HOOKS[1:]).n_rows() > 0
        for more in ({"tokens": 1000}, {"tokens": 1100, "hook_names": HOOKS[1:]}):
            with pytest.raises(PermissionError, match=rf"this has to write the cache; .*: '{root}'$"):
                harvest_tiny(tiny_model, texts, root, **more)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_where_there_are_no_locks_only_what_is_finished_is_found(tiny_model, tiny_texts, tmp_path, whole, monkeypatch):
    forbid_locks(monkeypatch, tmp_path)
    with pytest.raises(LocksMissing, match="pass --no-lock"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=TOKENS)
    with without_locks():
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000)
        (tmp_path / "c" / "log" / ".harvest.json.0123456789abcdef0123456789abcdef.partial").touch()
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=TOKENS)
    assert promised_files(cache.path) == promised_files(whole.path)
    assert not list(cache.path.rglob("*.partial"))
    assert harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=TOKENS).fingerprint == whole.fingerprint
    assert verify(cache.path).problems == verify(cache.path).notes == ()


# --- several processes ---


def worker_command(model_dir: Path, texts: Path, out: Path, *more: str) -> list[str]:
    hooks = [argument for hook in HOOKS for argument in ("--hook", hook)]
    sizes = ["--context-size", "16", "--batch-size", "8", "--holdout", "0.2", "--device", "cpu"]
    asked = ["--model", str(model_dir), "--dataset", str(texts), "--out", str(out), "--tokens", str(TOKENS)]
    return ["-m", "cli", "harvest", *asked, *sizes, *hooks, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


FORKED = """
import os, sys
import torch
torch.set_num_threads(1)  # the process forks below
import actcache.harvesting.run, actcache.models.load, cli  # seconds, once for all workers
children = []
for i in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        sys.argv += ["--worker", f"{i}/3"]
        cli.main()
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_three_processes_make_the_cache_of_one(tiny_llama_dir, tiny_texts, tmp_path, whole):
    arguments = worker_command(tiny_llama_dir, tiny_texts, tmp_path / "c")[2:]
    run = subprocess.run(
        [sys.executable, "-c", FORKED, *arguments], env=environment(), capture_output=True, text=True, timeout=180
    )
    assert run.stdout == "[0, 0, 0]\n", run.stderr
    assert promised_files(tmp_path / "c") == promised_files(whole.path)
    written = [len((tmp_path / "c" / "manifest" / f"writer-0{i}.jsonl").read_text().splitlines()) for i in range(3)]
    assert sum(written) == sum(len(shards) for shards in whole.manifest.shards.values())
    assert max(written) - min(written) <= 1, "an equal share each"


def test_torchrun_shares_by_rank(tiny_llama_dir, tiny_texts, tmp_path, whole):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [sys.executable, *command, *worker_command(tiny_llama_dir, tiny_texts, tmp_path / "c")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    assert promised_files(tmp_path / "c") == promised_files(whole.path)
    assert (tmp_path / "c" / "manifest" / "writer-01.jsonl").exists()


def test_a_worker_alone_leaves_the_rest_and_says_so(tiny_model, tiny_texts, tmp_path, whole, caplog):
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest_share
    from actcache.harvesting.tasks import Worker
    from actcache.text.sources import DatasetSource

    config = HarvestConfig(hook_names=HOOKS, context_size=16, holdout=0.2, batch_size=8, tokens=TOKENS)
    arguments = (tiny_model, DatasetSource(path=str(tiny_texts)), config, tmp_path / "c")
    with caplog.at_level("INFO", "actcache"):
        assert harvest_share(*arguments, Worker(index=1, count=2)) is None
    assert re.search(
        r"this worker is done; other workers owe \d+ shards, the last of them finalises$", caplog.messages[-1]
    )
    with pytest.raises(ManifestError, match="unfinished"):
        open_cache(tmp_path / "c")
    cache = harvest_share(*arguments, Worker(index=0, count=2))
    assert cache is not None
    assert promised_files(cache.path) == promised_files(whole.path)


def test_who_may_write_beside_whom(tiny_model, tiny_texts, tmp_path):
    with Journal(tmp_path / "c", 1), pytest.raises(CacheLocked, match="1 workers write this cache"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=500)
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=500)
    with Journal(tmp_path / "c", 0), pytest.raises(CacheLocked, match="as worker 0; wait for it"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=600)
    from actcache.harvesting.tasks import Worker

    with pytest.raises(ConfigError, match=r"0 <= i < n, got 2/2"):
        Worker(index=2, count=2)


def test_a_failed_start_leaves_nothing_behind(tiny_model, tiny_texts, tmp_path):
    with pytest.raises(DatasetError, match="tokens asked"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=10**7)
    assert not (tmp_path / "c").exists()


DROPPED = (".DS_Store", "._texts", "Thumbs.db", "desktop.ini", ".nfs0000000001", "lost+found", ".Trash-1000", "@eaDir")


def test_a_folder_that_holds_what_systems_drop_is_empty(tiny_model, tiny_texts, tmp_path):
    for name in DROPPED:
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match="tokens asked"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path, tokens=10**7)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(DROPPED), "what was begun is removed again"
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / ".DS_Store").touch()
    assert harvest_tiny(tiny_model, tiny_texts, tmp_path, tokens=500).n_rows() > 0


def test_a_folder_of_something_else_is_left_alone(tiny_model, tiny_texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheMismatch, match=r"holds thesis\.tex"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
