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


ROWS = {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]], "text": ["one", "two"]}


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("streaming", [False, True])
def test_ids_are_read_whatever_format_was_set(kind, streaming, tmp_path):
    rows = datasets.Dataset.from_dict(ROWS)
    shown = rows.with_format(kind, columns=["input_ids", "attention_mask"])  # so the text is not chosen
    shown.save_to_disk(tmp_path / "saved")
    for source in (LoadedDataset(shown), DatasetSource(path=str(tmp_path / "saved"), streaming=streaming)):
        assert [ids.tolist() for _, ids in documents(source, TOKENIZER)] == ROWS["input_ids"]


def test_the_identity_of_rows_in_memory_is_that_of_their_values():
    """The printed form of a long tensor leaves its middle out."""
    long, other = [1] * 2000, [1] * 1000 + [2] + [1] * 999
    identities = [
        LoadedDataset(datasets.Dataset.from_dict({"input_ids": [ids]}).with_format(kind)).identity()
        for ids in (long, other)
        for kind in (None, "torch", "numpy")
    ]
    assert identities[0] == identities[1] == identities[2] != identities[3] == identities[4] == identities[5]


def test_what_a_transform_makes_of_rows_is_taken():
    rows = datasets.Dataset.from_dict({"body": ["One", "Two"]})
    shown = rows.with_transform(lambda batch: {"text": [body.lower() for body in batch["body"]]})
    assert [TOKENIZER.decode(ids) for _, ids in documents(LoadedDataset(shown), TOKENIZER)] == ["one", "two"]


@pytest.mark.parametrize("pad", ["left", "right", "both", "inside"])
@pytest.mark.parametrize("kind", [int, bool])
def test_masked_ids_are_dropped(pad, kind, tmp_path):
    lists = token_lists()
    padded, masks = [], []
    for ids in lists:
        mask = {"left": [0] * 40, "right": [], "both": [0] * 3, "inside": [1]}[pad]
        mask = [*mask, *([0] if pad == "inside" else []), *[1] * (len(ids) - (pad == "inside"))]
        mask += [0] * (80 - len(mask)) if pad in ("right", "both") else []
        real = iter(ids)
        padded.append([next(real) if is_real else 1 for is_real in mask])
        masks.append([kind(is_real) for is_real in mask])
    datasets.Dataset.from_dict({"input_ids": padded, "attention_mask": masks}).to_parquet(tmp_path / "ids.parquet")
    found = documents(DatasetSource(path=str(tmp_path / "ids.parquet")), TOKENIZER)
    assert [ids.tolist() for _, ids in found] == lists


def test_a_row_that_is_masked_whole_is_no_document():
    rows = {"input_ids": [[1, 1], [4, 5]], "attention_mask": [[0, 0], [1, 1]]}
    found = documents(LoadedDataset(datasets.Dataset.from_dict(rows)), TOKENIZER)
    assert [(index, ids.tolist()) for index, ids in found] == [(1, [4, 5])]


def test_a_mask_beside_text_is_not_of_its_tokens():
    found = documents(LoadedDataset(datasets.Dataset.from_dict(ROWS), "text"), TOKENIZER)
    assert [TOKENIZER.decode(ids) for _, ids in found] == ["one", "two"]


@pytest.mark.parametrize("mask", [[1], [1, 1, 1], [1, 2], [1, None], None])
def test_a_mask_of_something_else_is_refused_by_its_row(mask):
    rows = {"input_ids": [[4, 5], [4, 5]], "attention_mask": [[1, 1], mask]}
    with pytest.raises(DatasetError, match="attention_mask of row 1 must hold 0 or 1 for each of its 2 token ids"):
        list(documents(LoadedDataset(datasets.Dataset.from_dict(rows)), TOKENIZER))
