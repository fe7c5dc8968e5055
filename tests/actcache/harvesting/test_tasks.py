"""A cache that grows, is shared by several processes, gets a hook more, or is asked for again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, DatasetError, DiskTooSmall, ManifestError
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import Journal
from actcache.store.locks import exclusive

TOKENS = 2000


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_texts, tmp_path_factory):
    """The cache that every other way here must come to, byte for byte."""
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("whole") / "c", tokens=TOKENS)


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
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    for tokens in (1000, 500):
        assert harvest_tiny(tiny_model, tiny_texts, root, tokens=tokens, hook_names=HOOKS[1:]).n_rows() > 0
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    locks = {root / "manifest" / "settling.lock"}
    assert {path for path in after if after[path] != before.get(path)} <= locks


def test_growth_beyond_the_dataset_leaves_the_cache_as_it_was(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    before = promised_files(root)
    with pytest.raises(DatasetError, match="10000000 tokens asked, it holds"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=10**7)
    assert promised_files(root) == before
    assert open_cache(root).n_rows() > 0


def test_growth_refuses_a_dataset_that_gives_other_tokens(tiny_model, tmp_path):
    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import LoadedDataset

    class Drifting(LoadedDataset):
        """A dataset whose name and hash stay while its rows change, as a hub dataset without a revision."""

        def identity(self) -> dict:
            return {"name": "drifting"}

    def asked(texts: list[str], tokens: int):
        config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, tokens=tokens, holdout=0.0)
        return harvest(tiny_model, Drifting(Dataset.from_dict({"text": texts})), config, tmp_path / "c")

    texts = [f"{number} is followed by {number + 1}. " * 9 for number in range(40)]
    asked(texts, 640)
    before = promised_files(tmp_path / "c")
    with pytest.raises(CacheMismatch, match=r"gives other tokens in sequences 0 to 40; pass its former revision"):
        asked([*texts[:3], "other text " * 20, *texts[4:]], 960)
    assert promised_files(tmp_path / "c") == before
    assert asked(texts, 960).n_rows() == 960


def test_an_unfinished_harvest_is_not_taken_for_a_smaller_one(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (root / "manifest" / "cache.json").unlink()
    with pytest.raises(CacheMismatch, match=r"harvest of 1000 tokens, 500 asked; finish it with --tokens 1000"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=500)
    assert harvest_tiny(tiny_model, tiny_texts, root, tokens=1000).fingerprint


def test_a_kill_between_the_steps_of_growth_is_healed(tiny_model, tiny_texts, tmp_path, whole):
    """After the sequences have changed and before the plan has: the old plan's tail is another file by then."""
    import shutil

    old = harvest_tiny(tiny_model, tiny_texts, tmp_path / "old", tokens=1111).path
    for tokens in (1111, TOKENS):
        root = tmp_path / str(tokens)
        shutil.copytree(old, root)
        (root / "manifest" / "cache.json").unlink()
        for split in ("train", "validation"):
            for name in ("id", "document"):
                key = Path("acts.zarr") / split / "sequences" / name / "c" / "0" / "0"
                shutil.copy(whole.path / key, root / key)
        healed = harvest_tiny(tiny_model, tiny_texts, root, tokens=tokens)
        assert promised_files(healed.path) == promised_files(old if tokens == 1111 else whole.path)


# --- several processes ---


def worker_command(model_dir: Path, texts: Path, out: Path, *more: str) -> list[str]:
    hooks = [argument for hook in HOOKS for argument in ("--hook", hook)]
    sizes = ["--context-size", "16", "--batch-size", "8", "--holdout", "0.2", "--device", "cpu"]
    asked = ["--model", str(model_dir), "--dataset", str(texts), "--out", str(out), "--tokens", str(TOKENS)]
    return ["-m", "cli", "harvest", *asked, *sizes, *hooks, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def test_three_processes_make_the_cache_of_one(tiny_llama_dir, tiny_texts, tmp_path, whole):
    processes = [
        subprocess.Popen(
            [sys.executable, *worker_command(tiny_llama_dir, tiny_texts, tmp_path / "c", "--worker", f"{i}/3")],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
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
    assert "other workers owe" in caplog.text
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
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=500)
    from actcache.harvesting.tasks import Worker

    with pytest.raises(ConfigError, match=r"0 <= i < n, got 2/2"):
        Worker(index=2, count=2)


def test_a_failed_start_leaves_nothing_behind(tiny_model, tiny_texts, tmp_path):
    with pytest.raises(DatasetError, match="tokens asked"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=10**7)
    assert not (tmp_path / "c").exists()


# --- before the start ---


def test_the_estimate_covers_what_is_stored(tiny_model, tiny_texts, tmp_path):
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.estimate import expected_bytes
    from actcache.harvesting.run import dry_run
    from actcache.text.sources import DatasetSource

    source = DatasetSource(path=str(tiny_texts))
    for tokens in (TOKENS, None):
        config = HarvestConfig(hook_names=HOOKS, context_size=16, holdout=0.2, tokens=tokens, codec="raw")
        found = dry_run(tiny_model, source, config, tmp_path / "c")
        assert not (tmp_path / "c").exists(), "a dry run writes nothing"
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / str(tokens), tokens=tokens, codec="raw")
        assert found.n_rows == sum(cache.n_rows(split) for split in ("train", "validation"))
        assert found.n_bytes == expected_bytes(found.n_rows, cache.manifest.hooks, "raw")
        values = found.n_rows * sum(hook.d_in * 2 for hook in cache.manifest.hooks)
        assert found.n_bytes == values + found.n_rows * 20, "raw rows, and five int32 a token"
        assert found.seconds is not None
        assert found.seconds > 0
    again = dry_run(tiny_model, source, config, tmp_path / "None")
    assert (again.n_rows, again.n_bytes) == (0, 0)


def test_too_small_a_disk_is_refused_before_any_work(tiny_model, tiny_texts, tmp_path):
    with pytest.raises(DiskTooSmall, match=r"shards will take about .* GB, the disk has .* GB free"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=10**15)
    assert not (tmp_path / "c").exists()


def test_codec_auto_measures_once_and_keeps_its_choice(tiny_model, tiny_texts, tmp_path, caplog):
    with caplog.at_level("INFO", "actcache"):
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=500, codec="auto")
    assert cache.identity["codec"] in ("lossless", "fast", "raw"), "never one with an error"
    assert f"codec {cache.identity['codec']}: model" in caplog.text
    caplog.clear()
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000, codec="auto")
    assert grown.identity["codec"] == cache.identity["codec"]
    assert "codec" not in caplog.text


def test_the_log_tells_each_stage_busy_and_waiting(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (log,) = (root / "log").glob("harvest-*.json")
    seconds = json.loads(log.read_text())["seconds"]
    assert seconds["n_tokens"] == 992
    for stage in ("model", "encode", "write"):
        assert seconds[f"{stage}_busy"] > 0
        assert seconds[f"{stage}_wait"] >= 0
        assert seconds[f"{stage}_busy"] <= seconds["total"]
    assert np.isclose(seconds["copy_busy"], 0), "nothing is copied on a CPU"


def test_settling_waits_for_the_one_before(tmp_path):
    import threading

    (tmp_path / "manifest").mkdir()
    order = []
    with exclusive(tmp_path):
        thread = threading.Thread(target=lambda: order.append(_settled(tmp_path)))
        thread.start()
        thread.join(0.2)
        assert order == [], "still waiting"
    thread.join(10)
    assert order == [True]


def _settled(root: Path) -> bool:
    with exclusive(root):
        return True
