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


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="sample_by"):
        DatasetSource(path="x", sample_by="word")
