"""The harvest of one, three and six hooks against the bare forward pass to the same hook; SAELens beside them.

Bound: the transformers module run over the same batches through the same early stop, nothing kept. Ours: the whole
`harvest` call, from the dataset to the finished cache, lossless bfloat16. SAELens: `CacheActivationsRunner.run` for
one hook, which is all that it takes in one pass, in its default float32, without its shuffle. The model is a GPT-2 of
twelve blocks, 768 wide, with random weights: speed does not depend on them. How the cost grows: one hook also over a
quarter of the tokens. Whoever goes first in a round goes last in the next.

    actcache bench harvest
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.language_model import LanguageModel
from actcache.store.cache import Cache
from benchmarks.measure import Cost, Say, described, installed, interleaved_costs, machine, ratios
from benchmarks.stream import CONTEXT_SIZE, random_documents, random_gpt2, random_gpt2_module

N_LAYERS, D_MODEL, BATCH_SIZE, N_SEQUENCES, REPEATS = 12, 768, 32, 256, 9
HOOK_LAYERS = {"1 hook": (11,), "3 hooks": (3, 7, 11), "6 hooks": (1, 3, 5, 7, 9, 11)}
SAELENS_BUFFER_GB = 0.055  # float32 rows of four batches: a whole run
QUARTER = "1 hook, a quarter of the tokens"


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    model, dataset = random_gpt2(N_LAYERS, D_MODEL), random_documents(N_SEQUENCES)
    n_tokens = N_SEQUENCES * CONTEXT_SIZE
    with tempfile.TemporaryDirectory() as folder:
        outs = (Path(folder) / str(number) for number in count())
        cache = harvest(model, dataset, _config("6 hooks"), next(outs))
        _check(cache, model)
        sequences = torch.from_numpy(cache.sequences("train"))
        contenders: dict[str, Callable[[], object]] = {"bare": _bare_forward(model, sequences)}
        for name in HOOK_LAYERS:
            contenders[name] = _ours(model, dataset, _config(name), outs)
        contenders[QUARTER] = _ours(model, random_documents(N_SEQUENCES // 4), _config("1 hook"), outs)
        if installed("sae_lens", say):
            contenders["SAELens, 1 hook"] = _saelens(Path(folder) / "model", model, cache, outs)
        costs = interleaved_costs(contenders, REPEATS)
    result: dict[str, Any] = {"bench": "harvest", "tokens": n_tokens, "layers": N_LAYERS, "d_model": D_MODEL}
    say(f"GPT-2 {N_LAYERS} x {D_MODEL}, context {CONTEXT_SIZE}, batch {BATCH_SIZE}, {n_tokens} tokens a run")
    quarter = costs.pop(QUARTER)
    for name, spent in costs.items():
        result[name] = _described(name, spent, costs["bare"], n_tokens, say)
    result["tokens_x4"] = ratios([cost.wall for cost in costs["1 hook"]], [cost.wall for cost in quarter])
    say(described("1 hook, seconds for four times the tokens", result["tokens_x4"]))
    return {**result, "machine": machine()}


def _described(name: str, spent: Sequence[Cost], bare: Sequence[Cost], n_tokens: int, say: Say) -> dict[str, Any]:
    found = ratios([cost.wall for cost in bare], [cost.wall for cost in spent])
    cpu = ratios([cost.cpu for cost in bare], [cost.cpu for cost in spent])
    rate = n_tokens / float(np.median([cost.wall for cost in spent]))
    cpu_seconds = float(np.median([cost.cpu for cost in spent]))
    say(f"{name}: {rate:,.0f} tokens/s, {cpu_seconds:.1f} CPU seconds")
    if name != "bare":
        say("  " + described("of the bare forward pass", found))
        say("  " + described("bare CPU seconds over its own", cpu))
    return {
        "tokens_per_second": rate,
        "cpu_seconds": cpu_seconds,
        "of_bare": found,
        "of_bare_cpu": cpu,
        "wall_seconds": [round(cost.wall, 3) for cost in spent],
    }


def _config(name: str) -> HarvestConfig:
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in HOOK_LAYERS[name])
    return HarvestConfig(hook_names=hooks, context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, holdout=0.0)


def _ours(model: LanguageModel, dataset: Any, config: HarvestConfig, outs: Iterator[Path]) -> Callable[[], object]:
    return lambda: harvest(model, dataset, config, next(outs))


def _bare_forward(model: LanguageModel, sequences: torch.Tensor) -> Callable[[], None]:
    """The same batches with one hook that keeps nothing, through the same early stop."""
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"

    def run_bare() -> None:
        for batch in sequences.split(BATCH_SIZE):
            model.activations(batch, [last])
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run_bare


def _saelens(folder: Path, model: LanguageModel, cache: Cache, outs: Iterator[Path]) -> Callable[[], object]:
    """SAELens' cache runner on the same model and tokens; its first run is checked against our rows."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    for part in random_gpt2_module(N_LAYERS, D_MODEL):
        part.save_pretrained(folder)
    sequences = cache.sequences("train")
    config = CacheActivationsRunnerConfig(
        dataset_path="in memory",
        model_name=str(folder),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=BATCH_SIZE,
        hook_name=f"transformer.h.{N_LAYERS - 1}",
        d_in=D_MODEL,
        training_tokens=sequences.size,
        context_size=CONTEXT_SIZE,
        new_cached_activations_path=str(next(outs)),
        shuffle=False,
        buffer_size_gb=SAELENS_BUFFER_GB,
        device=str(model.device),
        prepend_bos=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": sequences.tolist()}))

    def run_once() -> Any:
        config.new_cached_activations_path = str(next(outs))
        return runner.run()

    stored = run_once().with_format("torch")[:BATCH_SIZE][config.hook_name]
    x = model.activations(torch.from_numpy(sequences[:BATCH_SIZE]), [f"blocks.{N_LAYERS - 1}.hook_resid_post"])
    # twelve blocks of float32 sums of 768 and 3072 terms, in another order of operations
    torch.testing.assert_close(stored, next(iter(x.values())).cpu(), rtol=1e-4, atol=1e-4)
    return run_once


def _check(cache: Cache, model: LanguageModel) -> None:
    """The stored rows of the first batch are the model's, in bfloat16."""
    rows = cache.manifest.shard_rows
    sequence = cache.token_reader("train", "sequence").read(0, rows)
    position = cache.token_reader("train", "position").read(0, rows)
    first = sequence < BATCH_SIZE
    x = model.activations(torch.from_numpy(cache.sequences("train")[:BATCH_SIZE]), cache.hook_names)
    for hook_name in cache.hook_names:
        stored = cache.hook_reader("train", hook_name).read(0, rows)[torch.from_numpy(first)]
        assert torch.equal(stored, x[hook_name].bfloat16().cpu()[sequence[first], position[first]])
