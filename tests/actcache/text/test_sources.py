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


def test_a_loading_script_is_refused_in_one_line():
    with pytest.raises(DatasetError, match=r"cannot load .* \(Dataset scripts are no longer supported") as error:
        DatasetSource(path="somewhere/script.py").load()
    assert "\n" not in str(error.value)


def test_bad_settings_are_refused():
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
