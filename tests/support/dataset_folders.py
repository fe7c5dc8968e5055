"""Small datasets on disk, made at random from a seed, each with what a reader has to find in it.

What is to be found is kept beside what is written: no code of the program computes it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = ("csv", "tsv")
KINDS = ("txt", "md", "jsonl", "ndjson", "json", *TABLES, "parquet", "arrow", "saved", "saved splits")
OF_IDS = ("jsonl", "json", "parquet", "arrow", "saved", "saved splits")
TROUBLES = ("bad row", "encoding", "split", "column", "kinds", "cut off", "ids as text", "nothing")
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "eval": "test",
    "dev": "validation",
    "val": "validation",
}
WORDS = (
    "",
    "a",
    "Größe",
    "北京 😀",
    "2020-01-01",
    "7",
    "NA",
    "null",
    "true",
    ' "q", \t',
    "x\x0by\u2028z\x85",
    "[1, 2]",
    "\0",
)
STRAYS = {
    "README.md": b"# The data\n\nMuch that is no data. " * 20,
    "LICENSE.txt": b"Permission is granted. " * 20,
    "dataset_info.json": b'{"text": "no data"}',
    "notes.pdf": b"%PDF-1.4 \xff",
    ".hidden.jsonl": b'{"text": "hidden"}\n',
    "__pycache__/a.txt": b"hidden",
    "script.py": b"print('no data')\n",
}


def zstd(content: bytes) -> bytes:
    """The content, compressed as .zst."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstd,
}


@dataclass
class Folder:
    """A dataset: path and settings for a DatasetSource, and what it gives or what its refusal says.

    expected: (number, text or token ids) of each row. refused: words of the refusal; None if it is not refused.
    """

    path: Path
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    expected: list[tuple[int, str | list[int]]] = field(default_factory=list)
    refused: str | None = None


