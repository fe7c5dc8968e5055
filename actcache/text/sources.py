"""Sources of texts: a dataset on the hub, files, or a dataset in memory; and what identifies each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from actcache.arguments import can_only_be_a_path, local_path, missing_here, one_of, refuse_address, type_fields_
from actcache.errors import DatasetError
from actcache.machine.installs import no_installs
from actcache.machine.limits import require_memory
from actcache.text.content_hash import content_hash
from actcache.text.data_files import (
    DEFAULT_SPLIT,
    FILE_SUFFIXES,
    NO_ROWS,
    DataFault,
    DataFiles,
    data_files,
    require_config,
    require_split,
)
from actcache.text.file_rows import FileRows, kind_of
from actcache.text.saved import SPLITS, STATE, load_saved, saved_json

SAMPLE_BY = ("line", "paragraph", "document")
ON_BAD_ROW = ("fail", "skip")
Rows = datasets.Dataset | datasets.IterableDataset | FileRows
_load_dataset: Callable[..., Any] = datasets.load_dataset  # its overloads know no `streaming: bool`
# What `datasets` raises where it cannot read. RuntimeError: a loading script.
_READING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, DatasetGenerationError)
_SAID_WITHOUT_ROWS = (  # what it says of another dataset without rows
    "corresponds to no data",
    "Please pass `features` or at least one example",
    "BatchSize must be greater than 0, got 0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSource:
    """Where documents come from: a hub name, a local file, a folder of files, or what `datasets` saved to disk.

    config, split: names in a hub dataset or in a folder. revision: of a hub dataset. column: the column of texts or of
    token ids; None takes the first there is of `text`, `input_ids`, `tokens` and `token_ids`. sample_by: what one
    document of a text file is: a "line", a "paragraph" or the whole "document". streaming: read a hub dataset without
    downloading it first. on_bad_row: "fail" at a row that cannot be used, or "skip" it; the numbers of the documents
    after it stay.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    sample_by: str = "document"
    streaming: bool = False
    on_bad_row: str = "fail"

    def __post_init__(self) -> None:
        type_fields_("dataset", self)
        refuse_address(self.path, "a local file, a folder or a hub name")
        one_of("dataset", "sample_by", self.sample_by, SAMPLE_BY)
        one_of("dataset", "on_bad_row", self.on_bad_row, ON_BAD_ROW)

    @property
    def name(self) -> str:
        """The path or the hub name, for messages."""
        return self.path

    @no_installs("datasets")
    def load(self) -> Rows:
        """The dataset of this split. Raises DatasetError, naming the path, if it is missing, empty or malformed."""
        require_memory(0, f"reading {self.path} with pyarrow")  # whose threads end the process where they get none
        with self.errors_named():
            return self._load()

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Let what reading the dataset raises be a DatasetError of one line, with the file and its line where possible.

        A malformed row may be found when the dataset is loaded, or only when the row is reached.
        """
        try:
            yield
        except _READING_ERRORS as error:
            reason, way_out = _reason(error), "give a local file, a folder or a hub name"
            if isinstance(error, DataFault):
                reason, way_out = str(error), error.way_out
            elif not self._local.exists() and not can_only_be_a_path(self.path, FILE_SUFFIXES):
                reason = f"{missing_here(self.path)}{reason}"
            raise DatasetError(f"dataset: cannot load {self.path!r} ({reason}); {way_out}") from error

    @property
    def _local(self) -> Path:
        """The path as a local one, whether there is something or not."""
        return local_path(self.path)

    def _load(self) -> Any:
        path = self._local
        if not path.exists():
            if can_only_be_a_path(self.path, FILE_SUFFIXES):
                raise FileNotFoundError("there is no such file or folder")
            return _load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        if path.is_dir() and any((path / name).exists() for name in (STATE, SPLITS)):
            return self._load_saved(path)
        if path.is_dir():
            data = data_files(path, self.split, self.config)
        else:
            require_split(self.split, (DEFAULT_SPLIT,))
            require_config(self.config)
            data = DataFiles(kind_of(path), (path,))
        if not any(os.path.getsize(file) for file in data.files):
            raise ValueError(NO_ROWS)
        return FileRows(data, self.sample_by)

    def _load_saved(self, path: Path) -> Any:
        """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
        require_config(self.config)
        if not (path / STATE).exists():
            splits = saved_json(path / SPLITS).get("splits")
            require_split(self.split, splits if isinstance(splits, list) else [])
            return load_saved(path / self.split)
        saved = load_saved(path)
        require_split(self.split, {DEFAULT_SPLIT, str(getattr(saved, "split", None) or DEFAULT_SPLIT)})
        return saved

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: its settings, and for local files a sha256 of all their bytes."""
        path = self._local
        local = path.exists()
        return {
            "name": path.name if local else self.path,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "column": self.column,
            "sample_by": self.sample_by,
            "content_sha256": content_hash(path) if local else None,
            **({"on_bad_row": self.on_bad_row} if self.on_bad_row != "fail" else {}),
        }

    def refuse_change(self, identity: Mapping[str, Any]) -> None:
        """Raise DatasetError if the files are no longer those of an `identity` that was taken before they were read."""
        if self.identity() != identity:
            raise DatasetError(f"dataset: {self.path!r} was changed while it was read; run the same again")


@dataclass(frozen=True, slots=True)
class LoadedDataset:
    """A `datasets.Dataset` that is already in memory, as a source of documents. column: as for DatasetSource."""

    rows: datasets.Dataset
    column: str | None = None
    split: str | None = None
    on_bad_row: str = "fail"

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return "rows in memory"

    def load(self) -> datasets.Dataset:
        """The dataset itself."""
        return self.rows

    def refuse_change(self, identity: Mapping[str, Any]) -> None:
        """Do nothing: rows in memory do not change."""

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Let what reading the rows raises be a DatasetError of one line."""
        try:
            yield
        except _READING_ERRORS as error:
            raise DatasetError(f"dataset: the rows in memory cannot be read ({_reason(error)})") from error

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: the column, and a sha256 of all rows.

        Equal rows have equal identities, whatever `set_format` was told.
        """
        digest = hashlib.sha256()
        with self.errors_named():
            for row in unformatted(self.rows):
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


def unformatted(rows: Rows) -> Rows:
    """The rows as plain Python values, whatever `set_format` was told; what `set_transform` makes of rows stays."""
    if isinstance(rows, FileRows):
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.with_format(None)
    told = rows.format
    if told["type"] == "custom":
        return rows
    return rows.with_format(None, columns=told["columns"], output_all_columns=told["output_all_columns"])


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    cause = error.__cause__ or error
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return NO_ROWS if any(words in said for words in _SAID_WITHOUT_ROWS) else said
