"""`data_files`: which files of a folder are its data, of what kind, and to which split each belongs.

The names that mean a split, and the names that are never data, are those of `datasets`.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import cast

from datasets.data_files import FILES_TO_IGNORE, NON_WORDS_CHARS, SPLIT_KEYWORDS, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

KINDS = {  # by suffix, in lower case
    **dict.fromkeys((".txt", ".text"), "text"),
    ".md": "markdown",
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
FILE_SUFFIXES = {*KINDS, *COMPRESSED}  # no name on the hub ends in one of them
DEFAULT_SPLIT = "train"
SHOWN = 6  # names in a message
NO_ROWS = "it holds no rows"
_NEVER_DATA = {*(name.lower() for name in FILES_TO_IGNORE), "state.json"}
_ABOUT_DATA = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|contributing|citation|authors)([-._ ].*)?")
_SHARDED = re.compile(r"data/(.+)-\d{5}-of-\d{5}.*\..*")
_BOUNDARY = f"[{re.escape(NON_WORDS_CHARS.replace('0-9', ''))}0-9]"
_WORDS = {str(split): f"(?:{'|'.join(words)})" for split, words in SPLIT_KEYWORDS.items()}
_IN_FOLDERS = {s: re.compile(rf"(.*/)?([^/]*{_BOUNDARY})?{w}({_BOUNDARY}[^/]*)?/.*") for s, w in _WORDS.items()}
_IN_NAMES = {s: re.compile(rf"(.*/)?([^/]*{_BOUNDARY})?{w}{_BOUNDARY}[^/]*") for s, w in _WORDS.items()}


class DataFault(ValueError):
    """What is wrong with a dataset on disk, and the way out."""

    def __init__(self, fault: str, way_out: str):
        super().__init__(fault)
        self.way_out = way_out


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files of one split. kind: one of KINDS. left_out: the other files of the folder."""

    kind: str
    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()


def data_files(folder: Path, split: str, config: str | None) -> DataFiles:
    """The files of a split of a folder.

    Args:
        folder: the folder. Hidden files, and what its name says is about the data, are no data.
        split: its name, as `datasets` finds it in names of files and folders, or as the data card says.
        config: the name of a configuration of the data card; None takes its default.

    Raises:
        DataFault: there is no file of data, no such split or config, or there are files of several kinds.
    """
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*"), key=str) if path.is_file()]
    named = _named_by_card(folder, config)
    if named is None:
        data = [file for file in found if _may_be_data(file)]
        if any(KINDS[suffix_of(file)] != "markdown" for file in data):
            data = [file for file in data if KINDS[suffix_of(file)] != "markdown"]
        splits = splits_of(data)
    else:
        splits = {each: [file for file in files if suffix_of(file) in KINDS] for each, files in named.items()}
    if not any(splits.values()):
        fault = f"the folder holds no {', '.join(KINDS)} file, it holds {listed(found)}"
        raise DataFault(fault, "name a file or a folder of data")
    require_split(split, [each for each, files in splits.items() if files])
    kinds = defaultdict(list)
    for file in splits[split]:
        kinds[KINDS[suffix_of(file)]].append(file)
    if len(kinds) > 1:
        several = "; ".join(f"{kind}: {listed(files)}" for kind, files in sorted(kinds.items()))
        raise DataFault(f"it holds files of several kinds, {several}", "name one file, or a folder with one kind")
    (kind,) = kinds
    left_out = tuple(folder / file for file in found if file not in set(kinds[kind]))
    return DataFiles(kind, tuple(folder / file for file in kinds[kind]), left_out)


def splits_of(files: Iterable[PurePath]) -> dict[str, list[PurePath]]:
    """The files of each split, by the rules of `datasets`. Where a rule finds splits, other files are in none.

    files: paths within the folder. Case does not matter.
    """
    named = [(file, file.as_posix().lower()) for file in files]
    splits: dict[str, list[PurePath]] = defaultdict(list)
    for file, name in named:
        if sharded := _SHARDED.fullmatch(name):
            splits[sharded[1]].append(file)
    for patterns in (_IN_FOLDERS, _IN_NAMES):
        for split, pattern in patterns.items() if not splits else ():
            if matching := [file for file, name in named if pattern.fullmatch(name)]:
                splits[split] = matching
    return dict(splits) if splits else {DEFAULT_SPLIT: [file for file, _ in named]}