class Maker:
    """Makes datasets. All that is random comes from `rng`."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def make(self, root: Path) -> Folder:
        """A dataset in a new folder `root`."""
        rng = self.rng
        kind = rng.choice(KINDS)
        trouble = self.trouble_for(kind)
        is_ids = trouble == "ids as text" or (kind in OF_IDS and rng.random() < 0.3)
        self.column = self.column_of(kind, is_ids)
        self.is_padded = is_ids and kind in OF_IDS and trouble is None and rng.random() < 0.5
        self.packing = "" if kind.startswith("saved") else rng.choice([*PACKERS])
        if trouble == "cut off":
            self.packing = rng.choice([*PACKERS][1:])
        self.encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig"])
        if trouble == "encoding":
            self.encoding = rng.choice(["utf-16", "latin-1"])
        found = Folder(root / rng.choice(["data", "größe [1]", "北京 *? {a}", "DATA.V2"]), kind)
        if kind in ("txt", "md"):
            found.settings["sample_by"] = self.sample_by = rng.choice(["line", "paragraph", "document"])
        if self.column not in ("text", "input_ids", "tokens", "token_ids"):
            found.settings["column"] = self.column
        if trouble == "column":
            found.settings["column"] = "elsewhere"
            found.refused = "no column 'elsewhere'; it has "
        if kind.startswith("saved"):
            self.fill_saved(found, is_ids, trouble)
        else:
            self.fill(found, is_ids, trouble)
        return found

    def trouble_for(self, kind: str) -> str | None:
        """One trouble that a dataset of this kind may have, or none."""
        trouble = self.rng.choice([*TROUBLES, *[None] * 10])
        text, tables = kind in ("txt", "md"), kind in ("parquet", "arrow")
        impossible = {
            "bad row": text or kind in TABLES,
            "encoding": tables or kind.startswith("saved"),
            "kinds": kind.startswith("saved") or kind == "md",
            "cut off": kind.startswith("saved"),
            "ids as text": kind not in TABLES,
            "nothing": text or tables or kind.startswith("saved"),
            "split": kind == "saved",
        }
        return None if impossible.get(str(trouble)) else trouble

    def column_of(self, kind: str, is_ids: bool) -> str:
        if kind in ("txt", "md"):
            return "text"
        return self.rng.choice(["input_ids", "tokens", "token_ids"] if is_ids else ["text", "text", "body", "größe"])

    def values(self, is_ids: bool, n: int) -> list[Any]:
        """Texts or lists of token ids."""
        rng = self.rng
        if is_ids:
            return [[rng.randrange(2, 50) for _ in range(rng.choice([0, 1, 9, 40]))] for _ in range(n)]
        texts = [" ".join(rng.choices(WORDS, k=rng.choice([1, 1, 5, 30]))) for _ in range(n)]
        if texts and rng.random() < 0.05:
            texts[rng.randrange(n)] = "long " * 10_000
        return texts

    def columns(self, values: list[Any]) -> dict[str, list[Any]]:
        """The columns of a table with these values; with padding on either side, which a mask marks, or without."""
        if not self.is_padded:
            return {"id": [*range(len(values))], self.column: values}
        pads = [(self.rng.randrange(3), self.rng.randrange(3)) for _ in values]
        ids = [[3] * a + value + [2] * b for value, (a, b) in zip(values, pads, strict=True)]
        masks = [[0] * a + [1] * len(value) + [0] * b for value, (a, b) in zip(values, pads, strict=True)]
        return {self.column: ids, "attention_mask": masks}

    def fill(self, found: Folder, is_ids: bool, trouble: str | None) -> None:
        """Files, in splits or not; or one file."""
        rng, kind = self.rng, found.kind
        layout = rng.choice(["one file", "flat", "names", "folders", "sharded"])
        if trouble == "kinds" and layout == "one file":
            layout = "flat"
        names = self.names(layout)
        asked = rng.choice([*names])
        number, n_asked, asked_file = 0, 0, found.path
        for split, stems in names.items():
            for stem in stems:
                suffix = f".{kind}{self.packing}"
                file = found.path / f"{stem}{suffix.upper() if rng.random() < 0.2 else suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                is_later = kind not in ("txt", "md", "parquet", "arrow") and n_asked > 0
                values = self.values(is_ids, 0 if trouble == "nothing" else rng.choice([1, 2, 8, 0 if is_later else 3]))
                if values and not is_ids:
                    values[0] = f"é{values[0]}" if trouble == "encoding" else values[0] or "first"
                is_bad = trouble == "bad row" and split == asked and n_asked == 0
                bad = self.put_bad_row(values, is_ids, kind) if is_bad else None
                content, rows = self.written(kind, values)
                packed = PACKERS[self.packing](content)
                if trouble == "cut off":
                    packed = packed[: len(packed) - 9]
                file.write_bytes(b"" if not values and rng.random() < 0.5 else packed)
                if split == asked:
                    n_asked, asked_file = n_asked + 1, file
                    kept = [(number + i, row) for i, row in enumerate(rows) if bad is None or i != bad[0]]
                    found.expected += kept
                    number += len(rows)
                    if bad is not None:
                        self.expect_bad_row(found, f"{self.place(kind, bad[0])} of {file} {bad[1]}")
        self.finish(found, layout, asked, trouble, asked_file)

    def finish(self, found: Folder, layout: str, asked: str, trouble: str | None, file: Path) -> None:
        """The split that is asked for, files that are no data, and what a trouble makes the refusal say."""
        if layout == "one file":
            found.path = file
        else:
            self.scatter_strays(found.path, found.kind)
        if asked != "train" or self.rng.random() < 0.5:
            found.settings["split"] = asked
        if trouble == "split":
            found.settings["split"], found.refused = "missing", "it has no split 'missing', it has '"
        elif trouble == "kinds":
            other = "txt" if found.kind != "txt" else "jsonl"
            (file.parent / f"{file.name.split('.')[0]}.{other}").write_text('{"text": "of another kind"}\n')
            found.refused = "it holds files of several kinds, "
        elif trouble == "encoding" and self.encoding == "utf-16":
            found.refused = " is not UTF-8: byte 0xff"
        elif trouble == "encoding":
            has_accent = any(isinstance(value, str) for _, value in found.expected)
            found.refused = " is not UTF-8: byte 0x" if has_accent else None
        elif trouble == "cut off":
            found.refused = " cannot be read: "
        elif trouble == "ids as text":
            found.refused = f"holds text: column '{self.column}' is one of token ids"
        elif trouble == "nothing" and found.kind not in ("txt", "md"):
            found.refused = "it holds no rows"

    def names(self, layout: str) -> dict[str, list[str]]:
        """The names of the files of each split, without suffixes; in the order in which they are read."""
        rng, n = self.rng, self.rng.choice([1, 2])
        if layout == "one file":
            return {"train": [rng.choice(["a", "größe", "x [1]", "V2.1 b"])]}
        if layout == "flat":
            return {"train": sorted(rng.choice(["a", "sub/b", "c d"]) + str(i) for i in range(n))}
        if layout == "sharded":
            splits = rng.sample(["train", "train_sft", "test", "all"], k=2)
            return {each: [f"data/{each}-{i:05}-of-{n:05}" for i in range(n)] for each in splits}
        words = rng.sample(["train", "eval", "dev"], k=2) if rng.random() < 0.5 else ["training", "test", "val"]
        joint = "/part" if layout == "folders" else "-"
        return {SPLITS[word]: [f"{word}{joint}{i}" for i in range(n)] for word in words}

    def scatter_strays(self, folder: Path, kind: str) -> None:
        for name in self.rng.sample([*STRAYS], k=self.rng.randrange(4)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(STRAYS[name])

    def put_bad_row(self, values: list[Any], is_ids: bool, kind: str) -> tuple[int, str]:
        """Put a value that cannot be used after the first; returns its number and what is said of it."""
        bad: list[tuple[Any, str]] = [(None, "holds null")]
        if kind in ("jsonl", "ndjson", "json"):
            bad += [(5, "holds 5"), (1.5, "holds 1.5"), (True, "holds True"), ({"a": 1}, "holds {'a': 1}")]
            bad += [([5], "holds a list") if not is_ids else ("x", "holds text"), (["x"], "holds 'x' in a list")]
            bad += [("\ud800", r"is not Unicode: '\ud800', surrogates not allowed")]
        value, said = self.rng.choice(bad)
        values.insert(self.rng.randint(1, len(values)), value)
        return next(i for i, each in enumerate(values) if each is value), said

    def place(self, kind: str, index: int) -> str:
        if kind in ("parquet", "arrow"):
            return f"row {index} (counted from 0)"
        return f"element {index + 1}" if kind == "json" else f"line {self.lines[index]}"

    def expect_bad_row(self, found: Folder, said: str) -> None:
        if self.rng.random() < 0.5:
            found.settings["on_bad_row"] = "skip"
        else:
            found.refused = said

    def written(self, kind: str, values: list[Any]) -> tuple[bytes, list[Any]]:
        """The bytes of a file, and its rows."""
        if kind in ("txt", "md"):
            return self.text(values)
        if kind in TABLES:
            return self.table(kind, values), values
        if kind in ("parquet", "arrow"):
            return self.arrow(kind, values), values
        columns = self.columns(values)
        rows = [
            dict(zip(columns, row, strict=True)) | {"meta": {"x": [1]}} for row in zip(*columns.values(), strict=True)
        ]
        plain = self.rng.random() < 0.5 or self.encoding in ("utf-16", "latin-1")
        ascii_ = not plain or any(value == "\ud800" for value in values)
        lines = [json.dumps(row, ensure_ascii=ascii_) for row in rows]
        if kind == "json":
            return f"[{', '.join(lines)}]".encode(self.encoding, "replace"), values
        empty = [self.rng.randrange(2) if self.encoding != "utf-16" else 0 for _ in lines]
        self.lines = [1 + i + sum(empty[:i]) for i in range(len(lines))]
        joined = "".join(line + "\n" * (1 + more) for line, more in zip(lines, empty, strict=True))
        return joined.encode(self.encoding, "replace"), values

    def text(self, values: list[str]) -> tuple[bytes, list[str]]:
        joint = {"line": "\n", "paragraph": "\n\n", "document": "\r\n"}[self.sample_by]
        content = joint.join(values)
        rows = [content.replace("\r\n", "\n")] if self.sample_by == "document" else [*values]
        if self.sample_by == "paragraph":
            rows = [row for row in content.split("\n\n") if row]
        if self.sample_by == "line" and rows and not rows[-1]:
            rows.pop()  # what ends with the end of a line has no further line
        return content.encode(self.encoding, "replace"), rows

    def table(self, kind: str, values: list[Any]) -> bytes:
        text = io.StringIO(newline="")
        dialect = "excel" if kind == "csv" else "excel-tab"
        writer = csv.writer(text, dialect, lineterminator=self.rng.choice(["\n", "\r\n"]))
        writer.writerows([["id", self.column], *([i, value] for i, value in enumerate(values))])
        return text.getvalue().encode(self.encoding, "replace")

    def arrow(self, kind: str, values: list[Any]) -> bytes:
        table = pa.table(self.columns(values))
        target = io.BytesIO()
        if kind == "parquet":
            pq.write_table(table, target, row_group_size=3, compression=self.rng.choice(["none", "snappy", "zstd"]))
            return target.getvalue()
        new = self.rng.choice([pa.ipc.new_file, pa.ipc.new_stream])
        with new(target, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        return target.getvalue()

    def fill_saved(self, found: Folder, is_ids: bool, trouble: str | None) -> None:
        """What `datasets` saves to disk, one Dataset or a dictionary of splits."""
        splits = {}
        asked = self.rng.choice(["train", "test"]) if found.kind == "saved splits" else "train"
        for split in ("train", "test"):
            values = self.values(is_ids, self.rng.choice([1, 2, 8]))
            bad = self.put_bad_row(values, is_ids, "saved") if trouble == "bad row" and split == asked else None
            splits[split] = datasets.Dataset.from_dict(self.columns(values))
            if split == asked:
                found.expected = [(i, value) for i, value in enumerate(values) if bad is None or i != bad[0]]
                if bad is not None:
                    self.expect_bad_row(found, f"row {bad[0]} (counted from 0) {bad[1]}")
        saved = datasets.DatasetDict(splits) if found.kind == "saved splits" else splits["train"]
        saved.save_to_disk(found.path)
        if asked != "train":
            found.settings["split"] = asked
        if trouble == "split":
            found.settings["split"], found.refused = "missing", "it has no split 'missing', it has 'train', 'test'"


def packed(documents: list[tuple[int, list[int]]], size: int, bos: int, holdout: float) -> dict[str, list[list[int]]]:
    """The sequences of both splits: each begins with BOS, and BOS is between two documents; the seed is 0."""
    streams: dict[str, list[int]] = {"train": [], "validation": []}
    for number, ids in documents:
        digest = hashlib.sha256(f"split:0:{number}".encode()).digest()
        held = int.from_bytes(digest[:8], "big") < holdout * 2**64
        stream, rest = streams["validation" if held else "train"], list(ids)
        while rest:
            if rest[0] != bos:
                stream.append(bos)
            room = -len(stream) % size
            stream += rest[:room]
            rest = rest[room:]
    return {split: [s[i : i + size] for i in range(0, len(s) - size + 1, size)] for split, s in streams.items()}
