import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile

import datasets
import pyarrow as pa
import pytest
from support.io_counts import bytes_read_and_written

from actcache.text.data_files import KINDS, DataFiles, suffix_of
from actcache.text.file_rows import BadRow, FaultyFile, FileRows, kind_of

AWKWARD = ["One.", "", "Größe 北京 😀", "a\n\nb\n\n\nc\rd\x0b\x0ce\u2028f\x85g\x1c", ' "q", \t', "x" * 200_000, "a\0b"]
LOOK_ALIKE = ["2020-01-01", "2020-01-01T00:00:00Z", "12:30", "7", "-1.5", "1e5", "true", "null", "NA", "nan", "None"]
TEXTS = AWKWARD + LOOK_ALIKE


def zstd(content: bytes) -> bytes:
    return by_arrow(content, "zstd")


def by_arrow(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes, names: tuple[str, ...] = ("inner",)) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return target.getvalue()


PACKERS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstd,
    ".lz4": lambda content: by_arrow(content, "lz4"),
    ".zip": zipped,
}


def contents() -> dict[str, bytes]:
    """TEXTS in every kind of file, without compression."""
    table = pa.table({"text": TEXTS, "n": range(len(TEXTS))})
    files = {suffix: io.BytesIO() for suffix in (".parquet", ".arrow")}
    pa.parquet.write_table(table, files[".parquet"])
    with pa.ipc.new_file(files[".arrow"], table.schema) as writer:
        writer.write_table(table)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    tables = {}
    for suffix, dialect in ((".csv", "excel"), (".tsv", "excel-tab")):
        text = io.StringIO(newline="")
        csv.writer(text, dialect, lineterminator="\n").writerows([["text", "n"], *zip(TEXTS, range(len(TEXTS)))])  # noqa: B905
        tables[suffix] = text.getvalue().encode()
    rows = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
    return {
        **tables,
        ".jsonl": "\n\n".join(map(json.dumps, rows)).encode(),
        ".ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".parquet": files[".parquet"].getvalue(),
        ".arrow": files[".arrow"].getvalue(),
        ".stream.arrow": stream.getvalue(),
    }


CONTENTS = contents()


def rows_in(file, sample_by="document"):
    return FileRows(DataFiles(kind_of(file), (file,)), sample_by)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_kind_and_compression_gives_the_texts_that_were_written(tmp_path, suffix, packing):
    """With the name in capitals too, and where the suffix of the compression is missing."""
    content = PACKERS[packing](CONTENTS[suffix])
    for name in (f"a{suffix}{packing}", f"A{suffix}{packing}".upper(), f"b{suffix}"):
        (tmp_path / name).write_bytes(content)
        rows = rows_in(tmp_path / name)
        assert [row["text"] for row in rows] == TEXTS, name
        assert rows.column_names == ["text", "n"]


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("packing", [*PACKERS])
def test_text_is_cut_as_datasets_cuts_it(tmp_path, sample_by, packing):
    content = "\ufeff" + "\n\n".join(TEXTS) + "\r\n\r\nx\n\n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / f"b.TXT{packing}").write_bytes(PACKERS[packing](content.encode()))
    theirs = datasets.load_dataset(
        "text",
        data_files=str(tmp_path / "a.txt"),
        sample_by=sample_by,
        encoding="utf-8-sig",
        split="train",
        streaming=True,
    )
    expected = [row["text"] for row in theirs]
    assert [row["text"] for row in rows_in(tmp_path / f"b.TXT{packing}", sample_by)] == expected


