"""A sweep of eight TopK SAEs (512 -> 4096, k 32, batch 4096), the harvest included or not, against SAELens' runners.

Rows: the last hook of a GPT-2 of four blocks, 512 wide, with random weights; special tokens kept, nothing scaled.
Bound: the eight steps on one batch that stays in memory, nothing read. Ours: `harvest`, then `trainer.train` from the
cache. SAELens: its cache runner, then eight cached runs; its MultiSAETrainingRunner, which runs the model once for all
SAEs; eight runs that each run the model. Eight such runs are one run eight times over, so one is timed and multiplied
by eight. Every run writes its SAEs with the optimizers' state. SAELens keeps no decoder norms here, which spares it
that work. Also: how the sweep grows from 1 to 16 SAEs, what it reads of an evicted cache, and the peak memory of the
sweep and of the MultiSAETrainingRunner, each in a process of its own.

    actcache bench sweep
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from actcache.format.paths import STORE
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from benchmarks.bench_train import BATCH_TOKENS, D_SAE, K, fresh_state, our_step
from benchmarks.measure import (
    Say,
    bytes_read,
    described,
    forget,
    installed,
    interleaved_seconds,
    machine,
    peak_resident_bytes,
    ratios,
)
from benchmarks.peers import SAELensRunners, saelens_model
from benchmarks.stream import CONTEXT_SIZE, D_MODEL, random_documents, random_gpt2_module
from trainer.config.settings import SAEConfig
from trainer.config.sweep import SweepConfig
from trainer.training.sweep import train

N_LAYERS, N_SAES, STEPS, LONG_STEPS, REPEATS = 4, 8, 12, 48, 3
HOOK, SAELENS_HOOK = f"blocks.{N_LAYERS - 1}.hook_resid_post", f"transformer.h.{N_LAYERS - 1}"
GROWTH = (1, 2, 4, 8, 16)
# nothing scaled, gradients clipped, and a latent dead after 1,000 steps: none is in these runs, and AuxK only counts
LIKE_SAELENS = {"normalize_activations": "none", "max_grad_norm": 1.0, "dead_window": 1000 * BATCH_TOKENS}
PEAK_STEPS = 2  # the second step needs no more memory than any later one


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), STEPS)
        bench.check()
        seconds = interleaved_seconds(bench.contenders(say), REPEATS, uncounted=0)
        say(f"{N_SAES} topk SAEs, {STEPS} steps each, with checkpoints and export; seconds, medians of {REPEATS}")
        say("  " + ", ".join(f"{name} {float(np.median(spent)):.1f}" for name, spent in seconds.items()))
        found = _described(seconds, say)
        found["longer"] = _Bench(Path(folder) / "longer", LONG_STEPS).longer(say)
        found["growth"] = bench.growth(say)
        found |= bench.read(say)
        if installed("sae_lens", say):
            found["peak_memory"] = bench.peak_memory(say)
    return {"bench": "sweep", "saes": N_SAES, "steps": STEPS, "seconds": seconds, **found, "machine": machine()}


class _Bench:
    """A model's folder, its tokens, a cache of its rows, and fresh folders to write to, all below `folder`."""

    def __init__(self, folder: Path, n_steps: int):
        self.folder, self.model_folder, self.n_steps = folder, folder / "model", n_steps
        for part in random_gpt2_module(N_LAYERS, D_MODEL):
            part.save_pretrained(self.model_folder)
        self.outs = (folder / f"out-{number}" for number in count())
        self.model = _model()
        self.cache = self.harvest()

    def harvest(self) -> Cache:
        """Our cache of the rows."""
        config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0)
        documents = random_documents(self.n_steps * BATCH_TOKENS // CONTEXT_SIZE)
        return harvest(self.model, documents, config, next(self.outs))

    def sweep(self, n_saes: int) -> None:
        """Our sweep of that many."""
        train(self.cache, _sweep(range(n_saes), self.n_steps), next(self.outs))

    def contenders(self, say: Say) -> dict[str, Callable[[], object]]:
        """What takes turns; the first two are ours."""
        resident = _resident(self.cache, self.n_steps)
        ours = {"harvest": self.harvest, "sweep": lambda: self.sweep(N_SAES), "resident": resident}
        if not installed("sae_lens", say):
            return ours
        runners = _runners(self.cache, self.model_folder, self.n_steps)
        weights = fresh_state(_config(self.cache)).weights
        arrow = next(self.outs)
        _check_rows(self.cache, runners.cache(arrow))
        return ours | {
            "saelens cache": lambda: runners.cache(next(self.outs)),
            "saelens cached run": lambda: runners.train_one(weights, next(self.outs), cached=arrow),
            "saelens run": lambda: runners.train_one(weights, next(self.outs)),
            "saelens multi": lambda: runners.train_many([weights] * N_SAES, next(self.outs)),
        }

    def longer(self, say: Say) -> dict[str, Any]:
        """What is read from caches that are there, over steps enough for what an SAE costs but once to matter less."""
        contenders = self.contenders(say)
        chosen = {name: contenders[name] for name in ("sweep", "resident", "saelens cached run") if name in contenders}
        seconds = interleaved_seconds(chosen, REPEATS, uncounted=0)
        medians = ", ".join(f"{name} {float(np.median(spent)):.1f}" for name, spent in seconds.items())
        say(f"{self.n_steps} steps each; seconds, medians of {REPEATS}: {medians}")
        return {"steps": self.n_steps, "seconds": seconds, **_from_a_cache(seconds, say)}

    def check(self) -> None:
        """An SAE of a sweep ends equal to the same one trained alone."""
        together, alone = next(self.outs), next(self.outs)
        train(self.cache, _sweep(range(2), 2), together)
        train(self.cache, _sweep([1], 2), alone)
        ours, theirs = (load_file(out / "seed-1" / "sae" / "sae_weights.safetensors") for out in (together, alone))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def growth(self, say: Say) -> dict[str, float]:
        """SAE * tokens/s of sweeps of other sizes, each run once."""
        turns = {str(n): lambda n=n: self.sweep(n) for n in GROWTH}
        seconds = interleaved_seconds(turns, 1, uncounted=0)
        rates = {n: int(n) * self.n_steps * BATCH_TOKENS / spent[0] for n, spent in seconds.items()}
        say("growth, SAE * tokens/s: " + ", ".join(f"{n} SAEs {rate:,.0f}" for n, rate in rates.items()))
        return rates

    def read(self, say: Say) -> dict[str, float]:
        """Bytes that a sweep makes the disk read of the cache's rows, none of which is in memory before."""
        files = [path for path in (self.cache.path / STORE / "train" / HOOK).rglob("*") if path.is_file()]
        stored = sum(path.stat().st_size for path in files)
        forget(files)
        before = bytes_read()
        self.sweep(N_SAES)
        found = {"stored_mb": stored / 1e6, "read_mb": (bytes_read() - before) / 1e6}
        say(f"cold sweep of {N_SAES}: {found['read_mb']:.2f} MB read, {found['stored_mb']:.2f} MB stored")
        return found

    def peak_memory(self, say: Say) -> dict[str, dict[str, float]]:
        """MB that each holds at once: all in, and beyond its modules and, for SAELens, the model."""
        found = {}
        for name in ("ours", "saelens"):
            arguments = [name, str(self.cache.path), str(self.model_folder), str(next(self.outs))]
            command = [sys.executable, "-m", "benchmarks.bench_sweep", *arguments]
            root = Path(__file__).parent.parent
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
            peak, before = (int(number) / 1e6 for number in done.stdout.split()[-2:])
            found[name] = {"peak_mb": peak, "growth_mb": peak - before}
            say(f"peak memory of {name}: {peak:,.0f} MB, {peak - before:,.0f} MB of them of its own")
        return found


def _described(seconds: dict[str, list[float]], say: Say) -> dict[str, Any]:
    """How many times as long SAELens takes, pair by pair."""
    found = _from_a_cache(seconds, say)
    if "saelens run" not in seconds:
        return found
    spent = {name: np.array(each) for name, each in seconds.items()}
    sweep, whole = spent["sweep"], spent["harvest"] + spent["sweep"]
    cached, alone = N_SAES * spent["saelens cached run"], N_SAES * spent["saelens run"]
    more = {
        "cached runs / sweep, both with the harvest": (spent["saelens cache"] + cached, whole),
        "MultiSAETrainingRunner / sweep with the harvest": (spent["saelens multi"], whole),
        "MultiSAETrainingRunner / sweep from a cache": (spent["saelens multi"], sweep),
        "runs on the fly / sweep with the harvest": (alone, whole),
        "runs on the fly / sweep from a cache": (alone, sweep),
    }
    return found | _ratios(more, say)


def _from_a_cache(seconds: dict[str, list[float]], say: Say) -> dict[str, Any]:
    """The sweep against the bare steps, and N_SAES times SAELens' cached run, which is timed alone."""
    spent = {name: np.array(each) for name, each in seconds.items()}
    pairs = {"resident / sweep": (spent["resident"], spent["sweep"])}
    if "saelens cached run" in spent:
        cached = N_SAES * spent["saelens cached run"]
        pairs["cached runs / sweep, from caches that are there"] = (cached, spent["sweep"])
    return _ratios(pairs, say)


def _ratios(pairs: dict[str, tuple[np.ndarray, np.ndarray]], say: Say) -> dict[str, Any]:
    found = {name: ratios(theirs.tolist(), ours.tolist()) for name, (theirs, ours) in pairs.items()}
    for name, ratio in found.items():
        say(described(name, ratio))
    return found


def _model() -> LanguageModel:
    model, tokenizer = random_gpt2_module(N_LAYERS, D_MODEL)
    return wrap_model(model, tokenizer, name="random-gpt2")


def _runners(cache: Cache, model_folder: Path, steps: int) -> SAELensRunners:
    """SAELens over the cache's tokens, as many as `steps` batches have."""
    return SAELensRunners(
        model_folder=model_folder,
        model=saelens_model(model_folder, SAELENS_HOOK),
        hook_name=SAELENS_HOOK,
        sequences=cache.sequences("train")[: steps * BATCH_TOKENS // CONTEXT_SIZE],
        config=_config(cache),
        batch_tokens=BATCH_TOKENS,
    )


def _sweep(seeds: Sequence[int], steps: int) -> SweepConfig:
    run = {"architecture": "topk", "hook_name": HOOK, "d_sae": D_SAE, "k": K, "lr": 1e-4}
    return SweepConfig.from_dict(
        {
            "batch_tokens": BATCH_TOKENS,
            "tokens": steps * BATCH_TOKENS,
            "exclude_special_tokens": False,
            "base": {**run, **LIKE_SAELENS},
            "runs": [{"name": f"seed-{seed}", "seed": seed} for seed in seeds],
        }
    )


def _config(cache: Cache) -> SAEConfig:
    return _sweep([0], STEPS).expand(cache, training_tokens=10_000_000)[0]


def _resident(cache: Cache, n_steps: int) -> Callable[[], None]:
    config = _config(cache)
    x = cache.hook_reader("train", HOOK).read(0, BATCH_TOKENS).float()
    steps = [our_step(fresh_state(config)) for _ in range(N_SAES)]

    def run_resident() -> None:
        for _ in range(n_steps):
            for step in steps:
                step(x)

    return run_resident


def _check_rows(cache: Cache, dataset: Any) -> None:
    """SAELens' cache has the rows of ours: they differ by our rounding to bfloat16, half a unit of eight bits.

    And by float32 sums of 512 and 2048 terms in another order, over four blocks.
    """
    first = dataset.with_format("torch")[:1][SAELENS_HOOK].flatten(0, 1)
    for position, x in _first_rows(cache):
        torch.testing.assert_close(first[position], x, rtol=2**-8 + 1e-4, atol=1e-4)


def _first_rows(cache: Cache) -> Iterator[tuple[int, torch.Tensor]]:
    """(position, x) of the rows of the first sequence."""
    n_rows = cache.n_rows()
    sequence, position = (cache.token_reader("train", name).read(0, n_rows) for name in ("sequence", "position"))
    x = cache.hook_reader("train", HOOK).read(0, n_rows)
    for row in np.flatnonzero(sequence == 0):
        yield int(position[row]), x[row].float()


def main(name: str, cache_folder: str, model_folder: str, out: str) -> None:
    """Run by `_Bench.peak_memory` in a process of its own: prints its peak and what it held before, in bytes."""
    cache = open_cache(cache_folder)
    work = partial(train, cache, _sweep(range(N_SAES), PEAK_STEPS), out)
    if name == "saelens":
        runners = _runners(cache, Path(model_folder), PEAK_STEPS)
        work = partial(runners.train_many, [fresh_state(runners.config).weights] * N_SAES, Path(out))
    before = peak_resident_bytes()
    work()
    print(peak_resident_bytes(), before)


if __name__ == "__main__":
    main(*sys.argv[1:])
