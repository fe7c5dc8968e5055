"""`FileRows`: the rows of local files, one after the other, with the place of each.

Files are read here and not by `datasets.load_dataset`, which copies them whole before the first row, answers from its
own cache by path and time of change, and guesses the types of values: a text that looks like a date or a number is then
no text any more. No more is read than rows are asked for.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actcache.text.data_files import COMPRESSED, KINDS, DataFault, DataFiles, listed, suffix_of

ROWS_FOR_COLUMNS = 256  # rows whose columns are looked at
ROWS_PER_BATCH = 256  # of a parquet file
TEXT_BLOCK = 1 << 20  # characters of a text file that are read at a time
MEND_LINE = "mend that line, or convert the file, for example with iconv"
_ARROW_MAGIC, _PARQUET_MAGIC = b"ARROW1", b"PAR1"
_BROKEN = (
    *(EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error),
    *(OSError, ValueError, LookupError, TypeError, NotImplementedError, RecursionError),
)


class FaultyFile(DataFault):
    """A file cannot be read further; the fault names it, and its line where there is one."""

    def __init__(self, fault: str, way_out: str = "mend or replace that file"):
        super().__init__(fault, way_out)


class BadRow(dict[str, Any]):
    """A row that holds no value that could be used. fault: what is wrong with it, to follow its place."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault


Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place in the file, as "line 3"


class FileRows:
    """The rows of files, in order. Each row is a dict; a line that is no row, though later ones are, is a BadRow."""

    def __init__(self, data: DataFiles, sample_by: str):
        """Nothing is read yet. sample_by: what one row of a text file is, a "line", a "paragraph" or a "document"."""
        self._data, self._sample_by = data, sample_by
        self.at = ""  # the place of the row that was given last

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for place, row in self._placed():
            self.at = place
            yield row

    def __len__(self) -> int:
        """The number of rows; all files are read to count them."""
        return sum(1 for _ in self)

    @property
    def column_names(self) -> list[str]:
        """The columns that the first rows have, each once, in their order. Raises FaultyFile if all are BadRows."""
        if self._data.kind in ("text", "markdown"):
            return ["text"]
        names: dict[str, None] = {}
        faults: list[str] = []
        for row in islice(self, ROWS_FOR_COLUMNS):
            names |= dict.fromkeys(row)
            faults += [f"{self.at} {row.fault}"] if isinstance(row, BadRow) else []
        if faults and not names:
            raise FaultyFile(faults[0], MEND_LINE)
        return [*names]

    @property
    def described(self) -> str:
        """Which files these are, and which files of their folder are none of them."""
        files, left_out = self._data.files, self._data.left_out
        others = f"; left out: {listed(left_out)}" if left_out else ""
        return f"{len(files)} {self._data.kind} file{'s' if len(files) > 1 else ''}: {listed(files)}{others}"

    def _placed(self) -> Rows:
        for file in self._data.files:
            with faults_named(file):
                for place, row in rows_of(file, self._data.kind, self._sample_by):
                    yield f"{place} of {file}", row


@contextmanager
def faults_named(file: Path) -> Iterator[None]:
    """Let what reading a file raises be a FaultyFile."""
    try:
        yield
    except FaultyFile:
        raise
    except _BROKEN as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FaultyFile(f"{file} cannot be read: {said}") from error


def kind_of(file: Path) -> str:
    """The kind of a file by its name, or by what it begins with if the name does not tell. Raises FaultyFile."""
    if suffix_of(file) in KINDS:
        return KINDS[suffix_of(file)]
    with faults_named(file), opened_data(file) as stream:
        head = stream.read(TEXT_BLOCK)
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    if head.startswith(_ARROW_MAGIC):
        return "arrow"
    if head[257:262] == b"ustar":
        raise FaultyFile(f"{file} is an archive (tar); unpack it and name the folder")
    try:
        first = json.loads(head.decode("utf-8-sig", "ignore").lstrip().partition("\n")[0] or "0")
    except (ValueError, RecursionError):
        return "text"
    return "json" if isinstance(first, dict) else "text"


@contextmanager
def opened_data(file: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked if it begins as a compressed file does, whatever its name is.

    Raises ValueError if its name says that it is compressed and its bytes do not.
    """
    with open(file, "rb") as stream:
        start = stream.peek(10)[:10]
        unpacked = _unpacked(stream, start)
        if unpacked is None and start and file.suffix.lower() in COMPRESSED:
            raise ValueError(f"it is named {file.suffix}, and does not begin as such a file")
        with stream if unpacked is None else io.BufferedReader(unpacked) as plain:
            yield plain


def _unpacked(stream: io.BufferedReader, start: bytes) -> Any:
    """A raw stream of the plain bytes of a file that begins with these ten; None if it is not compressed."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(stream)
    if start.startswith(b"BZh") and start[4:] in (b"1AY&SY", b"\x17rE8P\x90"):
        return bz2.open(stream)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(stream)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return pa.CompressedInputStream(stream, "zstd")
    if start.startswith(b"\x04\x22\x4d\x18"):
        return pa.CompressedInputStream(stream, "lz4")
    if start.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(stream)
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"the archive holds {len(members)} files; unpack it and name the folder")
        return archive.open(members[0])
    return None


