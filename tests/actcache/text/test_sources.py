import codecs
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from support.documents import TEXTS, TOKENIZER

from actcache.errors import ConfigError, DatasetError
from actcache.text.sources import DatasetSource, LoadedDataset
from actcache.text.tokenise import documents


def in_every_format(tmp_path) -> dict[str, DatasetSource]:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "arrow")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "files").mkdir()
    rows.to_json(tmp_path / "files" / "part.jsonl")
    sources = {name: DatasetSource(path=str(tmp_path / name)) for name in ("a.jsonl", "a.parquet", "arrow", "files")}
    return sources | {
        "lines": DatasetSource(path=str(tmp_path / "a.txt"), sample_by="line"),
        "stream": DatasetSource(path=str(tmp_path / "a.jsonl"), streaming=True),
    }


def test_every_format_gives_the_same_documents(tmp_path):
    expected = [(i, TOKENIZER(t, add_special_tokens=False)["input_ids"]) for i, t in enumerate(TEXTS) if t]
    for name, source in in_every_format(tmp_path).items():
        assert [(i, ids.tolist()) for i, ids in documents(source, TOKENIZER)] == expected, name
    in_memory = LoadedDataset(datasets.Dataset.from_dict({"text": TEXTS}))
    assert [(i, ids.tolist()) for i, ids in documents(in_memory, TOKENIZER)] == expected


def test_identity_follows_the_bytes_not_the_place(tmp_path):
    for folder, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(text)
    a, b, c = (DatasetSource(path=str(tmp_path / folder / "t.txt")).identity() for folder in "abc")
    assert a == b != c


def test_missing_and_malformed_files_are_one_clear_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.jsonl", tmp_path / "bad.jsonl", tmp_path / "empty"):
        with pytest.raises(DatasetError, match="cannot load") as error:
            list(documents(DatasetSource(path=str(path)), TOKENIZER))
        assert "\n" not in str(error.value)


LINE = '{"text": "Größe"}\n'
SAVED = "saved by datasets"
WITHOUT_ROWS = {
    "a.json": [b"", b"[]", b"{}", b"\n"],
    "a.jsonl": [b"", b"  \n \n"],
    **{name: [b""] for name in ("a.txt", "a.md", "a.csv", "a.parquet", "a.arrow", "folder/a.jsonl", "folder/a.txt")},
}


def each_without_rows(folder: Path):
    """A path of every dataset without rows."""
    for number, (name, content) in enumerate((name, each) for name, all_ in WITHOUT_ROWS.items() for each in all_):
        path = folder / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        if path.parent.name == "folder":
            (path.parent / f"b{path.suffix}").touch()
            path = path.parent
        yield path
    rows = datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")}))
    rows.save_to_disk(folder / SAVED)
    rows.to_parquet(folder / "rows.parquet")
    yield from (folder / SAVED, folder / "rows.parquet")


@pytest.mark.parametrize("how", [{}, {"streaming": True}, {"sample_by": "line"}], ids=str)
def test_a_dataset_without_rows_is_one_clear_line(tmp_path, how):
    for path in each_without_rows(tmp_path):
        with pytest.raises(DatasetError, match=r"it holds no rows\)?; give ") as error:
            list(documents(DatasetSource(path=str(path), **how), TOKENIZER))
        assert "\n" not in str(error.value), path


def test_an_empty_file_beside_others_is_no_fault(tmp_path):
    for names in (("0", "1"), ("1", "0")):
        folder = tmp_path / names[0]
        folder.mkdir()
        (folder / f"{names[0]}.jsonl").touch()
        (folder / f"{names[1]}.jsonl").write_text(LINE)
        assert texts_of(folder) == ["Größe"]


def texts_of(path: Path, **how) -> list[str]:
    return [TOKENIZER.decode(ids) for _, ids in documents(DatasetSource(path=str(path), **how), TOKENIZER)]


