"""What a harvest sets out to do, settled before the first forward pass: the identity and the packed sequences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from actcache.cache import PLAN, STORE
from actcache.codecs import ACTIVATION_DTYPES, TORCH_DTYPE, Codec, codec
from actcache.errors import CacheMismatch, ConfigError, DatasetError
from actcache.flow import SPLITS
from actcache.manifest import (
    FORMAT_VERSION,
    HOOK_NAME,
    ArrayRecord,
    ArraySpec,
    Plan,
    SequencesRecord,
    chunk_rows,
    seal,
    sequence_arrays,
    shard_key,
    shard_rows,
    unseal,
)
from actcache.models import LanguageModel
from actcache.tokens import PackedSequence, Packing, Source, documents, pack, tokenizer_hash
from actcache.writer import write_atomically, write_shard

SEPARATORS = ("bos", "eos", "none")
SIZES = ("shard_rows", "chunk_rows")  # settled when a cache is created, not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestConfig:
    """What to harvest, and how it is packed and stored.

    tokens: stored rows of both splits, rounded down to whole sequences; None takes the whole dataset.
    dtype: of the stored values. batch_size: sequences of one forward pass; None takes about 4,096 tokens on a CPU and
    32,768 on CUDA. separator: the token between documents. holdout: share of documents in the validation split.
    """

    hook_names: tuple[str, ...]
    tokens: int | None = None
    context_size: int = 128
    codec: str = "lossless"
    dtype: str = "bfloat16"
    batch_size: int | None = None
    prepend_bos: bool = True
    separator: str = "bos"
    seed: int = 0
    holdout: float = 0.01

    def __post_init__(self) -> None:
        codec(self.codec)
        for hook_name in self.hook_names:
            if not HOOK_NAME.fullmatch(hook_name):
                raise ConfigError(f"harvest: a hook name is words joined by dots, got {hook_name!r}")
        rules = {
            "hook_names must name at least one hook, each once": (
                len(self.hook_names) == len(set(self.hook_names)) > 0,
                self.hook_names,
            ),
            "context_size must be at least 2": (self.context_size >= 2, self.context_size),
            "tokens must fill at least one sequence": (
                self.tokens is None or self.tokens >= self.context_size,
                self.tokens,
            ),
            f"dtype must be one of {', '.join(ACTIVATION_DTYPES)}": (self.dtype in ACTIVATION_DTYPES, self.dtype),
            "batch_size must be at least 1": (self.batch_size is None or self.batch_size >= 1, self.batch_size),
            f"separator must be one of {', '.join(SEPARATORS)}": (self.separator in SEPARATORS, self.separator),
            "seed must be at least 0": (self.seed >= 0, self.seed),
            "holdout must be in [0, 1)": (0 <= self.holdout < 1, self.holdout),
        }
        for rule, (kept, got) in rules.items():
            if not kept:
                raise ConfigError(f"harvest: {rule}, got {got!r}")


def settle_plan(root: Path, model: LanguageModel, source: Source, config: HarvestConfig, widest: int) -> Plan:
    """The plan on disk if it is the one asked for, else a new one, for which the dataset is packed.

    widest: the largest d_in of the asked hooks. Raises CacheMismatch, listing the differences, and DatasetError.
    """
    path = root / PLAN
    wanted = _identity(model, source, config)
    if path.exists():
        plan = Plan.from_json(unseal(path.read_bytes(), path))
        _refuse_other_plan(root, plan, wanted, config.tokens)
        return plan
    sequences = _pack(root, model, source, config)
    itemsize = TORCH_DTYPE[config.dtype].itemsize
    rows = shard_rows(
        widest,
        itemsize,
        n_hooks=len(config.hook_names),
        n_rows=max(record.n_sequences for record in sequences.values()) * config.context_size,
        context_size=config.context_size,
    )
    sizes = {"shard_rows": rows, "chunk_rows": chunk_rows(widest, itemsize, rows)}
    plan = Plan(identity={**wanted, **sizes}, tokens=config.tokens, sequences=sequences)
    sealed = seal(plan.to_json())
    write_atomically(path, [sealed])
    return Plan.from_json(unseal(sealed, path))  # as a resumed run reads it, down to the order of its keys


def _refuse_other_plan(root: Path, plan: Plan, wanted: dict[str, Any], tokens: int | None) -> None:
    held = {**plan.identity, "tokens": plan.tokens}
    wanted = {**wanted, "tokens": tokens, **{size: plan.identity[size] for size in SIZES}}
    differences = [
        f"{key} is {held.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{root}: holds another cache: {'; '.join(differences)}; pass another --out")


def _identity(model: LanguageModel, source: Source, config: HarvestConfig) -> dict[str, Any]:
    identity = {
        "format_version": FORMAT_VERSION,
        "model": model.identity,
        "tokenizer_sha256": tokenizer_hash(model.tokenizer),
        "special_token_ids": sorted(set(model.tokenizer.all_special_ids)),
        "dataset": source.identity(),
        "context_size": config.context_size,
        "prepend_bos": config.prepend_bos,
        "separator": config.separator,
        "dtype": config.dtype,
        "codec": config.codec,
        "seed": config.seed,
        "holdout": config.holdout,
    }
    return json.loads(json.dumps(identity))  # as it reads back, so that it compares equal


def _packing(model: LanguageModel, config: HarvestConfig) -> Packing:
    tokenizer = model.tokenizer
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}
    return Packing(
        context_size=config.context_size,
        bos_id=ids["bos"] if config.prepend_bos else None,
        separator_id=ids[config.separator],
    )


def _pack(root: Path, model: LanguageModel, source: Source, config: HarvestConfig) -> dict[str, SequencesRecord]:
    wanted = None if config.tokens is None else config.tokens // config.context_size
    store = codec(config.codec)
    arrays = {array.path: array for array in sequence_arrays(config.context_size)}
    writers = {
        split: {path: _SequenceWriter(root / STORE / split, array, store) for path, array in arrays.items()}
        for split in SPLITS
    }
    found = 0
    stream = pack(documents(source, model.tokenizer), _packing(model, config), seed=config.seed, holdout=config.holdout)
    for sequence in stream:
        _add_sequence(writers[sequence.split], sequence)
        found += 1
        if found == wanted:
            break
    if found == 0:
        raise DatasetError(f"dataset: holds no text that fills a sequence of {config.context_size} tokens")
    if wanted is not None and found < wanted:
        raise DatasetError(
            f"dataset: {config.tokens} tokens asked, it holds {found * config.context_size} "
            f"({found} sequences of {config.context_size}); pass --tokens {found * config.context_size} or fewer"
        )
    return {
        split: SequencesRecord(
            n_sequences=next(iter(writers[split].values())).n_rows,
            arrays={path: writer.finish() for path, writer in writers[split].items()},
        )
        for split in SPLITS
    }


def _add_sequence(writers: dict[str, _SequenceWriter], sequence: PackedSequence) -> None:
    writers["sequences/id"].add(sequence.token_ids)
    writers["sequences/document"].add(sequence.documents)


class _SequenceWriter:
    """Gathers rows of a sequence array and writes each full shard, which is one chunk."""

    def __init__(self, folder: Path, array: ArraySpec, store: Codec):
        self._folder, self._array, self._codec = folder, array, store
        self._rows: list[np.ndarray] = []
        self._records: list[ArrayRecord] = []
        self.n_rows = 0

    def add(self, row: Int32[np.ndarray, " position"]) -> None:
        self._rows.append(row)
        self.n_rows += 1
        if len(self._rows) == self._array.chunk_rows:
            self._flush()

    def finish(self) -> tuple[ArrayRecord, ...]:
        if self._rows:
            self._flush()
        return tuple(self._records)

    def _flush(self) -> None:
        path = self._folder / shard_key(self._array, len(self._records))
        chunk = np.stack(self._rows)
        self._records.append(write_shard(path, self._array, self._codec, [chunk], self._array.chunk_rows))
        self._rows.clear()
