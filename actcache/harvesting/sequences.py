"""Packed sequences: made of the dataset, and written before the first forward pass. Every worker reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from actcache.errors import CacheMismatch, CorruptShard, DatasetError
from actcache.flow import SPLITS
from actcache.format.arrays import ArraySpec, sequence_arrays
from actcache.format.codecs import Codec
from actcache.format.manifest import Plan
from actcache.format.paths import STORE, shard_key
from actcache.format.records import ArrayRecord, SequencesRecord
from actcache.harvesting.config import HarvestConfig
from actcache.models.language_model import LanguageModel
from actcache.store.cache import sequence_reader
from actcache.store.kept import CacheFiles
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import write_shard
from actcache.text.packing import PackedSequence, Packing, pack
from actcache.text.sources import Source
from actcache.text.tokenise import documents

logger = logging.getLogger("actcache")
BEGINNING = 8  # ids of a document among which a BOS of its own is looked for


def count_sequences(model: LanguageModel, source: Source, config: HarvestConfig) -> int:
    """How many sequences the whole dataset fills. The dataset is packed to count them."""
    return sum(1 for _ in packed_sequences(model, source, config))


def packed_sequences(model: LanguageModel, source: Source, config: HarvestConfig) -> Iterator[PackedSequence]:
    """The packed sequences of the dataset, those of both splits.

    The first document that makes the model read BOS twice is named in a warning. Raises DatasetError, and ModelError if
    the embedding lacks an id.
    """
    how = packing(model, config)
    texts = documents(source, model.tokenizer)
    if model.tokenizer is not None:
        texts = _watched(texts, model.tokenizer, how)
    for sequence in pack(texts, how, seed=config.seed, holdout=config.holdout):
        model.refuse_unknown_ids(sequence.token_ids)
        yield sequence


def _watched(
    texts: Iterable[tuple[int, Int32[np.ndarray, " _"]]], tokenizer: PreTrainedTokenizerBase, how: Packing
) -> Iterator[tuple[int, Int32[np.ndarray, " _"]]]:
    """The documents as they are. Of the first that begins with one BOS too many a warning is logged."""
    stream = iter(texts)
    for index, ids in stream:
        yield index, ids
        if beginning := _second_bos(ids, tokenizer, how):
            logger.warning(
                "dataset: row %d begins with %s, so the model reads %s twice there; remove it from the texts: packing "
                "puts it in",
                index,
                repr(beginning),
                tokenizer.bos_token,
            )
            break
    yield from stream


def _second_bos(ids: Int32[np.ndarray, " _"], tokenizer: PreTrainedTokenizerBase, how: Packing) -> str:
    """How a document begins whose BOS is one too many; "" for any other document.

    Chat templates write BOS. It is one too many behind another one, and behind blank text where packing puts one before
    that text.
    """
    bos_id: Any = tokenizer.bos_token_id
    (places,) = np.nonzero(ids[:BEGINNING] == bos_id)
    is_put = bos_id in (how.bos_id, how.separator_id) and not how.keeps_rows
    if bos_id is None or not len(places) or (len(places) == 1 and (places[0] == 0 or not is_put)):
        return ""
    before = ids[: places[-1]]
    blank = str(tokenizer.decode(before[before != bos_id])).strip() == ""
    return str(tokenizer.decode(ids[: places[-1] + 1])) if blank else ""


def packing(model: LanguageModel, config: HarvestConfig) -> Packing:
    """How documents become sequences, with the BOS and EOS of this model's tokenizer.

    config: as `as_packed` gives it.
    """
    ids = separator_ids(model)
    return Packing(
        context_size=config.context_size,
        bos_id=ids["bos"] if config.prepend_bos else None,
        separator_id=ids[config.separator],
        keeps_rows=not config.repack,
    )


def separator_ids(model: LanguageModel) -> dict[str, Any]:
    """The id of each of SEPARATORS; None for none, and if there is no tokenizer or it lacks the token."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {"bos": None, "eos": None, "none": None}
    return {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}


def write_sequences(packed: SequenceArrays, sequences: Iterable[PackedSequence], config: HarvestConfig) -> None:
    """Write as many sequences as are asked for.

    Args:
        packed: takes the sequences.
        sequences: those of the dataset.
        config: its `tokens` says how many are asked for.

    Raises:
        DatasetError: the dataset has fewer sequences, or none.
        CacheMismatch: the dataset gives other tokens than those of the held plan.
    """
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


class SequenceArrays:
    """The sequence arrays of both splits while they are written. Shards of the held plan are compared, and stay."""

    def __init__(self, root: Path, store: Codec, context_size: int, held: Plan | None):
        self._store = root / STORE
        self._writers: dict[str, dict[str, _SequenceWriter]] = {split: {} for split in SPLITS}
        for split in SPLITS:
            for name, array in zip(("id", "document"), sequence_arrays(context_size), strict=True):
                reader = sequence_reader(CacheFiles(root=root), held, split, name) if held else None
                self._writers[split][name] = _SequenceWriter(root / STORE / split, array, store, reader)

    def add(self, sequence: PackedSequence) -> None:
        """Append a sequence to the arrays of its split. Raises CacheMismatch if the held plan has another."""
        self._writers[sequence.split]["id"].add(sequence.token_ids)
        self._writers[sequence.split]["document"].add(sequence.documents)

    def finish(self) -> None:
        """Write the last shards, which may have fewer rows.

        Raises CacheMismatch if the held plan has more sequences.
        """
        for writer in self._each():
            writer.finish()

    def commit(self) -> dict[str, SequencesRecord]:
        """Replace the shards of the held plan that have to change; returns the records of all shards."""
        return {
            split: SequencesRecord(
                n_sequences=writers["id"].n_rows, arrays={writer.path: writer.commit() for writer in writers.values()}
            )
            for split, writers in self._writers.items()
        }

    def abandon(self) -> None:
        """Remove the new shards, which no plan names, and folders that are empty then."""
        for writer in self._each():
            writer.abandon()
        for path in sorted([self._store, *self._store.rglob("*")], reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _each(self) -> Iterator[_SequenceWriter]:
        return (writer for writers in self._writers.values() for writer in writers.values())


class _SequenceWriter:
    """Gathers the rows of a sequence array and writes each full shard, which is one chunk.

    Shards of the held plan do not change before `commit`. A whole shard must get the rows that it has. A last shard
    with fewer rows must get these rows first; then it is written again with more. A damaged shard is written again.
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
        record = self._record_if_held(index, chunk) if index < self._n_held else self._written(index, chunk)
        if record is None:
            self._changed[index] = chunk
        self._records.append(record)

    def _record_if_held(self, index: int, chunk: np.ndarray) -> ArrayRecord | None:
        """The record of a held shard, if it has exactly these rows; None if it has to change.

        Raises CacheMismatch if it has other rows.
        """
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
