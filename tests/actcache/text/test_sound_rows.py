import logging

import datasets
import pytest
from support.documents import TOKENIZER

from actcache.errors import DatasetError
from actcache.text.sources import DatasetSource, LoadedDataset
from actcache.text.tokenise import documents

BAD = [  # lines of JSON, the number of the bad one, and what is said of it
    ('{"text": "a"}\n\n{"text": null}\n{"text": "b"}', 3, "holds null: column 'text' must hold text"),
    ('{"text": "a"}\n{"text": 5}\n{"text": "b"}', 2, "holds 5: column 'text' must hold text .*, got int"),
    ('{"text": "a"}\n{"text": true}\n{"text": "b"}', 2, "holds True: .* got bool"),
    ('{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}', 2, r"is not Unicode: '\\ud800', surrogates not allowed"),
    ('{"text": "a"}\n{"body": "x"}\n{"text": "b"}', 2, "has no column 'text'"),
    ('{"body": "x"}\n{"text": "a"}\n{"text": "b"}', 1, "has no column 'text'"),
    ('{"text": "a"}\n{"text": {"x": 1}}\n{"text": "b"}', 2, r"holds \{'x': 1\}: .* got dict"),
    ('{"text": "a"}\n{"text": [5]}\n{"text": "b"}', 2, "holds a list: column 'text' is one of texts"),
    ('{"text": "a"}\n{"text": ["x"]}\n{"text": "b"}', 2, "holds 'x' in a list: .* got str in one"),
    ('{"text": "a"}\n{"text": \n{"text": "b"}', 2, r"is not JSON: Expecting value \(column 10\)"),
    ('{"tokens": [5]}\n{"tokens": "x"}\n{"tokens": [6]}', 2, "holds text: column 'tokens' is one of token ids"),
    ('{"tokens": [5]}\n{"tokens": [1, null]}\n{"tokens": [6]}', 2, "holds None in a list"),
    ('{"tokens": [5]}\n{"tokens": [[1]]}\n{"tokens": [6]}', 2, r"holds \[1\] in a list"),
    ('{"tokens": [5]}\n{"tokens": [1.0]}\n{"tokens": [6]}', 2, r"holds 1\.0 in a list"),
]


@pytest.mark.parametrize(("content", "line", "says"), BAD, ids=map(str, range(len(BAD))))
def test_a_bad_row_is_named_or_left_out(tmp_path, caplog, content, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError, match=rf"\(line {line} of {path} {says}.*\); mend that row, or pass --on-bad-row"):
        list(documents(DatasetSource(path=str(path)), TOKENIZER))
    caplog.set_level(logging.INFO)
    found = list(documents(DatasetSource(path=str(path), on_bad_row="skip"), TOKENIZER))
    lines = [number for number, each in enumerate(filter(None, content.splitlines()))]
    bad = line - 1 - (not content.splitlines()[1])
    assert [index for index, _ in found] == [number for number in lines if number != bad]
    assert "dataset: 3 rows were read" in caplog.text
    assert f"dataset: 1 of them were left out, the first: line {line} of {path}" in caplog.text


@pytest.mark.parametrize("where", ["memory", "disk", "parquet"])
def test_a_row_of_a_table_is_named_by_its_number(tmp_path, where):
    rows = datasets.Dataset.from_dict({"text": ["a"] * 700 + [None, "b"]})
    if where == "memory":
        source = LoadedDataset(rows)
    else:
        path = tmp_path / ("disk" if where == "disk" else "a.parquet")
        (rows.save_to_disk if where == "disk" else rows.to_parquet)(path)
        source = DatasetSource(path=str(path))
    with pytest.raises(DatasetError, match=r"row 700 \(counted from 0\).* holds null"):
        list(documents(source, TOKENIZER))


def test_token_ids_that_were_written_as_text_are_not_tokenised(tmp_path):
    (tmp_path / "a.csv").write_text('input_ids\n"[1, 2]"\n')
    with pytest.raises(DatasetError, match=r"line 2 of .* holds text: column 'input_ids' is one of token ids"):
        list(documents(DatasetSource(path=str(tmp_path / "a.csv")), TOKENIZER))
    assert len(list(documents(DatasetSource(path=str(tmp_path / "a.csv"), column="input_ids"), TOKENIZER))) == 1


def test_rows_that_are_all_bad_are_an_error_whatever_is_asked(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "ä"}\n'.encode("utf-16-le") * 2)
    with pytest.raises(DatasetError, match=r"line 1 of .* is not"):
        list(documents(DatasetSource(path=str(tmp_path / "a.jsonl"), on_bad_row="skip"), TOKENIZER))
    (tmp_path / "b.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(DatasetError, match="it holds no rows"):
        list(documents(DatasetSource(path=str(tmp_path / "b.jsonl"), on_bad_row="skip"), TOKENIZER))


def test_what_is_taken_is_said_before_the_first_row(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("test.jsonl", "train-0.jsonl", "train-1.jsonl", "README.md", "paper.pdf"):
        (tmp_path / name).write_text('{"n": 1, "text": "a b c"}\n' * 300)
    found = documents(DatasetSource(path=str(tmp_path)), TOKENIZER)
    next(found)
    (line,) = caplog.messages
    assert line.startswith("dataset: column 'text' of split 'train' of 2 json files: ")
    assert f"'{tmp_path}/train-0.jsonl', '{tmp_path}/train-1.jsonl'; left out: " in line
    assert all(f"'{tmp_path}/{name}'" in line for name in ("test.jsonl", "README.md", "paper.pdf"))
    assert len(list(found)) == 599
    assert caplog.messages[1:] == ["dataset: 600 rows were read"]
