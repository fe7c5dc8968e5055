"""`sound_rows`: the rows that can be used; one that cannot is named, or counted and left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from actcache.arguments import shown
from actcache.errors import DatasetError
from actcache.text.file_rows import BadRow, FileRows
from actcache.text.sources import Source

logger = logging.getLogger("actcache")
WANTED = "must hold text or lists of token ids"


def sound_rows(source: Source, rows: Iterable[Any], column: str, *, is_told: bool = True) -> Iterator[tuple[int, Any]]:
    """(number in the dataset, row) of every row whose value can be tokenised, or is a list of token ids.

    What is taken is logged before the first row, and after the last how many rows were read and left out.

    Args:
        source: its `on_bad_row` says whether a row that cannot be used is an error or is left out.
        rows: those of the source.
        column: the column of texts or token ids.
        is_told: whether this is logged.

    Raises:
        DatasetError: a row cannot be used; the message names it.
    """
    where = rows.described if isinstance(rows, FileRows) else source.name
    if is_told:
        logger.info("dataset: column %r of split %r of %s", column, source.split, where)
    kind: type | None = list if source.column is None and column != "text" else None
    n_rows, bad, first_bad = 0, 0, ""
    try:
        for index, row in enumerate(rows):
            n_rows += 1
            fault = row.fault if isinstance(row, BadRow) else _fault(row, column, kind)
            if fault is None:
                kind = kind or (str if isinstance(row[column], str) else list)
                yield index, row
                continue
            where = rows.at if isinstance(rows, FileRows) else f"row {index} (counted from 0)"
            if source.on_bad_row == "fail":
                raise DatasetError(
                    f"dataset: cannot load {source.name!r} ({where} {fault}); mend that row, or pass --on-bad-row skip"
                )
            bad, first_bad = bad + 1, first_bad or f"{where} {fault}"
    finally:
        if is_told:
            logger.info("dataset: %d rows were read", n_rows)
        if is_told and bad:
            logger.warning("dataset: %d of them were left out, the first: %s", bad, first_bad)


def _fault(row: Any, column: str, kind: type | None) -> str | None:
    """What is wrong with the value of a row, to follow the row's place; None if nothing is.

    kind: str or list, what the rows before it hold; None for the first.
    """
    if column not in row:
        return f"has no column {column!r}"
    value = row[column]
    if value is None:
        return f"holds null: column {column!r} {WANTED}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"is not Unicode: {value[error.start]!a}, {error.reason}"
    elif isinstance(value, list):
        for each in value:
            if type(each) is not int:
                return f"holds {shown(each)} in a list: column {column!r} {WANTED}, got {type(each).__name__} in one"
    elif isinstance(value, bool | int | float | dict | bytes):
        return f"holds {shown(value)}: column {column!r} {WANTED}, got {type(value).__name__}"
    if kind is not None and isinstance(value, str) != (kind is str):
        return f"holds {'text' if isinstance(value, str) else 'a list'}: column {column!r} is one of {_NAMES[kind]}"
    return None


_NAMES = {str: "texts", list: "token ids"}
