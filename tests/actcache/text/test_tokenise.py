import json

import datasets
import pytest
from support.documents import TEXTS, TOKENIZER, token_lists
from support.tiny_models import make_tokenizer

from actcache.errors import DatasetError
from actcache.text.sources import DatasetSource, LoadedDataset
from actcache.text.tokenise import documents, tokenizer_hash


def test_pretokenised_columns_are_taken_as_they_are(tmp_path):
    lists = token_lists()
    for column in ("input_ids", "tokens"):
        datasets.Dataset.from_dict({column: lists}).to_parquet(tmp_path / "ids.parquet")
        found = documents(DatasetSource(path=str(tmp_path / "ids.parquet")), TOKENIZER)
        assert [ids.tolist() for _, ids in found] == lists


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ({"body": ["text"]}, None, "it has 'body'; pass --column"),
        ({"text": ["text"]}, "body", "no column 'body'"),
        ({"text": [1, 2]}, None, "must hold text or lists of token ids, got int"),
        ({"input_ids": [[1, 99999]]}, None, "token id 99999"),
    ],
)
def test_wrong_columns_are_named(rows, column, message):
    source = LoadedDataset(datasets.Dataset.from_dict(rows), column)
    with pytest.raises(DatasetError, match=message):
        list(documents(source, TOKENIZER))


def test_tokenizer_hash_tells_vocabularies_apart():
    other = make_tokenizer()
    assert tokenizer_hash(other) == tokenizer_hash(TOKENIZER)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != tokenizer_hash(TOKENIZER)


def test_texts_survive_json(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    ids = dict(documents(DatasetSource(path=str(tmp_path / "t.jsonl")), TOKENIZER))
    assert TOKENIZER.decode(ids[2]) == TEXTS[2]
