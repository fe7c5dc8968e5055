"""Two processes that are at work in one folder at once, at random offsets: minutes, so `make test-faults`.

The processes are forks, so that each begins at once with all that is imported.
"""

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheLocked, ManifestError
from actcache.integrity.relabel import relabel
from actcache.integrity.verify import verify
from actcache.loading.loader import Loader
from actcache.store.cache import Cache, open_cache
from trainer.config.sweep import SweepConfig
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.stored_losses import LOSSES
from trainer.training.sweep import train

pytestmark = pytest.mark.faults

FORKS = multiprocessing.get_context("fork")
DONE, REFUSED = 0, 3


def begin(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A process that does the work. Its exit code is REFUSED if another process held a lock or let the cache grow."""

    def run() -> None:
        try:
            work()
        except CacheLocked:
            raise SystemExit(REFUSED) from None
        except ManifestError as error:
            raise SystemExit(REFUSED if error.what == "its growth is unfinished" else 1) from error

    process = FORKS.Process(target=run)
    process.start()
    return process


def end(process: multiprocessing.process.BaseProcess) -> int:
    process.join(timeout=120)
    assert process.exitcode is not None, "it waits for ever"
    return process.exitcode


def the_sweep(epochs: int = 2) -> SweepConfig:
    runs = [
        {"name": "topk", "architecture": "topk", "k": 4},
        {"name": "standard", "architecture": "standard", "sparsity_coefficient": 0.5},
    ]
    base = {"hook_name": HOOKS[0], "d_sae": 32, "lr": 0.01}
    sweep_file = {"batch_tokens": 32, "log_every": 2, "checkpoint_every": 5, "epochs": epochs, "tokens": 512 * epochs}
    return SweepConfig.from_dict(sweep_file | {"base": base, "runs": runs})


def trained_files(runs: Path) -> dict[str, bytes]:
    names = ("config.json", "metrics.jsonl", "sae/sae_weights.safetensors", "sae/cfg.json")
    folders = [folder for folder in sorted(runs.iterdir()) if folder.is_dir()]
    return {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in folders for name in names}


def test_two_trainers_at_random_offsets(tiny_cache, tmp_path):
    """One of them trains what a trainer alone does. The other is told so, or finds all done."""
    sweep = the_sweep(epochs=20)  # longer than a lock is tried for
    train(tiny_cache, sweep, tmp_path / "alone")  # imports and checks what the forks have then
    started = time.monotonic()
    assert end(begin(lambda: train(tiny_cache, sweep, tmp_path / "again"))) == DONE
    seconds, alone = time.monotonic() - started, trained_files(tmp_path / "alone")
    assert len(alone) == 8
    assert trained_files(tmp_path / "again") == alone
    seed, codes = time.time_ns() % 2**32, []
    offsets = random.Random(seed)
    for i in range(20):
        out = tmp_path / f"runs-{i}"
        first = begin(lambda out=out: train(tiny_cache, sweep, out))
        time.sleep(offsets.uniform(0, seconds))
        second = begin(lambda out=out: train(tiny_cache, sweep, out))
        both = sorted([end(first), end(second)])
        assert both in ([DONE, DONE], [DONE, REFUSED]), f"seed {seed}, call {i}"
        assert trained_files(out) == alone, f"seed {seed}, call {i}"
        codes.append(both[1])
    print(f"seed {seed}: {codes.count(REFUSED)} of 20 were refused; one trainer alone takes {seconds:.1f} s")
    assert codes.count(REFUSED) >= 5


def test_evaluation_beside_a_harvest_that_finishes(tiny_model, tiny_texts, tmp_path):
    """The harvest removes what killed writers left, while the evaluation writes its sums aside in the same cache."""
    one_hook = harvest_tiny(tiny_model, tiny_texts, tmp_path / "one", hook_names=HOOKS[:1]).path
    wanted = promised_files(harvest_tiny(tiny_model, tiny_texts, tmp_path / "both", hook_names=HOOKS[:2]).path)
    train(open_cache(one_hook), the_sweep(), tmp_path / "runs")
    sae = tmp_path / "runs" / "topk"
    metrics = evaluate(sae, open_cache(one_hook), tiny_model)
    shutil.rmtree(one_hook / LOSSES)
    seed = time.time_ns() % 2**32
    offsets = random.Random(seed)
    for i in range(100):
        root = tmp_path / "c"
        shutil.copytree(one_hook, root)
        cache = open_cache(root)
        harvest = begin(lambda root=root: harvest_tiny(tiny_model, tiny_texts, root, hook_names=HOOKS[:2]))
        time.sleep(offsets.uniform(0, 0.5))
        assert evaluate(sae, cache, tiny_model) == metrics, f"seed {seed}, call {i}"
        assert end(harvest) == DONE, f"seed {seed}, call {i}"
        assert promised_files(root) == wanted, f"seed {seed}, call {i}"
        assert not list(root.rglob("*.partial")), f"seed {seed}, call {i}"
        shutil.rmtree(root)
    print(f"seed {seed}")


def every_batch(cache: Cache) -> list[bytes]:
    """Rows of a loader, slowly enough that it maps shards until the end."""
    with Loader(cache, HOOKS[0], batch_tokens=64, token_fields=("id",)) as loader:
        return [
            batch.x[HOOKS[0]].view(torch.uint8).numpy().tobytes() + batch.token_id.numpy().tobytes() for batch in loader
        ]


def test_readers_and_relabel_beside_a_cache_that_grows(tiny_model, tiny_texts, tmp_path):
    """Whoever opened the cache reads its rows to the end, whoever opens it reads the one or the other."""
    few = harvest_tiny(tiny_model, tiny_texts, tmp_path / "few", hook_names=HOOKS[:2], tokens=1111)
    many = harvest_tiny(tiny_model, tiny_texts, tmp_path / "many", hook_names=HOOKS[:2], tokens=2000)
    truths = {cache.fingerprint: every_batch(cache) for cache in (few, many)}
    relabel(many.path, native=True)
    wanted = promised_files(many.path)
    seed, seen = time.time_ns() % 2**32, []
    offsets = random.Random(seed)
    for i in range(20):
        root = tmp_path / "c"
        shutil.copytree(few.path, root)
        opened = open_cache(root)
        growth = begin(lambda root=root: harvest_tiny(tiny_model, tiny_texts, root, hook_names=HOOKS[:2], tokens=2000))
        time.sleep(offsets.uniform(0, 0.3))
        relabelling = begin(lambda root=root: relabel(root, native=True))
        while growth.is_alive():
            now = open_cache(root)
            seen.append(now.fingerprint)
            assert every_batch(now) == truths[now.fingerprint], f"seed {seed}, call {i}"
            assert every_batch(opened) == truths[few.fingerprint], f"seed {seed}, call {i}"
        assert end(growth) == DONE, f"seed {seed}, call {i}"
        if end(relabelling) == REFUSED:
            relabel(root, native=True)
        assert every_batch(opened) == truths[few.fingerprint], f"seed {seed}, call {i}"
        assert promised_files(root) == wanted, f"seed {seed}, call {i}"
        assert verify(root).problems == ()
        shutil.rmtree(root)
    print(f"seed {seed}: {seen.count(few.fingerprint)} times the smaller cache was opened, {len(seen)} times in all")
    assert seen.count(few.fingerprint) > 20
