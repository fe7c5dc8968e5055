"""`sample_model`: compares stored activations with those that the model gives, for a few sequences."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from actcache.arguments import typed, whole_number
from actcache.errors import ConfigError
from actcache.flow import SPLITS
from actcache.format.codecs import codec, stored_tensors
from actcache.format.dtypes import TORCH_DTYPE, storage_view
from actcache.format.int8 import BLOCK_CHANNELS
from actcache.format.paths import STORE, shard_key
from actcache.format.records import HookSpec
from actcache.harvesting.provenance import compute_of, other_compute, refuse_other_model
from actcache.integrity.problems import Problem
from actcache.machine.limits import require_memory_for_array
from actcache.models.language_model import LanguageModel
from actcache.models.probe import unit_roundoff
from actcache.store.cache import Cache
from actcache.store.journal import hook_computes
from actcache.store.reader import HookReader
from actcache.store.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """n_rows: how many rows were compared, summed over the hooks.

    notes: how the model ran otherwise than at the harvest.
    """

    n_sequences: int
    n_rows: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def sample_model(cache: Cache, model: LanguageModel, n_sequences: int, *, seed: int = 0) -> SampleReport:
    """Run a random sample of sequences through the model, in the forward batches of the harvest, and compare.

    If the model runs as it ran at the harvest (device kind, torch, dtype, attention kernel, ...), the stored rows must
    be equal to the bit. Otherwise they may differ by the model's `tolerance` and by the rounding of their storage; a
    note says so.

    Args:
        cache: the opened cache.
        model: the model that was harvested.
        n_sequences: how many sequences are sampled, from both splits.
        seed: of the sample.

    Raises:
        ConfigError: n_sequences is below 1.
        CacheMismatch: it is another model, or it has another tokenizer.
        CorruptShard: a chunk that is compared is damaged; `verify` lists all of them.
    """
    if typed("verify", "n_sequences", n_sequences, int) < 1:
        raise ConfigError(f"verify: needs at least 1 sequence to sample, got {n_sequences}")
    refuse_other_model(cache.path, cache.identity, model)
    chosen = _chosen(cache, n_sequences, whole_number("verify", "seed", seed))
    problems: list[Problem] = []
    notes: dict[str, None] = {}
    n_rows = 0
    for shard, sequences, compute in _shards(cache, chosen):
        row, x = _computed(model, shard, sequences, compute["batch_size"])
        other = other_compute(compute, compute_of(model, compute["batch_size"]))
        if other:
            notes[
                f"the model was run with another {other}; rows may lie {model.tolerance():.1e} of their norm apart"
            ] = None
        for hook in shard.hooks:
            n_rows += len(row)
            problems += _compared(cache, shard, hook, row, x[hook.hook_name], model.tolerance() if other else None)
    n_chosen = sum(len(numbers) for numbers in chosen.values())
    return SampleReport(n_sequences=n_chosen, n_rows=n_rows, problems=tuple(problems), notes=tuple(notes))


def _chosen(cache: Cache, n_sequences: int, seed: int) -> dict[str, list[int]]:
    """Split -> numbers of the sampled sequences, ascending."""
    counts = [cache.manifest.plan.sequences[split].n_sequences for split in SPLITS]
    ends = np.cumsum(counts)
    require_memory_for_array(8 * int(ends[-1]), f"a choice among the sequences of {cache.path}")
    picked = np.sort(np.random.default_rng(seed).permutation(int(ends[-1]))[:n_sequences])
    parts = np.split(picked, np.searchsorted(picked, ends[:-1]))
    return {
        split: (part - (end - count)).tolist()
        for split, part, end, count in zip(SPLITS, parts, ends, counts, strict=True)
    }


def _shards(cache: Cache, chosen: dict[str, list[int]]) -> Iterator[tuple[Shard, list[int], dict[str, Any]]]:
    """(shard, its sampled sequences, how its hooks were computed). A shard comes once for each way of computing."""
    computes, plan, shard_rows = hook_computes(cache.path), cache.manifest.plan, cache.manifest.shard_rows
    touched: dict[tuple[str, int], list[int]] = defaultdict(list)
    for split, numbers in chosen.items():
        for number in numbers:
            start = number * cache.context_size
            for index in range(start // shard_rows, -(-(start + cache.context_size) // shard_rows)):
                touched[split, index].append(number)
    for (split, index), sequences in touched.items():
        ways: dict[str, list[HookSpec]] = defaultdict(list)
        for hook in cache.manifest.hooks:
            compute = computes.get((split, index, hook.hook_name), cache.manifest.shards[split][index].compute)
            ways[json.dumps(compute, sort_keys=True)].append(hook)
        for compute, hooks in ways.items():
            yield Shard.of(cache.files, plan, split, index, tuple(hooks)), sequences, json.loads(compute)


def _computed(
    model: LanguageModel, shard: Shard, sequences: Sequence[int], batch_size: int
) -> tuple[Int64[np.ndarray, " row"], dict[str, Float[Tensor, "row _"]]]:
    """Run the forward batches that hold some sequences of a shard.

    Args:
        model: the model.
        shard: its hooks are captured.
        sequences: numbers of sequences of the split.
        batch_size: sequences of a forward pass at the harvest.

    Returns:
        the number of each row within the shard, and hook name -> the activations of these rows in the model's dtype.
    """
    hook_names = [hook.hook_name for hook in shard.hooks]
    context_size = shard.sequences.shape[1]
    rows: list[np.ndarray] = []
    x: dict[str, list[Tensor]] = {hook_name: [] for hook_name in hook_names}
    for tokens in shard.token_batches(batch_size):
        inside = [number for number in sequences if 0 <= number - tokens.first_sequence < len(tokens.token_ids)]
        found = model.activations(torch.from_numpy(tokens.token_ids), hook_names) if inside else {}
        for number in inside:
            first = number * context_size - shard.first_token  # negative if the sequence begins in the shard before
            start, stop = max(first, 0), min(first + context_size, shard.n_rows)
            rows.append(shard.permutation[start:stop])
            for hook_name, values in found.items():
                x[hook_name].append(values[number - tokens.first_sequence, start - first : stop - first].cpu())
    return np.concatenate(rows), {hook_name: torch.cat(values) for hook_name, values in x.items()}


def _compared(
    cache: Cache,
    shard: Shard,
    hook: HookSpec,
    row: Int64[np.ndarray, " row"],
    x: Float[Tensor, "row d_in"],
    share: float | None,
) -> Iterator[Problem]:
    """Compare stored rows of a hook with computed ones; yields one problem, or none.

    Args:
        cache: the opened cache.
        shard, hook: where the rows are stored.
        row: numbers of the rows within the shard.
        x: the computed rows.
        share: the tolerance; None if the rows must be equal to the bit.
    """
    reader = cache.hook_reader(shard.split, hook.hook_name)
    stored = _gathered(reader, shard.first_token + row)
    norm = x.double().norm(dim=1).numpy()
    error = (reader.values(reader.tensors(stored)).double() - x.double()).norm(dim=1).numpy()
    if share is None:
        wrong = _unequal(stored, stored_tensors(x, hook.dtype, codec(cache.identity["codec"])))
    else:
        wrong = error > share * norm + _rounded_off(reader, stored, norm)
    if wrong.any():
        worst, first = np.max(error[wrong] / norm[wrong]), row[wrong].min()
        array = reader.arrays[0].array
        yield Problem(
            path=str(cache.files.path(f"{STORE}/{shard.split}/{shard_key(array, shard.index)}")),
            split=shard.split,
            array=array.path,
            shard=shard.index,
            chunk=int(first // array.chunk_rows),
            rows=(int(shard.first_token + first), int(shard.first_token + first) + 1),
            message=f"{wrong.sum()} of {len(row)} sampled rows are not what the model gives, this one first: "
            f"up to {worst:.1e} of their norm away",
        )


def _gathered(reader: HookReader, rows: Int64[np.ndarray, " row"]) -> tuple[Shaped[np.ndarray, "row _"], ...]:
    """The stored elements of some rows of a split, a part for each array of the hook. Each chunk is decoded once."""
    chunk, within = np.divmod(rows, reader.chunk_rows)
    buffer = reader.empty(1)
    gathered = tuple(np.empty((len(rows), *part.shape[1:]), dtype=part.dtype) for part in buffer)
    for number in np.unique(chunk).tolist():
        reader.decode_into(number, buffer)
        in_chunk = chunk == number
        for part, decoded in zip(gathered, buffer, strict=True):
            part[in_chunk] = decoded[within[in_chunk]]
    return gathered


def _unequal(stored: Sequence[np.ndarray], expected: Sequence[Tensor]) -> Bool[np.ndarray, " row"]:
    """Which rows differ in any bit."""
    pairs = [
        (ours.view(np.uint8), storage_view(theirs).view(np.uint8))
        for ours, theirs in zip(stored, expected, strict=True)
    ]
    return np.any([(ours != theirs).any(axis=1) for ours, theirs in pairs], axis=0)


def _rounded_off(
    reader: HookReader, stored: Sequence[np.ndarray], norm: Float64[np.ndarray, " row"]
) -> Float64[np.ndarray, " row"]:
    """How far storage moved each row at most: by rounding to its dtype, and by half a step of a quantised channel."""
    moved = unit_roundoff(TORCH_DTYPE[reader.hook.dtype]) * norm
    if len(stored) == 1:
        return moved
    steps = reader.tensors(stored)[1].double().repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : reader.hook.d_in]
    return 2 * moved + (steps.norm(dim=1) / 2).numpy()
