"""Packing: the token ids of documents become sequences of one length, for each split apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from actcache.errors import ConfigError, DatasetError
from actcache.flow import SPLITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How token ids become sequences.

    context_size: ids of a sequence. bos_id: the first id of every sequence; None for no such id. separator_id: the id
    between two documents of a sequence; None for no such id. What a sequence cannot hold of a document goes into the
    next sequence. As in SAELens, a document that already begins with bos_id or separator_id does not get it twice.
    keeps_rows: every document is a whole sequence already, and is taken as it is.
    """

    context_size: int
    bos_id: int | None
    separator_id: int | None
    keeps_rows: bool = False

    def __post_init__(self) -> None:
        if self.context_size < (1 if self.bos_id is None else 2):
            raise ConfigError(f"packing: context_size must have room for a token after BOS, got {self.context_size}")


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence of a split: its token ids, and for each of them the index of its document in the dataset."""

    split: str
    token_ids: Int32[np.ndarray, " position"]
    documents: Int32[np.ndarray, " position"]


class Packer:
    """Packs the documents of one split. Ids that do not fill a sequence wait for the next document."""

    def __init__(self, packing: Packing, split: str):
        self._packing, self._split = packing, split
        self._ids = np.empty(packing.context_size, dtype=np.int32)
        self._documents = np.empty(packing.context_size, dtype=np.int32)
        self._filled = 0

    def add(self, document: int, ids: Int32[np.ndarray, " token"]) -> Iterator[PackedSequence]:
        """The sequences that are full after these ids. document: index in the dataset."""
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
        """Append as many ids as the sequence has room for; returns how many that were."""
        end = min(self._filled + len(ids), self._packing.context_size)
        n = end - self._filled
        self._ids[self._filled : end] = ids[:n]
        self._documents[self._filled : end] = document
        self._filled = end
        return n


def pack(
    documents: Iterable[tuple[int, Int32[np.ndarray, " _"]]], packing: Packing, *, seed: int, holdout: float
) -> Iterator[PackedSequence]:
    """The packed sequences of both splits, in the order in which documents complete them.

    Args:
        documents: (index in the dataset, token ids) of each document.
        packing: how ids become sequences; each split is packed apart.
        seed, holdout: decide the split of each document, as for `split_of`.

    Raises:
        DatasetError: a document is kept, and has another number of ids than the sequences. The last one may have fewer;
            it is left out, as are the ids that do not fill a sequence where documents are packed.
    """
    if packing.keeps_rows:
        for index, ids in _whole(documents, packing.context_size):
            split = split_of(index, seed=seed, holdout=holdout)
            yield PackedSequence(split, ids, np.full(len(ids), index, dtype=np.int32))
        return
    packers = {split: Packer(packing, split) for split in SPLITS}
    for index, ids in documents:
        yield from packers[split_of(index, seed=seed, holdout=holdout)].add(index, ids)


def _whole(
    documents: Iterable[tuple[int, Int32[np.ndarray, " _"]]], context_size: int
) -> Iterator[tuple[int, Int32[np.ndarray, " position"]]]:
    """The documents, of context_size ids each. Raises DatasetError for another one, unless it is short and the last."""
    short: tuple[int, int] | None = None
    for index, ids in documents:
        if short is None and len(ids) == context_size:
            yield index, ids
            continue
        row, n_ids = short or (index, len(ids))
        if short is not None or n_ids > context_size:
            raise DatasetError(
                f"dataset: row {row} has {n_ids} token ids, and those before it have {context_size} and are kept as "
                "they are; pass --repack (in Python repack=True) to pack all rows anew"
            )
        short = row, n_ids


def split_of(document: int, *, seed: int, holdout: float) -> str:
    """The split of a document: "validation" or "train".

    It is "validation" if the first 8 bytes of sha256("split:{seed}:{document}"), a big-endian integer, are below
    holdout * 2^64.
    """
    digest = hashlib.sha256(f"split:{seed}:{document}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < holdout * 2.0**64 else "train"