def suffix_of(file: PurePath) -> str:
    """The suffix that tells what a file holds, in lower case: .jsonl of Texts.JSONL.gz. "" if there is none."""
    return next((each for each in map(str.lower, reversed(file.suffixes)) if each not in COMPRESSED), "")


def require_split(split: str, there: Collection[str]) -> None:
    """Raise DataFault if a split is not there. there: the names of those that are."""
    if split not in there:
        raise DataFault(f"it has no split {split!r}, it has {_quoted(there)}", "pass one of them as --split")


def require_config(config: str | None, there: Collection[str] = ()) -> None:
    """Raise DataFault if a configuration is asked for that is not there. there: the names of those that are."""
    if config is not None and config not in there:
        fault = f"it has no configuration {config!r}, it has {_quoted(there) or 'none'}"
        raise DataFault(fault, "pass another --dataset-config, or none")


def listed(files: Iterable[PurePath]) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = [repr(str(file)) for file in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}" if names else "nothing"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _may_be_data(file: PurePath) -> bool:
    hidden = any(part.startswith((".", "__")) for part in file.parts[:-1]) or file.name.startswith(".")
    name = file.name.lower()
    about = KINDS.get(suffix_of(file)) in ("text", "markdown") and _ABOUT_DATA.fullmatch(name)
    return not hidden and not about and suffix_of(file) in KINDS and name not in _NEVER_DATA


def _named_by_card(folder: Path, config: str | None) -> dict[str, list[PurePath]] | None:
    """The files of each split that the data card (README.md) of a folder names; None if it names none."""
    configs = _configs(folder / "README.md")
    require_config(config, configs)
    if not configs:
        return None
    name = config or configs.get_default_config_name()
    if name is None:
        raise DataFault(f"it has the configurations {_quoted(configs)}", "pass one of them as --dataset-config")
    if "data_files" not in configs[name] and "data_dir" not in configs[name]:
        return None
    return _matching(folder, configs[name])


def _configs(card: Path) -> MetadataConfigs:
    if not card.is_file() or not card.read_bytes().lstrip().startswith(b"---"):
        return MetadataConfigs()
    try:
        return MetadataConfigs.from_dataset_card_data(cast(DatasetCardData, DatasetCard.load(card).data))
    except Exception as error:  # of YAML among others
        said = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"its README.md begins with metadata that cannot be read: {said}"
        raise DataFault(fault, "mend or remove that file") from error


def _matching(folder: Path, settings: Mapping[str, object]) -> dict[str, list[PurePath]]:
    """The files of each split that a configuration of the data card names. Raises DataFault for a path outside."""
    below = str(settings.get("data_dir") or "")
    patterns = sanitize_patterns(settings.get("data_files") or {DEFAULT_SPLIT: "**"})  # pyright: ignore[reportArgumentType]
    splits: dict[str, list[PurePath]] = {}
    for split, each_split in patterns.items():
        names = [os.path.join(below, str(pattern)) for pattern in each_split]
        for name in names:
            if os.path.isabs(name) or ".." in PurePath(name).parts or "://" in name:
                fault = f"its README.md names {name!r}, which is outside of the folder"
                raise DataFault(fault, "mend or remove that file")
        found = {match for name in names for match in glob.glob(name, root_dir=folder, recursive=True)}
        splits[split] = [PurePath(match) for match in sorted(found) if (folder / match).is_file()]
    if "data_files" not in settings:  # as without a card, in that folder
        within = splits_of([file.relative_to(below) for file in splits[DEFAULT_SPLIT] if _may_be_data(file)])
        return {split: [PurePath(below, file) for file in files] for split, files in within.items()}
    return splits