def rows_of(file: Path, kind: str, sample_by: str) -> Rows:
    """The rows of one file, each with its place in it. Raises FaultyFile, and what reading a broken file raises."""
    with opened_data(file) as stream:
        really = {_PARQUET_MAGIC: "parquet", _ARROW_MAGIC[:4]: "arrow"}.get(stream.peek(4)[:4])
        if really and really != kind:
            raise FaultyFile(f"{file} is named as {kind}, it holds {really}; give it its suffix")
        if kind in ("text", "markdown"):
            yield from _text_rows(file, stream, sample_by)
        elif kind == "json":
            yield from _json_rows(file, stream)
        elif kind == "csv":
            yield from _csv_rows(file, stream)
        else:
            yield from _table_rows(_batches(stream, kind))


def _text_rows(file: Path, stream: io.BufferedReader, sample_by: str) -> Rows:
    """As the builder `text` of `datasets`: \\r\\n and \\r end a line too, and no paragraph is empty."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")  # a mark of the byte order is no text
    try:
        if sample_by == "line":
            yield from ((f"line {n}", {"text": line.removesuffix("\n")}) for n, line in enumerate(text, 1))
        elif sample_by == "paragraph":
            yield from ((f"paragraph {n}", {"text": each}) for n, each in enumerate(_paragraphs(text), 1))
        else:
            yield "the text", {"text": text.read()}
    except UnicodeDecodeError as error:
        raise FaultyFile(_not_utf8(file) or f"{file} is not UTF-8: {error.reason}", MEND_LINE) from error
    finally:
        text.detach()


def _paragraphs(text: io.TextIOWrapper) -> Iterator[str]:
    rest = ""
    while block := text.read(TEXT_BLOCK):
        *whole, rest = (rest + block + text.readline()).split("\n\n")
        yield from filter(None, whole)
    if rest:
        yield rest


def _not_utf8(file: Path) -> str | None:
    """Which line of a file is the first that is not UTF-8, and why."""
    with opened_data(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} of {file} {_byte_fault(line, error)}"
    return None


def _byte_fault(line: bytes, error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{line[error.start]:02x}, {error.reason}"


def _json_rows(file: Path, stream: io.BufferedReader) -> Rows:
    """Of JSON lines, of one list of rows, or of one object of columns. A line that is not JSON is a BadRow."""
    first = True
    for number, line in enumerate(stream, 1):
        if not line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
            continue
        if first and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return (yield from _rows_of_whole(file, number, line + stream.read()))
        row = _json_line(number, line)
        if first and isinstance(row, BadRow) and line.rstrip().endswith((b"{", b"[", b",")):  # of several lines
            return (yield from _rows_of_whole(file, number, line + stream.read()))
        first = False
        yield f"line {number}", row


def _json_line(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(_byte_fault(line, error))
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON: {_json_fault(error)}")
    return row if isinstance(row, dict) else BadRow(f"is no JSON object, it is {type(row).__name__}")


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error).partition(";")[0]


def _rows_of_whole(file: Path, number: int, content: bytes) -> Rows:
    """The rows of JSON that is one value. number: of the line that it begins in."""
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FaultyFile(_not_utf8(file) or f"{file} is not UTF-8: {error.reason}", MEND_LINE) from error
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise FaultyFile(f"line {line} of {file} is not JSON: {_json_fault(error)}", MEND_LINE) from error
    if isinstance(found, dict):
        columns = [*found.values()]
        is_table = columns and all(isinstance(each, list) for each in columns) and len({*map(len, columns)}) == 1
        if is_table and any(isinstance(value, str | list) for each in columns for value in each[:1]):
            found = [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
        else:
            found = [found]
    for element, row in enumerate(found, 1):
        if isinstance(row, str):
            row = {"text": row}
        bad = f"is no JSON object, it is {type(row).__name__}"
        yield f"element {element}", row if isinstance(row, dict) else BadRow(bad)


def _csv_rows(file: Path, stream: io.BufferedReader) -> Rows:
    """The first row names the columns. Every value is text."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter="\t" if suffix_of(file) == ".tsv" else ",", strict=True)
    try:
        header = next((row for row in rows if row), [])
        if len({*header}) < len(header):
            raise FaultyFile(f"line {rows.line_num} of {file} names a column twice")
        for row in rows:
            place = f"line {rows.line_num}"
            if row and len(row) != len(header):
                yield place, BadRow(f"has {len(row)} fields, the first line has {len(header)}")
            elif row:
                yield place, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise FaultyFile(_not_utf8(file) or f"{file} is not UTF-8: {error.reason}", MEND_LINE) from error
    except csv.Error as error:
        raise FaultyFile(f"line {rows.line_num} of {file} is no CSV: {error}", MEND_LINE) from error
    finally:
        text.detach()


def _batches(stream: io.BufferedReader, kind: str) -> Iterable[pa.RecordBatch]:
    source = stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(stream.read())
    if kind == "parquet":
        table = pq.ParquetFile(source)
        groups = range(table.num_row_groups)  # one after the other: more than one would be read ahead
        return (batch for group in groups for batch in table.iter_batches(ROWS_PER_BATCH, row_groups=[group]))
    head = source.read(len(_ARROW_MAGIC))
    source.seek(0)
    if head != _ARROW_MAGIC:
        return pa.ipc.open_stream(source)
    whole = pa.ipc.open_file(source)
    return map(whole.get_batch, range(whole.num_record_batches))


def _table_rows(batches: Iterable[pa.RecordBatch]) -> Rows:
    number = 0
    for batch in batches:
        batch.validate()
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            for row in _plain_rows(batch.slice(start, ROWS_PER_BATCH)):
                yield f"row {number} (counted from 0)", row
                number += 1


def _plain_rows(batch: pa.RecordBatch) -> Iterable[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow(f"is not UTF-8: {error.reason}")]
        return [row for number in range(batch.num_rows) for row in _plain_rows(batch.slice(number, 1))]
