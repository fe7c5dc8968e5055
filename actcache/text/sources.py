"""Sources of texts: a dataset on the hub, files, or a dataset in memory; and what identifies each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from actcache.arguments import can_only_be_a_path, local_path, missing_here, one_of, refuse_address, type_fields_
from actcache.errors import DatasetError
from actcache.files import opened
from actcache.machine.installs import no_installs
from actcache.machine.limits import require_memory

SAMPLE_BY = ("line", "paragraph", "document")
FILE_KINDS = {  # of local files
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".zip")
FILE_SUFFIXES = {*FILE_KINDS, ".csv", ".tsv", *COMPRESSED}  # no name on the hub ends in one of them
_load_dataset: Callable[..., Any] = datasets.load_dataset  # its overloads know no `streaming: bool`
HASH_BLOCK_BYTES = 1 << 20
# What `datasets` raises where it cannot read. RuntimeError: a loading script. StopIteration: a JSON file of no byte.
# IndexError: what it saved itself has no rows. Other LookupErrors, TypeError: what it saved itself is damaged.
_READING_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError),
    *(StopIteration, DatasetGenerationError),
)
NO_ROWS = "it holds no rows"
_SAID_WITHOUT_ROWS = (  # what it says of another dataset without rows
    "corresponds to no data",
    "Please pass `features` or at least one example",
    "BatchSize must be greater than 0, got 0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSource:
    """Where documents come from: a hub name, a local file, or a folder written by `datasets.save_to_disk`.

    config, split, revision: of a hub dataset. column: the column of texts or of token ids; None takes the first there
    is of `text`, `input_ids`, `tokens` and `token_ids`. sample_by: what one document of a text file is: a "line", a
    "paragraph" or the whole "document". streaming: read a hub dataset without downloading it first.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    sample_by: str = "document"
    streaming: bool = False

    def __post_init__(self) -> None:
        type_fields_("dataset", self)
        refuse_address(self.path, "a local file, a folder or a hub name")
        one_of("dataset", "sample_by", self.sample_by, SAMPLE_BY)

    @no_installs("datasets")
    def load(self) -> datasets.Dataset | datasets.IterableDataset:
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
            local = self._local.exists()
            if not local and not can_only_be_a_path(self.path, FILE_SUFFIXES):
                reason = f"{missing_here(self.path)}{reason}"
            if local and isinstance(error.__cause__ or error, ValueError) and (fault := self._first_fault()):
                reason, way_out = fault, "mend that line, or convert the file, for example with iconv"
            raise DatasetError(f"dataset: cannot load {self.path!r} ({reason}); {way_out}") from error

    @property
    def _local(self) -> Path:
        """The path as a local one, whether there is something or not."""
        return local_path(self.path)

    def _load(self) -> Any:
        path = self._local
        if path.is_dir() and (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if not path.exists():
            if can_only_be_a_path(self.path, FILE_SUFFIXES):
                raise FileNotFoundError("there is no such file or folder")
            return _load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        files = _data_files(path)
        if not any(os.path.getsize(file) for file in files):
            raise ValueError(NO_ROWS)
        how: dict[str, Any] = {}
        if (kind := _kind(files[0])) == "text":
            how = {"sample_by": self.sample_by, "encoding": "utf-8-sig"}  # a mark of the byte order is no text
        return _load_dataset(kind, data_files=files, split="train", streaming=self.streaming, **how)

    def _first_fault(self) -> str | None:
        """Which line of the local files is the first that cannot be read, and why; None if no such line is found."""
        if (self._local / "state.json").exists():
            return None
        return next(filter(None, map(_fault_in, _data_files(self._local))), None)

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
            "content_sha256": _content_hash(path) if local else None,
        }


@dataclass(frozen=True, slots=True)
class LoadedDataset:
    """A `datasets.Dataset` that is already in memory, as a source of documents. column: as for DatasetSource."""

    rows: datasets.Dataset
    column: str | None = None

    def load(self) -> datasets.Dataset:
        """The dataset itself."""
        return self.rows

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


def unformatted(rows: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    """The rows as plain Python values, whatever `set_format` was told; what `set_transform` makes of rows stays."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.with_format(None)
    told = rows.format
    if told["type"] == "custom":
        return rows
    return rows.with_format(None, columns=told["columns"], output_all_columns=told["output_all_columns"])


def _data_files(path: Path) -> list[str]:
    """The file, or the files of the first kind that a folder has."""
    if path.is_file():
        return [str(path)]
    for suffix in FILE_KINDS:
        found = (file for file in path.rglob(f"*{suffix}*") if _suffix(file) == suffix)
        if files := sorted(str(file) for file in found if file.name != "dataset_info.json"):
            return files
    raise FileNotFoundError(f"the folder holds no {', '.join(FILE_KINDS)} file")


def _kind(file: str) -> str:
    return FILE_KINDS.get(_suffix(Path(file)), "text")


def _suffix(file: Path) -> str:
    """The suffix that tells what a file holds: .jsonl of texts.jsonl.gz, which `datasets` unpacks."""
    return next((suffix for suffix in reversed(file.suffixes) if suffix not in COMPRESSED), "")


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    cause = error.__cause__ or error
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    empty = isinstance(cause, StopIteration | IndexError) or any(words in said for words in _SAID_WITHOUT_ROWS)
    return NO_ROWS if empty else said


def _fault_in(file: str) -> str | None:
    """The first line of a file of text or JSON that cannot be read, and why; None for a file without such a line.

    A line of a .json file may be no JSON by itself.
    """
    if _kind(file) not in ("text", "json") or file.endswith(COMPRESSED):
        return None
    with opened(local_path(file)) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if file.endswith(".jsonl") and text.strip():
                    json.dumps(json.loads(text), ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                return f"line {number} of {file} is not UTF-8: byte 0x{line[error.start]:02x}, {error.reason}"
            except UnicodeEncodeError as error:
                return f"line {number} of {file} is not Unicode: {error.object[error.start]!a}, {error.reason}"
            except json.JSONDecodeError as error:
                return f"line {number} of {file} is not JSON: {error.msg} (column {error.colno})"
    return None


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{os.path.relpath(file, path)}:{file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
