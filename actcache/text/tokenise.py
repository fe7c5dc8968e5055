"""The token ids of a dataset's documents, and a hash that identifies a tokenizer.

A harvest reads the text once and stores the packed sequences; hooks that are added later use these. The text is read
again when a cache grows, and when a repair needs documents that no other file holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from actcache.errors import DatasetError
from actcache.machine.limits import require_memory
from actcache.text.sound_rows import sound_rows
from actcache.text.sources import NO_ROWS, Rows, Source, unformatted

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids")
MASK_COLUMN = "attention_mask"  # beside a column of token ids; 0 marks padding
DOCUMENTS_PER_BATCH = 256
CHARACTER_BYTES = 200  # memory that a fast tokenizer takes for each character; where it gets none, it ends the process


def documents(
    source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[int, Int32[np.ndarray, " _"]]]:
    """(index in the dataset, int32 token ids) of every document that has tokens.

    Text is tokenised without special tokens. A column of token ids is taken as it is, but for those that the column
    attention_mask beside it marks as padding. Raises DatasetError if there is no row, if one cannot be read, or if the
    column is missing, holds something else, ids that the tokenizer lacks, or text where there is no tokenizer.
    """
    rows, column = _opened(source)
    encode = _ids_of(column, tokenizer)
    for batch in _batches(source, sound_rows(source, rows, column)):
        yield from _documents_of(batch, column, encode)


def packed_rows(
    source: Source, tokenizer: PreTrainedTokenizerBase | None, context_size: int
) -> list[Int32[np.ndarray, " position"]]:
    """The first rows of a dataset of token ids that is packed already, for sequences of context_size ids.

    It is packed if each of its first DOCUMENTS_PER_BATCH rows has context_size ids; of fewer rows the last may be
    shorter. Of any other dataset, such as one of texts, there are none. Raises DatasetError as `documents` does.
    """
    rows, column = _opened(source)
    batch = next(_batches(source, sound_rows(source, rows, column, is_told=False)))
    if any(isinstance(row[column], str) for _, row in batch):
        return []
    found = [ids for _, ids in _documents_of(batch, column, _ids_of(column, tokenizer))]
    if len(batch) < DOCUMENTS_PER_BATCH and len(found) > 1 and len(found[-1]) < context_size:
        found.pop()
    return found if {len(ids) for ids in found} == {context_size} else []


def _opened(source: Source) -> tuple[Rows, str]:
    """The rows of a dataset as plain Python values, and the column of its texts or token ids. Raises DatasetError."""
    rows = unformatted(source.load())
    with source.errors_named():
        return rows, _column(rows, source.column)


def _documents_of(
    batch: list[tuple[int, Any]], column: str, encode: Callable[[list[Any]], list[Any]]
) -> Iterator[tuple[int, Int32[np.ndarray, " _"]]]:
    """(index in the dataset, token ids) of those rows that have tokens. Raises DatasetError."""
    for (index, row), ids in zip(batch, encode([row[column] for _, row in batch]), strict=True):
        is_masked = MASK_COLUMN in row and not isinstance(row[column], str)
        real = _unmasked(index, ids, row[MASK_COLUMN]) if is_masked else ids
        if len(real):
            yield index, np.asarray(real, dtype=np.int32)


def _batches(source: Source, stream: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Every row with its number, DOCUMENTS_PER_BATCH at a time. Raises DatasetError, also if there is no row."""
    for number in count():
        with source.errors_named():
            batch = list(islice(stream, DOCUMENTS_PER_BATCH))
            if not batch and not number:
                raise ValueError(NO_ROWS)
        if not batch:
            return
        yield batch


def _unmasked(index: int, ids: list[int], mask: object) -> list[int]:
    """The ids of a row that its mask does not mark as padding. Raises DatasetError: the mask is none of these ids."""
    if not isinstance(mask, list) or len(mask) != len(ids) or not {*mask} <= {0, 1}:
        raise DatasetError(
            f"dataset: {MASK_COLUMN} of row {index} must hold 0 or 1 for each of its {len(ids)} token ids; mend that "
            "row, or remove the column"
        )
    return [token_id for token_id, is_real in zip(ids, mask, strict=True) if is_real]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary and the special tokens, which decide the id of each token."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number}:{token}\n".encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return digest.hexdigest()


def _ids_of(column: str, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[list[Any]], list[Any]]:
    n_ids = 1 << 31 if tokenizer is None else len(tokenizer)

    def encode(values: list[Any]) -> list[Any]:
        if all(isinstance(value, str) for value in values):
            if tokenizer is None:
                raise DatasetError(
                    f"dataset: column {column!r} holds text, and the model has no tokenizer; pass a dataset of token "
                    "ids, or a model with its tokenizer"
                )
            require_memory(sum(map(len, values)) * CHARACTER_BYTES, f"tokenising {len(values)} documents")
            return tokenizer(values, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if all(isinstance(value, list) and all(isinstance(v, int) for v in value) for value in values):
            out_of_range = [v for value in values for v in value if not 0 <= v < n_ids]
            if not out_of_range:
                return values
            raise DatasetError(
                f"dataset: column {column!r} holds token id {out_of_range[0]}, the tokenizer has {n_ids} ids; "
                "it was tokenised for another model"
            )
        kinds = sorted({type(value).__name__ for value in values})
        raise DatasetError(f"dataset: column {column!r} must hold text or lists of token ids, got {', '.join(kinds)}")

    return encode


def _column(rows: Rows, asked: str | None) -> str:
    # a stream may declare no columns, and a format or a transform may show others: the first row has them
    declared = rows.column_names
    shown = list(next(iter(rows), {})) if declared is None or isinstance(rows, datasets.Dataset) else []
    names = shown or declared or []
    for name in (asked,) if asked else ("text", *TOKEN_COLUMNS):
        if name in names:
            return name
    if not names:
        raise ValueError(NO_ROWS)
    wanted = repr(asked) if asked else f"text, {', '.join(TOKEN_COLUMNS)}"
    raise DatasetError(f"dataset: no column {wanted}; it has {', '.join(map(repr, names))}; pass --column")