FAULTS = [  # file, its bytes, the line at fault, and what is said of it
    ("a.txt", "Größe".encode("utf-16"), 1, "UTF-8: byte 0xff, invalid start byte"),
    ("a.txt", "a\nGröße".encode("latin-1"), 2, "UTF-8: byte 0xf6, invalid start byte"),
    ("a.txt", b"a\n\nx \xed\xa0\x80\n", 3, "UTF-8: byte 0xed"),
    ("a", "a\nGröße".encode("latin-1"), 2, "UTF-8: byte 0xf6"),
    ("a.jsonl", LINE.encode("utf-16"), 1, "UTF-8: byte 0xff"),
    ("a.jsonl", (LINE + LINE).encode("utf-16-le"), 1, "UTF-8: byte 0xf6"),
    ("a.jsonl", b'{"text": "a"}\n' + LINE.encode("latin-1"), 2, "UTF-8: byte 0xf6"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "\\ud800 b"}\n', 3, r"Unicode: '\\ud800', surrogates not allowed"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "a\0b"}\n', 2, r"JSON: Invalid control character at \(column 12\)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "x', 2, r"JSON: Unterminated string starting at \(column 10\)"),
    ("a.json", b'[{"text": "a"},\n {"text": "caf\xe9"}]', 2, "UTF-8: byte 0xe9"),
]


@pytest.mark.parametrize("how", [{}, {"streaming": True}], ids=str)
@pytest.mark.parametrize(("name", "content", "line", "says"), FAULTS, ids=map(str, range(len(FAULTS))))
def test_a_line_that_cannot_be_read_is_named(tmp_path, name, content, line, says, how):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        DatasetError, match=rf"\(line {line} of {path} is not {says}.*\); mend that (line|row), or"
    ) as error:
        texts_of(path, **how)
    assert "\n" not in str(error.value)


def test_the_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "0.jsonl").write_text(LINE)
    (tmp_path / "1.jsonl").write_bytes(LINE.encode("latin-1"))
    with pytest.raises(DatasetError, match=rf"\(line 1 of {tmp_path}/1\.jsonl is not UTF-8"):
        texts_of(tmp_path)


@pytest.mark.parametrize("how", [{}, {"streaming": True}], ids=str)
def test_a_packed_file_is_what_its_name_says(tmp_path, how):
    (tmp_path / "texts.v2.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 2))
    (tmp_path / "plain.gz").write_bytes(gzip.compress(b"{plain}"))
    assert texts_of(tmp_path / "texts.v2.jsonl.gz", **how) == texts_of(tmp_path, **how) == ["Größe"] * 2
    assert texts_of(tmp_path / "plain.gz", **how) == ["{plain}"]


@pytest.mark.parametrize("how", [{}, {"streaming": True}, {"sample_by": "line"}], ids=str)
def test_a_mark_of_the_byte_order_is_no_text_and_a_nul_is_a_character(tmp_path, how):
    """In a second file too."""
    for suffix, content in {"txt": "Größe", "jsonl": LINE}.items():
        folder = tmp_path / suffix
        folder.mkdir()
        for name in ("0", "1"):
            (folder / f"{name}.{suffix}").write_bytes(codecs.BOM_UTF8 + content.encode())
        assert texts_of(folder, **how) == ["Größe"] * 2
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "nul.jsonl").write_text(json.dumps({"text": "a\0b"}))
    for name in ("nul.txt", "nul.jsonl"):
        assert texts_of(tmp_path / name, **how) == ["a\0b"]


def test_rows_in_memory_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode("latin-1"))
    rows = datasets.load_dataset("json", data_files=[str(tmp_path / "a.jsonl")], split="train")
    source = LoadedDataset(rows)
    for read in (source.identity, lambda: list(documents(source, TOKENIZER))):
        with pytest.raises(DatasetError, match=r"rows in memory cannot be read \('utf-8' codec can't decode byte 0xf6"):
            read()


def test_a_loading_script_is_refused_in_one_line():
    with pytest.raises(DatasetError, match=r"cannot load .* \(Dataset scripts are no longer supported") as error:
        DatasetSource(path="somewhere/script.py").load()
    assert "\n" not in str(error.value)


