"""`load_saved`: a folder that `datasets` has saved. It may be a stranger's, so its files are looked at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa

from actcache.arguments import local_path, shown
from actcache.errors import ManifestError
from actcache.files import NoFile, contents, opened
from actcache.text.data_files import NO_ROWS, DataFault

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_BROKEN = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, pa.ArrowException)


def load_saved(folder: Path) -> datasets.Dataset:
    """What `Dataset.save_to_disk` wrote.

    Raises:
        DataFault: it has no rows; a file is missing, no regular file or malformed, or lies outside of the folder by its
            name.
        OSError: a file cannot be read, which says nothing about what it holds.
    """
    saved_json(folder / INFO)
    files = saved_json(folder / STATE).get("_data_files")
    if files == []:
        raise DataFault(NO_ROWS, "give one with rows")
    for each in files if isinstance(files, list) else []:
        name = each.get("filename") if isinstance(each, dict) else each
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise _fault(folder / STATE, f"names {shown(name)}, which is no file of its folder")
        try:
            with opened(local_path(folder / name)):  # `datasets` would wait for a pipe
                pass
        except (NoFile, ManifestError) as error:
            raise _fault(folder / name, f"cannot be read: {_said(error)}") from error
    try:
        return cast(datasets.Dataset, datasets.load_from_disk(str(folder)))
    except _BROKEN as error:
        raise _fault(folder, f"is not as datasets saved it: {_said(error)}") from error


def saved_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that `datasets` wrote. Raises as `load_saved`."""
    try:
        values = json.loads(contents(local_path(path)))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except (NoFile, ManifestError, ValueError, RecursionError) as error:
        raise _fault(path, f"must be JSON of an object: {_said(error)}") from error
    return values


def _said(error: Exception) -> str:
    """The first line of what an error says, in at most 200 letters."""
    said = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    return said[0][:200]


def _fault(path: Path, what: str) -> DataFault:
    return DataFault(f"{path} {what}", "save the dataset again by save_to_disk")
