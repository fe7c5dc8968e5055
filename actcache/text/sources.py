"""Sources of texts: a dataset on the hub, files, or a dataset in memory; and what identifies each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from actcache.arguments import one_of, type_fields_
from actcache.errors import DatasetError
from actcache.files import can_only_be_a_path, local_path, missing_here, refuse_address
from actcache.machine.installs import no_installs

SAMPLE_BY = ("line", "paragraph", "document")
FILE_KINDS = {  # of local files
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FILE_SUFFIXES = {*FILE_KINDS, ".csv", ".tsv", ".gz", ".zst", ".zip"}  # no name on the hub ends in one of them
_load_dataset: Callable[..., Any] = datasets.load_dataset  # its overloads know no `streaming: bool`
HASH_BLOCK_BYTES = 1 << 20


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
        """The dataset of this split. Raises DatasetError, naming the path, if it is missing or malformed."""
        try:
            return self._load()
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:  # RuntimeError: a loading script
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
            if not self._local.exists() and not can_only_be_a_path(self.path, FILE_SUFFIXES):
                reason = f"{missing_here(self.path)}{reason}"
            raise DatasetError(
                f"dataset: cannot load {self.path!r} ({reason}); give a local file, a folder or a hub name"
            ) from error

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
        files = [str(path)] if path.is_file() else _data_files(path)
        kind = FILE_KINDS.get(Path(files[0]).suffix, "text")
        if kind == "text":
            return _load_dataset(
                kind, data_files=files, split="train", streaming=self.streaming, sample_by=self.sample_by
            )
        return _load_dataset(kind, data_files=files, split="train", streaming=self.streaming)

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

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: the column, and a sha256 of all rows.

        Equal rows have equal identities.
        """
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