JSON_SHAPES = [
    (b'[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
    (b'["a", "b"]', ["a", "b"]),
    (b'\xef\xbb\xbf[\n"a",\n"b"]', ["a", "b"]),
    (b'{"text": ["a", "b"]}', [["a", "b"]]),
    (b'{\n "text": ["a", "b"],\n "n": [1, 2]}', ["a", "b"]),
    (b'{\n "text": "a"\n}', ["a"]),
    (b'{\n "text": [1, 2]\n}', [[1, 2]]),
    (b'{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
    (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
]


@pytest.mark.parametrize(("content", "expected"), JSON_SHAPES)
def test_json_of_every_shape(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    assert [row["text"] for row in rows_in(tmp_path / "a.json")] == expected


def test_what_a_file_without_a_suffix_holds_is_looked_at(tmp_path):
    held = {b"plain": "text", b'{"text": "a"}\n{"': "json", b"[1]": "text", b"": "text"}
    held |= {CONTENTS[f".{kind}"]: kind for kind in ("parquet", "arrow")}
    for number, (content, kind) in enumerate(held.items()):
        for packing, pack in PACKERS.items():
            file = tmp_path / f"texts{number}{packing}"
            file.write_bytes(pack(content))
            assert kind_of(file) == kind, file


FAULTS = [
    ("a.txt", CONTENTS[".parquet"], r"a\.txt is named as text, it holds parquet"),
    ("a.jsonl", CONTENTS[".arrow"], r"a\.jsonl is named as json, it holds arrow"),
    ("a.parquet", b"PAR1 and no more", r"a\.parquet cannot be read: "),
    ("a.parquet", b"text", r"a\.parquet cannot be read: "),
    ("a.arrow", b"ARROW1 and no more", r"a\.arrow cannot be read: "),
    ("a.csv", b'a,text\n1,"x', r"line 2 of .*a\.csv is no CSV: unexpected end of data"),
    ("a.csv", b"text,text\n1,2", r"line 1 of .*a\.csv names a column twice"),
    ("a.csv", b"text\ncaf\xe9", r"line 2 of .*a\.csv is not UTF-8: byte 0xe9"),
    ("a.zip", zipped(b"x", ("a", "b")), r"a\.zip cannot be read: the archive holds 2 files"),
    ("a.json", b'[{"text": "a"},\n {"text": "b"', r"line 2 of .*a\.json is not JSON: "),
    *(
        (f"a.txt{packing}", b"(", rf"a\.txt{packing} cannot be read: it is named {packing}, and does not begin as such")
        for packing in filter(None, PACKERS)
    ),
    *(
        (f"a.jsonl{packing}", pack(CONTENTS[".jsonl"])[:-40], rf"a\.jsonl{packing} cannot be read: ")
        for packing, pack in PACKERS.items()
        if packing
    ),
]


@pytest.mark.parametrize(("name", "content", "says"), FAULTS, ids=map(str, range(len(FAULTS))))
def test_a_broken_file_is_named_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FaultyFile, match=says) as error:
        list(rows_in(tmp_path / name))
    assert "\n" not in str(error.value)


def test_an_archive_of_files_is_refused(tmp_path):
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(__file__, "text.txt")
        with pytest.raises(FaultyFile, match="is an archive"):
            kind_of(tmp_path / name)


def test_a_line_that_is_no_row_is_told_and_the_next_ones_are_read(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "b', b"5", b'{"text": "\xe9"}', b'{"text": "c"}', b"[" * 100_000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = rows_in(tmp_path / "a.jsonl")
    found = [(rows.at, row.fault) if isinstance(row, BadRow) else row["text"] for row in rows]
    assert found[0::4] == ["a", "c"]
    where = f"of {tmp_path / 'a.jsonl'}"
    assert found[1] == (f"line 2 {where}", "is not JSON: Unterminated string starting at (column 10)")
    assert found[2] == (f"line 3 {where}", "is no JSON object, it is int")
    assert found[3] == (f"line 4 {where}", "is not UTF-8: byte 0xe9, invalid continuation byte")
    assert found[5][1].startswith("is not JSON: ")
    (tmp_path / "a.csv").write_text('text,n\na,1\nb\n"c\nd",2\n\n')
    rows = rows_in(tmp_path / "a.csv")
    assert [row.fault if isinstance(row, BadRow) else row["text"] for row in rows] == [
        "a",
        "has 1 fields, the first line has 2",
        "c\nd",
    ]


def test_a_text_that_is_not_utf8_in_a_table_is_told(tmp_path):
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pa.parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    first, second = rows_in(tmp_path / "a.parquet")
    assert first == {"text": "a"}
    assert isinstance(second, BadRow)
    assert second.fault.startswith("is not UTF-8: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.zst", "a.csv.gz", "a.txt.xz", "a.parquet"])
def test_no_more_is_read_than_is_asked_for(tmp_path, name):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(10_000)]
    rows = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        ".csv": "text\n" + "\n".join(texts),
        ".txt": "\n".join(texts),
    }
    file = tmp_path / name
    if name == "a.parquet":
        pa.parquet.write_table(pa.table({"text": texts}), file, row_group_size=500, compression="none")
    else:
        file.write_bytes(PACKERS["".join(file.suffixes[1:])](rows[suffix_of(file)].encode()))
    found = rows_in(file, "line")
    n_read, n_written = bytes_read_and_written(lambda: [row for row, _ in zip(found, range(20), strict=False)])
    assert n_read < file.stat().st_size / 4
    assert n_written < 1 << 12


def test_every_kind_has_a_reader():
    assert {*KINDS.values()} == {"text", "markdown", "json", "csv", "parquet", "arrow"}