def saved_splits(folder: Path) -> Path:
    splits = {split: datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(3)]}) for split in ("a", "b")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def test_a_saved_dictionary_of_splits_gives_the_split_that_is_asked_for(tmp_path):
    folder = saved_splits(tmp_path / "saved")
    assert texts_of(folder, split="b") == ["b 0", "b 1", "b 2"]
    assert texts_of(folder / "a") == ["a 0", "a 1", "a 2"]
    with pytest.raises(DatasetError, match=r"it has no split 'train', it has 'a', 'b'\); pass one of them as --split"):
        texts_of(folder)
    with pytest.raises(DatasetError, match="it has no configuration 'de'"):
        texts_of(folder, split="b", config="de")


def test_a_split_of_a_folder_or_a_file_is_not_ignored(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert texts_of(tmp_path) == ["train"]
    assert texts_of(tmp_path, split="test") == ["test"]
    for path, how in ((tmp_path, {"split": "dev"}), (tmp_path / "train.jsonl", {"split": "test"})):
        with pytest.raises(DatasetError, match="it has no split"):
            texts_of(path, **how)
    with pytest.raises(DatasetError, match="it has no configuration 'de', it has none"):
        texts_of(tmp_path / "train.jsonl", config="de")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_is_replaced_with_the_same_size_and_time_is_read_anew(tmp_path, name):
    """`datasets` would answer from its own cache, by path and time."""
    path = tmp_path / name
    for text in ("old text", "new text"):
        rows = datasets.Dataset.from_dict({"text": [text]})
        if name == "a.parquet":
            rows.to_parquet(path)
        else:
            written = {"a.txt": text, "a.csv": f"text\n{text}\n"}.get(name, json.dumps({"text": text})).encode()
            path.write_bytes(gzip.compress(written, mtime=0) if name.endswith(".gz") else written)
        os.utime(path, ns=(10**18, 10**18))
        source = DatasetSource(path=str(path))
        identity = source.identity()
        assert texts_of(path)[0].strip() == text
        source.refuse_change(identity)
    path.write_bytes(b"other")
    with pytest.raises(DatasetError, match="was changed while it was read"):
        source.refuse_change(identity)


def test_the_identity_tells_that_bad_rows_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE)
    plain, skipping = (DatasetSource(path=str(tmp_path / "a.jsonl"), on_bad_row=how) for how in ("fail", "skip"))
    assert skipping.identity() == {**plain.identity(), "on_bad_row": "skip"}
    assert "on_bad_row" not in plain.identity(), "caches of another day lack it"


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="on_bad_row must be one of fail, skip"):
        DatasetSource(path="x", on_bad_row="drop")
    with pytest.raises(ConfigError, match="sample_by"):
        DatasetSource(path="x", sample_by="word")


def refusal(path):
    with pytest.raises(DatasetError) as error:
        DatasetSource(path=str(path)).load()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        "texts.jsonl",
        "data/texts.txt",
        "owner/texts.parquet",
        "texts.json.gz",
        "./texts",
        "../texts",
        "~/texts",
        "a/b/c",
    ],
)
def test_a_missing_path_is_said_to_be_missing_and_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("actcache.text.sources._load_dataset", ask)
    assert f"cannot load {path!r} (there is no such file or folder); give a local file" in refusal(path)
    assert "(there is no such file or folder)" in refusal(tmp_path / "texts")


def test_a_hub_name_whose_owner_is_a_folder_here_may_be_either(tmp_path, monkeypatch):
    """The tests are offline, so the hub has nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "cannot load 'data/texts' (the folder data is here and lacks it; the hub: " in refusal("data/texts")
    assert "is here and lacks it" not in refusal("no-such-owner/texts")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("text")
    source = DatasetSource(path="~/t.txt")
    assert len(source.load()) == 1
    assert source.identity() == DatasetSource(path=str(tmp_path / "t.txt")).identity()
