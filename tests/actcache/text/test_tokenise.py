import json

import datasets
import numpy as np
import pytest
import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from support.tiny_models import make_tokenizer

from actcache.errors import ConfigError, DatasetError
from actcache.text.packing import Packing, pack, split_of
from actcache.text.sources import DatasetSource, LoadedDataset
from actcache.text.tokenise import documents, tokenizer_hash

TOKENIZER = make_tokenizer()
TEXTS = ["One document.", "", "Another, a little longer than the first one.", "x", "The end of it all, at last." * 5]


def token_lists() -> list[list[int]]:
    lists = TOKENIZER([text for text in TEXTS if text], add_special_tokens=False)["input_ids"]
    return [*lists, [0, 5, 6, 7], [0], list(range(2, 40)), [9]]  # two that begin with BOS themselves


def packed(bos: int | None, separator: int | None, context_size: int = 8) -> list[list[int]]:
    stream = [(i, np.array(ids, dtype=np.int32)) for i, ids in enumerate(token_lists())]
    packing = Packing(context_size=context_size, bos_id=bos, separator_id=separator)
    return [s.token_ids.tolist() for s in pack(stream, packing, seed=0, holdout=0.0)]


@pytest.mark.parametrize("context_size", [2, 3, 8, 16, 33])
@pytest.mark.parametrize(("bos", "separator"), [(0, 0), (0, 1), (0, None), (None, 1), (None, None)])
def test_packing_equals_saelens(bos, separator, context_size):
    stream = iter([torch.tensor(ids) for ids in token_lists()])
    theirs = concat_and_batch_sequences(
        stream, context_size, begin_batch_token_id=bos, sequence_separator_token_id=separator
    )
    assert packed(bos, separator, context_size) == [row.tolist() for row in theirs]


def test_every_token_says_its_document_and_splits_are_packed_apart():
    stream = [(i, np.full(5 + i % 7, i + 2, dtype=np.int32)) for i in range(200)]  # document i holds only id i + 2
    found = list(pack(stream, Packing(context_size=8, bos_id=0, separator_id=1), seed=3, holdout=0.3))
    for sequence in found:
        own = sequence.token_ids >= 2
        assert (sequence.token_ids[own] == sequence.documents[own] + 2).all()
        assert {split_of(int(d), seed=3, holdout=0.3) for d in sequence.documents} == {sequence.split}
    assert {sequence.split for sequence in found} == {"train", "validation"}


def test_holdout_is_a_share_of_documents_that_depends_on_the_seed():
    held = [{i for i in range(4000) if split_of(i, seed=s, holdout=0.1) == "validation"} for s in (0, 1)]
    assert held[0] != held[1]
    for found in held:  # binomial(4000, 0.1): five standard deviations are 95
        assert abs(len(found) - 400) < 95
    assert not any(split_of(i, seed=0, holdout=0.0) == "validation" for i in range(4000))


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


def test_pretokenised_columns_are_taken_as_they_are(tmp_path):
    lists = token_lists()
    for column in ("input_ids", "tokens"):
        datasets.Dataset.from_dict({column: lists}).to_parquet(tmp_path / "ids.parquet")
        found = documents(DatasetSource(path=str(tmp_path / "ids.parquet")), TOKENIZER)
        assert [ids.tolist() for _, ids in found] == lists


def test_identity_follows_the_bytes_not_the_place(tmp_path):
    for folder, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(text)
    a, b, c = (DatasetSource(path=str(tmp_path / folder / "t.txt")).identity() for folder in "abc")
    assert a == b != c


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
    with pytest.raises(ConfigError, match="context_size"):
        Packing(context_size=1, bos_id=0, separator_id=None)


def test_tokenizer_hash_tells_vocabularies_apart():
    other = make_tokenizer()
    assert tokenizer_hash(other) == tokenizer_hash(TOKENIZER)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != tokenizer_hash(TOKENIZER)


def test_texts_survive_json(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    ids = dict(documents(DatasetSource(path=str(tmp_path / "t.jsonl")), TOKENIZER))
    assert TOKENIZER.decode(ids[2]) == TEXTS[2]
