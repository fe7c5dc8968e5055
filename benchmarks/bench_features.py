"""What each of 4,096 latents fires on: our pass over the cache against the way of SAELens' tutorials.

A topk SAE (512 -> 4096, k 32) of random weights around the mean row; rows of the last hook of a GPT-2 of four blocks,
512 wide, with random weights, nearly all of them held out. Ours: `build_features` over the whole split, on disk, and
then the top contexts of every latent. SAELens: for each batch of 32 prompts the model's forward pass up to the hook,
its SAE's dense encode, and a running topk of every latent's activations, over fewer tokens, by the token; its model is
the transformers module that its runners load, in place of the bridge that its notebooks run. Bound: the encoder's
product alone, over as many rows in memory. Peak memory and bytes of ours are of a process that does nothing else.

Before that, both ways give the same activations for the top contexts of a small float32 cache. The harvest is timed
once: it is paid before, and not part of ours.

    actcache bench features
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from benchmarks.measure import Say, described, installed, interleaved_seconds, machine, peak_resident_bytes, ratios
from benchmarks.peers import PROMPTS, saelens_model
from benchmarks.stream import CONTEXT_SIZE, D_MODEL, random_documents, random_gpt2_module
from trainer.config.sweep import SweepConfig
from trainer.features.build import build_features
from trainer.features.read import FOLDER, Features
from trainer.formats.saelens import inference_sae, load_sae, write_run_sae
from trainer.run_folder import CONFIG_FILE, SAE_FOLDER, write_run_json
from trainer.training.step import initial_state

N_TOKENS, TUTORIAL_TOKENS, CHECKED_TOKENS = 1 << 20, 1 << 15, 1 << 14
N_LAYERS, D_SAE, K, TOP, REPEATS = 4, 4096, 32, 20, 3
HOOK, SAELENS_HOOK = f"blocks.{N_LAYERS - 1}.hook_resid_post", f"transformer.h.{N_LAYERS - 1}"
HOLDOUT = 0.98
PRODUCT_ROWS = 4096
CHECKED_TOP, CHECKED_FIRINGS = 5, 40  # the largest of what fires often: none of them is the k-th of its row
SAME = 1e-4  # float32 sums of 512 and 2048 terms, in another order over four blocks


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), say)
        contenders: dict[str, Callable[[], object]] = {"ours": bench.ours, "bound": bench.product}
        if installed("sae_lens", say):
            contenders |= bench.saelens()
        seconds = interleaved_seconds(contenders, REPEATS, uncounted=0)
        found = bench.compared(seconds, say)
        found["peak_memory"] = bench.peak_memory(say)
    return {"bench": "features", "d_sae": D_SAE, "k": K, "seconds": seconds, **found, "machine": machine()}


class _Bench:
    """A model's folder, a cache of its rows, and a RUN with an SAE, all below `folder`."""

    def __init__(self, folder: Path, say: Say):
        self.folder, self.model_folder = folder, folder / "model"
        for part in random_gpt2_module(N_LAYERS, D_MODEL):
            part.save_pretrained(self.model_folder)
        started = time.perf_counter()
        self.cache = _cache(folder / "cache", N_TOKENS, "bfloat16")
        self.harvest_seconds = time.perf_counter() - started
        self.run = _random_run(folder / "run", self.cache)
        self.n_rows = self.cache.n_rows("validation")
        self.x = self.cache.hook_reader("validation", HOOK).read(0, PRODUCT_ROWS).float()
        say(f"{self.n_rows:,} rows harvested in {self.harvest_seconds:.0f} s")

    def ours(self) -> None:
        """Build, and ask for the top contexts of every latent."""
        shutil.rmtree(self.run / FOLDER, ignore_errors=True)
        _top_of_all(build_features(self.run, self.cache))

    def product(self) -> None:
        """The encoder's product of so many rows, into one buffer."""
        W_enc, out = load_sae(self.run).W_enc, torch.empty(PRODUCT_ROWS, D_SAE)
        for _ in range(self.n_rows // PRODUCT_ROWS):
            torch.mm(self.x, W_enc, out=out)

    def saelens(self) -> dict[str, Callable[[], object]]:
        """The way of the tutorials over TUTORIAL_TOKENS, and its forward passes alone; checked before."""
        model, sae = saelens_model(self.model_folder, SAELENS_HOOK), _saelens_sae(self.run)
        self._check(model)
        sequences = torch.from_numpy(self.cache.sequences("validation")[: TUTORIAL_TOKENS // CONTEXT_SIZE]).long()
        return {
            "tutorial": lambda: tutorial_top(model, sae, sequences),
            "forward": lambda: [_activations(model, tokens) for tokens in sequences.split(PROMPTS)] and None,
        }

    def compared(self, seconds: Mapping[str, Sequence[float]], say: Say) -> dict[str, Any]:
        """Rates, and how many times as long a token takes in another way."""
        tokens = {name: TUTORIAL_TOKENS if name in ("tutorial", "forward") else self.n_rows for name in seconds}
        each = {name: [s / tokens[name] for s in spent] for name, spent in seconds.items()}
        rates = {name: 1 / float(np.median(spent)) for name, spent in each.items()}
        say(f"{D_SAE} latents, top {TOP} contexts of each; tokens/s, medians of {REPEATS}")
        say("  " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
        found = {f"{name}_over_ours": ratios(spent, each["ours"]) for name, spent in each.items() if name != "ours"}
        for name, ratio in found.items():
            say("  " + described(name.replace("_", " "), ratio))
        return {"tokens": self.n_rows, "tokens_per_second": rates, "harvest_seconds": self.harvest_seconds, **found}

    def peak_memory(self, say: Say) -> dict[str, float]:
        """MB that a build holds at once, mapped pages included, and before it began; and MB on the disk."""
        shutil.rmtree(self.run / FOLDER, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.bench_features", str(self.run), str(self.cache.path)]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
        peak, before = (int(number) / 1e6 for number in done.stdout.split()[-2:])
        stored = sum(path.stat().st_size for path in (self.run / FOLDER).iterdir()) / 1e6
        say(f"peak memory: {peak:,.0f} MB, {peak - before:,.0f} MB of them of its own; {stored:,.0f} MB on the disk")
        return {"peak_mb": peak, "growth_mb": peak - before, "stored_mb": stored}

    def _check(self, model: Any) -> None:
        """Both ways find the same."""
        cache = _cache(self.folder / "checked", CHECKED_TOKENS, "float32")
        run = _random_run(self.folder / "checked-run", cache)
        features, sequences = build_features(run, cache), torch.from_numpy(cache.sequences("validation")).long()
        special = torch.isin(sequences, torch.tensor(cache.special_token_ids))
        theirs = tutorial_top(model, _saelens_sae(run), sequences, special)
        often = np.flatnonzero(features.n_fired >= CHECKED_FIRINGS).tolist()
        assert len(often) > D_SAE // 4, len(often)
        for latent in often:
            ours = [context.act for context in features.top(latent, CHECKED_TOP)]
            wanted = theirs[:CHECKED_TOP, latent]
            torch.testing.assert_close(torch.tensor(ours), wanted, rtol=SAME, atol=SAME)


def _saelens_sae(run: Path) -> Any:
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it knows how the model was loaded
        return SAE.load_from_disk(run / SAE_FOLDER)


@torch.no_grad()
def tutorial_top(
    model: Any, sae: Any, sequences: Int[Tensor, "sequence position"], special: Tensor | None = None
) -> Float[Tensor, "n d_sae"]:
    """The TOP largest activations of every latent, largest first: forward pass, dense encode, topk, batch after batch.

    special: tokens that do not count; all do where it is None.
    """
    best = torch.zeros(0, D_SAE)
    for number, tokens in enumerate(sequences.split(PROMPTS)):
        acts = sae.encode(_activations(model, tokens)).flatten(0, 1)
        if special is not None:
            acts[special[number * PROMPTS : (number + 1) * PROMPTS].flatten()] = 0
        of_batch = acts.topk(TOP, dim=0).values
        best = torch.cat([best, of_batch]).topk(TOP, dim=0).values
    return best


@torch.no_grad()
def _activations(model: Any, tokens: Int[Tensor, "sequence position"]) -> Float[Tensor, "sequence position d_in"]:
    _, cached = model.run_with_cache(tokens, names_filter=[SAELENS_HOOK], stop_at_layer=N_LAYERS)
    return cached[SAELENS_HOOK]


def _top_of_all(features: Features) -> None:
    for latent in range(features.d_sae):
        if features.n_fired[latent] > 0:
            features.top(latent, TOP)


def _cache(out: Path, n_tokens: int, dtype: str) -> Cache:
    model, tokenizer = random_gpt2_module(N_LAYERS, D_MODEL)
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=HOLDOUT, dtype=dtype)
    documents = random_documents(int(n_tokens / HOLDOUT) // CONTEXT_SIZE)
    return harvest(wrap_model(model, tokenizer, name="random-gpt2"), documents, config, out)


def _random_run(run: Path, cache: Cache) -> Path:
    """A RUN with a topk SAE whose decoder has random directions, its encoder their transpose, b_dec the mean row."""
    settings = {"name": "topk", "architecture": "topk", "hook_name": HOOK, "d_sae": D_SAE, "k": K}
    config = SweepConfig.from_dict({"runs": [settings]}).expand(cache, training_tokens=N_TOKENS)[0]
    mean = torch.from_numpy(np.asarray(cache.statistics(HOOK).mean)).float()
    weights = initial_state(config, mean * config.input_scale).weights
    write_run_sae(run, inference_sae(config, weights, metadata={"model_name": cache.identity["model"]["name"]}))
    write_run_json(run, CONFIG_FILE, {"model": cache.identity["model"]})
    return run


def main(run: str, cache_folder: str) -> None:
    """Run by `_Bench.peak_memory` in a process of its own: prints its peak and what it held before, in bytes."""
    work: Callable[[], Features] = partial(build_features, run, open_cache(cache_folder))
    before = peak_resident_bytes()
    _top_of_all(work())
    print(peak_resident_bytes(), before)


if __name__ == "__main__":
    main(*sys.argv[1:])
