"""Datasets -> documents -> token ids -> packed sequences of each split. Packed once; text is never read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from actcache.errors import ConfigError, DatasetError
from actcache.flow import SPLITS

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids")
SAMPLE_BY = ("line", "paragraph", "document")
FILE_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_load_dataset: Callable[..., Any] = datasets.load_dataset  # its overloads know no `streaming: bool`
DOCUMENTS_PER_BATCH = 256
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSource:
    """Where documents come from: a hub name, a local file, or a folder written by `datasets.save_to_disk`.

    sample_by: what one document of a text file is, "line", "paragraph" or "document" (the whole file).
    column: the text column, or one of token ids; None takes `text`, else `input_ids`, `tokens` or `token_ids`.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    sample_by: str = "document"
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.sample_by not in SAMPLE_BY:
            raise ConfigError(f"dataset: sample_by must be one of {', '.join(SAMPLE_BY)}, got {self.sample_by!r}")

    def load(self) -> datasets.Dataset | datasets.IterableDataset:
        """The dataset, of one split. Raises DatasetError, naming the path, if it is missing or malformed."""
        try:
            return self._load()
        except (OSError, ValueError, ConnectionError, DatasetGenerationError) as error:
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
            raise DatasetError(
                f"dataset: cannot load {self.path!r} ({reason}); give a local file, a folder or a hub name"
            ) from error

    def _load(self) -> Any:
        path = Path(self.path)
        if path.is_dir() and (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if not path.exists():
            return _load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        files = [str(path)] if path.is_file() else _data_files(path)
        kind = FILE_KINDS.get(Path(files[0]).suffix, "text")
        if kind == "text":
            return _load_dataset(
                kind, data_files=files, split="train", streaming=self.streaming, sample_by=self.sample_by
            )
        return _load_dataset(kind, data_files=files, split="train", streaming=self.streaming)

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: names and revision, and for local files the hash of their bytes."""
        path = Path(self.path)
        local = path.exists()
        return {
            "name": path.name if local else self.path,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "column": self.column,
            "sample_by": self.sample_by,
            "content_sha256": _content_hash(path) if local else None,
        }


@dataclass(frozen=True, slots=True)
class LoadedDataset:
    """A dataset that is already in memory (a `datasets.Dataset`, or any list of strings), as a source of documents."""

    rows: datasets.Dataset
    column: str | None = None

    def load(self) -> datasets.Dataset:
        """The dataset itself."""
        return self.rows

    def identity(self) -> dict[str, Any]:
        """The hash of every row, so that the same rows always are the same dataset."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(sorted(dict(row).items())).encode())
        return {
            "name": "in memory",
            "config": None,
            "split": None,
            "revision": None,
            "column": self.column,
            "sample_by": None,
            "content_sha256": digest.hexdigest(),
        }


Source = DatasetSource | LoadedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How token ids become sequences: context_size ids each, of which the first is bos_id unless that is None.

    Documents follow each other with carry-over, separator_id between them unless that is None. As in SAELens, a
    document that already begins with the token that would be put before it does not get it twice.
    """

    context_size: int
    bos_id: int | None
    separator_id: int | None

    def __post_init__(self) -> None:
        if self.context_size < (1 if self.bos_id is None else 2):
            raise ConfigError(f"packing: context_size must have room for a token after BOS, got {self.context_size}")


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """context_size token ids and, for each, the index of its document in the dataset."""

    split: str
    token_ids: Int32[np.ndarray, " position"]
    documents: Int32[np.ndarray, " position"]


class Packer:
    """Packs the documents of one split; what does not fill a sequence is carried over to the next document."""

    def __init__(self, packing: Packing, split: str):
        self._packing, self._split = packing, split
        self._ids = np.empty(packing.context_size, dtype=np.int32)
        self._documents = np.empty(packing.context_size, dtype=np.int32)
        self._filled = 0

    def add(self, document: int, ids: Int32[np.ndarray, " token"]) -> Iterator[PackedSequence]:
        """The sequences that this document completes."""
        offset = 0
        while offset < len(ids):
            prefix = self._packing.separator_id if self._filled else self._packing.bos_id
            if prefix is not None and ids[offset] != prefix:
                self._put(document, np.array([prefix], dtype=np.int32))
            offset += self._put(document, ids[offset:])
            if self._filled == self._packing.context_size:
                yield PackedSequence(self._split, self._ids.copy(), self._documents.copy())
                self._filled = 0

    def _put(self, document: int, ids: np.ndarray) -> int:
        """Append what fits; returns how many did."""
        end = min(self._filled + len(ids), self._packing.context_size)
        n = end - self._filled
        self._ids[self._filled : end] = ids[:n]
        self._documents[self._filled : end] = document
        self._filled = end
        return n


def pack(
    documents: Iterable[tuple[int, Int32[np.ndarray, " _"]]], packing: Packing, *, seed: int, holdout: float
) -> Iterator[PackedSequence]:
    """Packed sequences of both splits, each split packed apart, in the order in which documents complete them."""
    packers = {split: Packer(packing, split) for split in SPLITS}
    for index, ids in documents:
        yield from packers[split_of(index, seed=seed, holdout=holdout)].add(index, ids)


def split_of(document: int, *, seed: int, holdout: float) -> str:
    """ "validation" if the first 8 bytes of sha256("split:{seed}:{document}"), as a fraction of 2^64, are < holdout."""
    digest = hashlib.sha256(f"split:{seed}:{document}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < holdout * 2.0**64 else "train"


def documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, Int32[np.ndarray, " _"]]]:
    """(index in the dataset, token ids) of every document that is not empty.

    Text is tokenised without special tokens. Raises DatasetError for a missing or mistyped column.
    """
    rows = source.load()
    column = _column(rows, source.column)
    encode = _ids_of(column, tokenizer)
    stream = enumerate(rows)
    while batch := list(islice(stream, DOCUMENTS_PER_BATCH)):
        for (index, _), ids in zip(batch, encode([row[column] for _, row in batch]), strict=True):
            if len(ids):
                yield index, np.asarray(ids, dtype=np.int32)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and the special tokens: what decides which id a token has."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number}:{token}\n".encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return digest.hexdigest()


def _ids_of(column: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], list[Any]]:
    def encode(values: list[Any]) -> list[Any]:
        if all(isinstance(value, str) for value in values):
            return tokenizer(values, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if all(isinstance(value, list) and all(isinstance(v, int) for v in value) for value in values):
            out_of_range = [v for value in values for v in value if not 0 <= v < len(tokenizer)]
            if not out_of_range:
                return values
            raise DatasetError(
                f"dataset: column {column!r} holds token id {out_of_range[0]}, the tokenizer has {len(tokenizer)} ids; "
                "it was tokenised for another model"
            )
        kinds = sorted({type(value).__name__ for value in values})
        raise DatasetError(f"dataset: column {column!r} must hold text or lists of token ids, got {', '.join(kinds)}")

    return encode


def _column(rows: datasets.Dataset | datasets.IterableDataset, asked: str | None) -> str:
    names = rows.column_names
    if names is None:  # a stream whose features are not declared: its first row tells
        names = list(next(iter(rows), {}))
    for name in (asked,) if asked else ("text", *TOKEN_COLUMNS):
        if name in names:
            return name
    wanted = repr(asked) if asked else f"text, {', '.join(TOKEN_COLUMNS)}"
    raise DatasetError(f"dataset: no column {wanted}; it has {', '.join(map(repr, names)) or 'none'}; pass --column")


def _data_files(folder: Path) -> list[str]:
    for suffix in FILE_KINDS:
        if files := sorted(str(path) for path in folder.rglob(f"*{suffix}") if path.name != "dataset_info.json"):
            return files
    raise FileNotFoundError(f"the folder holds no {', '.join(FILE_KINDS)} file")


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{os.path.relpath(file, path)}:{file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
