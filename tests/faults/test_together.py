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
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheLocked
from actcache.store.cache import open_cache
from trainer.config.sweep import SweepConfig
from trainer.evaluation.downstream_loss import LOSSES
from trainer.evaluation.evaluate import evaluate
from trainer.training.sweep import train

pytestmark = pytest.mark.faults

FORKS = multiprocessing.get_context("fork")
DONE, REFUSED = 0, 3


def begin(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A process that does the work. Its exit code is REFUSED if another process held the lock."""

    def run() -> None:
        try:
            work()
        except CacheLocked:
            raise SystemExit(REFUSED) from None

    process = FORKS.Process(target=run)
    process.start()
    return process


def end(process: multiprocessing.process.BaseProcess) -> int:
    process.join(timeout=120)
    assert process.exitcode is not None, "it waits for ever"
    return process.exitcode


def the_sweep() -> SweepConfig:
    runs = [
        {"name": "topk", "architecture": "topk", "k": 4},
        {"name": "standard", "architecture": "standard", "sparsity_coefficient": 0.5},
    ]
    base = {"hook_name": HOOKS[0], "d_sae": 32, "lr": 0.01}
    sweep_file = {"batch_tokens": 32, "log_every": 2, "checkpoint_every": 5, "epochs": 2, "tokens": 1024}
    return SweepConfig.from_dict(sweep_file | {"base": base, "runs": runs})


def trained_files(runs: Path) -> dict[str, bytes]:
    names = ("config.json", "metrics.jsonl", "sae/sae_weights.safetensors", "sae/cfg.json")
    folders = [folder for folder in sorted(runs.iterdir()) if folder.is_dir()]
    return {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in folders for name in names}


def test_two_trainers_at_random_offsets(tiny_cache, tmp_path):
    """One of them trains what a trainer alone does. The other is told so, or finds all done."""
    started = time.monotonic()
    train(tiny_cache, the_sweep(), tmp_path / "alone")
    seconds, alone = time.monotonic() - started, trained_files(tmp_path / "alone")
    assert len(alone) == 8
    seed, codes = time.time_ns() % 2**32, []
    offsets = random.Random(seed)
    for i in range(20):
        out = tmp_path / f"runs-{i}"
        first = begin(lambda out=out: train(tiny_cache, the_sweep(), out))
        time.sleep(offsets.uniform(0, 1.2 * seconds))
        second = begin(lambda out=out: train(tiny_cache, the_sweep(), out))
        both = sorted([end(first), end(second)])
        assert both in ([DONE, DONE], [DONE, REFUSED]), f"seed {seed}, call {i}"
        assert trained_files(out) == alone, f"seed {seed}, call {i}"
        codes.append(both[1])
    print(f"seed {seed}: {codes.count(REFUSED)} of 20 were refused")
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
