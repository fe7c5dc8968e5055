"""What a harvest sets out to do, settled before the first forward pass: the identity and the packed sequences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, CorruptShard, DatasetError
from actcache.flow import SPLITS
from actcache.format.codecs import ACTIVATION_DTYPES, TORCH_DTYPE, Codec, codec
from actcache.format.manifest import (
    FORMAT_VERSION,
    HOOK_NAME,
    ArrayRecord,
    ArraySpec,
    HookSpec,
    Plan,
    SequencesRecord,
    chunk_rows,
    seal,
    sequence_arrays,
    shard_key,
    shard_rows,
    unseal,
)
from actcache.models.load import LanguageModel
from actcache.store.cache import CACHE_MANIFEST, PLAN, STORE, read_manifest, sequence_reader
from actcache.store.journal import active_writers
from actcache.store.reader import ArrayReader
from actcache.store.zarr_metadata import sync_folder, write_atomically, write_shard
from actcache.text.tokenise import PackedSequence, Packing, Source, documents, pack, tokenizer_hash

AUTO = "auto"
BATCH_TOKENS = 4096  # of a forward pass on a CPU, and at least of a shard
SEPARATORS = ("bos", "eos", "none")
SIZES = ("shard_rows", "chunk_rows")  # settled when a cache is created, not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestConfig:
    """What to harvest, and how it is packed and stored.

    tokens: stored rows of both splits, rounded down to whole sequences; None takes the whole dataset. codec: a profile,
    or "auto" for the one that a short measurement favours. dtype: of the stored values. batch_size: sequences of one
    forward pass; None takes about 4,096 tokens on a CPU and has it measured on CUDA. separator: the token between
    documents. holdout: share of documents in the validation split.
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
        if self.codec != AUTO:
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

    @property
    def batch_sequences(self) -> int:
        """Sequences of a forward pass, as given or as a CPU takes them."""
        return self.batch_size or max(1, BATCH_TOKENS // self.context_size)


def read_plan(root: Path) -> Plan | None:
    """The plan of the cache at `root`, None if there is none yet. Raises ManifestError if it is damaged."""
    path = root / PLAN
    return Plan.from_json(unseal(path.read_bytes(), path)) if path.exists() else None


def settle_plan(
    root: Path, wanted: Mapping[str, Any], sequences: Iterable[PackedSequence], config: HarvestConfig, widest: int
) -> Plan:
    """The plan on disk if it is the one asked for, else a new or a grown one, for which the dataset is packed.

    A cache that grows is unfinished from then on: manifest/cache.json goes before anything that it speaks of changes.
    wanted: the identity, but for SIZES. sequences: those of the dataset, asked for only where they are needed.
    config.codec must be settled. widest: the largest d_in of the asked hooks.

    Raises:
        CacheMismatch: there is another cache, with a list of the differences; or the dataset has changed.
        CacheLocked: it has to grow while another process writes.
        DatasetError: the dataset holds fewer tokens than asked.
    """
    held = read_plan(root)
    if held is not None:
        refuse_other_identity(root, held, wanted)
        if _covers(held, config.tokens) and _tails_are_sound(root, held):
            _refuse_unfinished(root, held, config.tokens)
            _remove_unplanned(root, held)
            return held
        if len(active_writers(root)) > 1:
            raise CacheLocked(f"{root}: other processes write this cache; wait for them before it grows")
    packed = _Packed(root, codec(config.codec), config.context_size, held)
    try:
        _pack(packed, sequences, config)
        packed.finish()
    except BaseException:
        packed.abandon()
        raise
    hooks = _finished_hooks(root, held)
    if held is not None:
        _write_plan(root, replace(held, hooks=hooks))  # they would be lost with manifest/cache.json
    (root / CACHE_MANIFEST).unlink(missing_ok=True)
    sync_folder((root / PLAN).parent)
    stored = packed.commit()
    sizes = _sizes(config, widest, stored) if held is None else {size: held.identity[size] for size in SIZES}
    plan = Plan(identity={**wanted, **sizes}, tokens=config.tokens, sequences=stored, hooks=hooks)
    _remove_unplanned(root, plan)
    return _write_plan(root, plan)


def _write_plan(root: Path, plan: Plan) -> Plan:
    """The plan as a resumed run reads it, down to the order of its keys."""
    sealed = seal(plan.to_json())
    write_atomically(root / PLAN, [sealed])
    return Plan.from_json(unseal(sealed, root / PLAN))


def _remove_unplanned(root: Path, plan: Plan) -> None:
    """Delete the shards of sequences, beyond those of the plan, that a killed run for more tokens has left."""
    for split, record in plan.sequences.items():
        for array in sequence_arrays(plan.identity["context_size"]):
            paths = (root / STORE / split / shard_key(array, index) for index in count(len(record.arrays[array.path])))
            for path in takewhile(Path.exists, paths):
                path.unlink()


def _finished_hooks(root: Path, held: Plan | None) -> tuple[HookSpec, ...]:
    """What must not be lost when the cache grows; a second attempt finds it in the plan of the first."""
    if held is None:
        return ()
    return read_manifest(root).manifest.hooks if (root / CACHE_MANIFEST).exists() else held.hooks


def _sizes(config: HarvestConfig, widest: int, sequences: dict[str, SequencesRecord]) -> dict[str, int]:
    itemsize = TORCH_DTYPE[config.dtype].itemsize
    rows = shard_rows(
        widest,
        itemsize,
        n_hooks=len(config.hook_names),
        n_rows=max(record.n_sequences for record in sequences.values()) * config.context_size,
        batch_tokens=config.batch_sequences * config.context_size,
    )
    return {"shard_rows": rows, "chunk_rows": chunk_rows(widest, itemsize, rows)}


def count_sequences(model: LanguageModel, source: Source, config: HarvestConfig) -> int:
    """How many sequences the whole dataset fills."""
    return sum(1 for _ in packed_sequences(model, source, config))


def packed_sequences(model: LanguageModel, source: Source, config: HarvestConfig) -> Iterator[PackedSequence]:
    """The sequences of the dataset, of both splits."""
    texts = documents(source, model.tokenizer)
    return pack(texts, packing(model, config), seed=config.seed, holdout=config.holdout)


def refuse_other_identity(root: Path, held: Plan, wanted: Mapping[str, Any]) -> None:
    """Raise CacheMismatch, listing the differences, if the plan there is not of this identity (but for SIZES)."""
    wanted = {**wanted, **{size: held.identity[size] for size in SIZES}}
    differences = [
        f"{key} is {held.identity.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held.identity, *wanted})
        if held.identity.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{root}: holds another cache: {'; '.join(differences)}; pass another --out")


def refuse_other_model(root: Path, identity: Mapping[str, Any], model: LanguageModel) -> None:
    """Raise CacheMismatch unless it is the model of that identity, wherever it lies, with its tokenizer.

    Hashes are compared where both have them, else name and revision; of an imported cache, which has none, the name.
    """
    there = {**identity["model"], "tokenizer_sha256": identity["tokenizer_sha256"]}
    here = {**model.identity, "tokenizer_sha256": tokenizer_hash(model.tokenizer)}
    hashes = [key for key in ("config_sha256", "weights_sha256") if there.get(key) and here.get(key)]
    keys = [*(hashes or ("name", "revision")), "tokenizer_sha256"]
    if identity["tokenizer_sha256"] is None:
        keys = ["name"]
    differences = [f"{key} is {there.get(key)} there, {here[key]} here" for key in keys if there.get(key) != here[key]]
    if differences:
        raise CacheMismatch(
            f"{root}: was harvested from {there['name']!r}, the model is {here['name']!r}: {'; '.join(differences)}; "
            "pass that model, loaded in the same dtype"
        )


def _covers(held: Plan, tokens: int | None) -> bool:
    """Whether the plan has as many rows as are asked for; None asks for all there are."""
    if tokens is None:
        return held.tokens is None
    return tokens // held.identity["context_size"] * held.identity["context_size"] <= _n_rows(held)


def _n_rows(plan: Plan) -> int:
    return sum(plan.n_rows(split) for split in SPLITS)


def _refuse_unfinished(root: Path, held: Plan, tokens: int | None) -> None:
    """Fewer tokens than a finished cache holds are there already; an unfinished one would get more than was asked."""
    if tokens != held.tokens and not (root / CACHE_MANIFEST).exists():
        raise CacheMismatch(
            f"{root}: holds an unfinished harvest of {held.tokens or 'all'} tokens, {tokens} asked; finish it with "
            f"{'no --tokens' if held.tokens is None else f'--tokens {held.tokens}'}, or pass another --out"
        )


def _tails_are_sound(root: Path, plan: Plan) -> bool:
    """Whether the last shard of every sequence array is what the plan says: a kill while growing may leave another."""
    for split in SPLITS:
        for name in ("id", "document"):
            reader = sequence_reader(root, plan, split, name)
            try:
                reader.read(max(reader.n_rows - 1, 0), reader.n_rows)
            except CorruptShard:
                return False
    return True


def identity_of(model: LanguageModel, source: Source, config: HarvestConfig) -> dict[str, Any]:
    """What tells the cache of this harvest from another, but for SIZES."""
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


def packing(model: LanguageModel, config: HarvestConfig) -> Packing:
    """How documents become sequences with this model's tokenizer."""
    tokenizer = model.tokenizer
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}
    return Packing(
        context_size=config.context_size,
        bos_id=ids["bos"] if config.prepend_bos else None,
        separator_id=ids[config.separator],
    )


def _pack(packed: _Packed, sequences: Iterable[PackedSequence], config: HarvestConfig) -> None:
    """Write as many sequences as are asked for. Raises DatasetError if there are fewer."""
    wanted = None if config.tokens is None else config.tokens // config.context_size
    found = 0
    for sequence in sequences:
        packed.add(sequence)
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


class _Packed:
    """The sequence arrays of both splits while they are written; a held plan's shards are kept and compared."""

    def __init__(self, root: Path, store: Codec, context_size: int, held: Plan | None):
        self._store = root / STORE
        self._writers: dict[str, dict[str, _SequenceWriter]] = {split: {} for split in SPLITS}
        for split in SPLITS:
            for name, array in zip(("id", "document"), sequence_arrays(context_size), strict=True):
                reader = sequence_reader(root, held, split, name) if held else None
                self._writers[split][name] = _SequenceWriter(root / STORE / split, array, store, reader)

    def add(self, sequence: PackedSequence) -> None:
        self._writers[sequence.split]["id"].add(sequence.token_ids)
        self._writers[sequence.split]["document"].add(sequence.documents)

    def finish(self) -> None:
        """Write what does not fill a shard. Raises CacheMismatch if the held plan has more sequences."""
        for writer in self._each():
            writer.finish()

    def commit(self) -> dict[str, SequencesRecord]:
        """Replace what has to be replaced; returns what is stored then."""
        return {
            split: SequencesRecord(
                n_sequences=writers["id"].n_rows, arrays={writer.path: writer.commit() for writer in writers.values()}
            )
            for split, writers in self._writers.items()
        }

    def abandon(self) -> None:
        """Remove the shards that no plan speaks of, and the folders made for them."""
        for writer in self._each():
            writer.abandon()
        for path in sorted([self._store, *self._store.rglob("*")], reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _each(self) -> Iterator[_SequenceWriter]:
        return (writer for writers in self._writers.values() for writer in writers.values())


class _SequenceWriter:
    """Gathers rows of a sequence array and writes each full shard, which is one chunk.

    Shards that a held plan speaks of are not touched before `commit`: whole ones must come out as they are, the partial
    tail must begin as it is. A damaged one is written anew.
    """

    def __init__(self, folder: Path, array: ArraySpec, store: Codec, held: ArrayReader | None):
        self.path, self.n_rows = array.path, 0
        self._folder, self._array, self._codec, self._held = folder, array, store, held
        self._rows: list[np.ndarray] = []
        self._records: list[ArrayRecord | None] = []
        self._changed: dict[int, np.ndarray] = {}

    def add(self, row: Int32[np.ndarray, " position"]) -> None:
        self._rows.append(row)
        self.n_rows += 1
        if len(self._rows) == self._array.chunk_rows:
            self._flush()

    def finish(self) -> None:
        if self._rows:
            self._flush()
        if self._held and self.n_rows < self._held.n_rows:
            raise self._other_tokens(f"{self.n_rows} sequences instead of {self._held.n_rows}")

    def commit(self) -> tuple[ArrayRecord, ...]:
        for index, chunk in self._changed.items():
            self._records[index] = self._written(index, chunk)
        return tuple(record for record in self._records if record is not None)

    def abandon(self) -> None:
        for index in range(self._n_held, len(self._records)):
            self._shard_path(index).unlink(missing_ok=True)

    @property
    def _n_held(self) -> int:
        return self._held.n_chunks if self._held else 0

    def _flush(self) -> None:
        index, chunk = len(self._records), np.stack(self._rows)
        self._rows.clear()
        record = self._kept(index, chunk) if index < self._n_held else self._written(index, chunk)
        if record is None:
            self._changed[index] = chunk
        self._records.append(record)

    def _kept(self, index: int, chunk: np.ndarray) -> ArrayRecord | None:
        """The held shard's record if it is these rows, None if it has to change. Raises CacheMismatch for others."""
        assert self._held is not None, "index < self._n_held"
        start = index * self._array.chunk_rows
        try:
            stored = self._held.read(start, start + self._held.rows_of(index))
        except CorruptShard:
            return None
        if not np.array_equal(stored, chunk[: len(stored)]):
            raise self._other_tokens(f"other tokens in sequences {start} to {start + len(stored)}")
        return self._held.records[index] if len(stored) == len(chunk) else None

    def _written(self, index: int, chunk: np.ndarray) -> ArrayRecord:
        return write_shard(self._shard_path(index), self._array, self._codec, [chunk], self._array.chunk_rows)

    def _shard_path(self, index: int) -> Path:
        return self._folder / shard_key(self._array, index)

    def _other_tokens(self, what: str) -> CacheMismatch:
        return CacheMismatch(
            f"{self._folder.parent.parent}: the dataset must give the tokens that it gave when the cache was begun, it "
            f"gives {what}; pass its former revision, or another --out"
        )
