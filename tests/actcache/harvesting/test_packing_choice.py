"""What a cache records of how its sequences were made is what was done."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from support.tiny_caches import HOOKS, promised_files
from support.tiny_models import make_tokenizer

from actcache.errors import CacheMismatch, DatasetError
from actcache.format.paths import CACHE_MANIFEST, PLAN, STORE
from actcache.format.seal import seal, unseal
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.store.cache import Cache
from actcache.text.sources import DatasetSource, LoadedDataset, Source

CONTEXT = 16


def harvested(model, source: Source, out: Path, **settings) -> Cache:
    defaults = {"hook_names": HOOKS[:1], "context_size": CONTEXT, "holdout": 0.0, "batch_size": 8}
    return harvest(model, source, HarvestConfig(**{**defaults, **settings}), out)


def of_ids(lists: list[list[int]]) -> LoadedDataset:
    return LoadedDataset(datasets.Dataset.from_dict({"input_ids": lists}))


def without(model, *names: str):
    """The model with a tokenizer that lacks these special tokens."""
    from actcache.models.load import wrap_model

    tokenizer = make_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return wrap_model(model._model, tokenizer)


@pytest.mark.parametrize(
    ("lacks", "asked", "done", "said"),
    [
        ((), {}, (True, "bos"), []),
        (("bos_token",), {}, (False, "none"), ["bos"]),
        (("bos_token",), {"prepend_bos": False, "separator": "eos"}, (False, "eos"), []),
        (("bos_token", "eos_token"), {"separator": "eos"}, (False, "none"), ["bos", "eos"]),
        (("eos_token",), {"separator": "eos"}, (True, "none"), ["eos"]),
        (("eos_token",), {}, (True, "bos"), []),
    ],
)
def test_what_the_tokenizer_lacks_is_recorded_and_said_once(
    lacks, asked, done, said, tiny_model, tiny_texts, tmp_path, caplog
):
    model, source = without(tiny_model, *lacks), DatasetSource(path=str(tiny_texts))
    with caplog.at_level(logging.WARNING, "actcache"):
        cache = harvested(model, source, tmp_path / "c", tokens=320, **asked)
        assert harvested(model, source, tmp_path / "c", tokens=480, **asked).n_rows() == 480
    assert (cache.identity["prepend_bos"], cache.identity["separator"]) == done
    lines = [record.getMessage() for record in caplog.records if "its tokenizer has no" in record.getMessage()]
    assert [line.split(" has no ")[1].split(",")[0] for line in lines] == said
    assert all((row[0] == 0) == done[0] for row in cache.sequences("train"))


def in_former_words(root: Path) -> None:
    """Let a cache record what was asked for, and nothing of kept rows, as caches of former versions do."""
    for name in (PLAN, CACHE_MANIFEST):
        values = unseal((root / name).read_bytes(), root / name)
        identity = (values if name == PLAN else values["plan"])["identity"]
        identity.update(prepend_bos=True, separator="bos")
        (root / name).write_bytes(seal(values))
    metadata = root / STORE / "zarr.json"
    values = json.loads(metadata.read_text())
    values["attributes"]["actcache"] = identity
    metadata.write_text(json.dumps(values))


def test_a_cache_that_records_what_was_asked_for_grows(tiny_model, tiny_texts, tmp_path):
    model, source = without(tiny_model, "bos_token"), DatasetSource(path=str(tiny_texts))
    harvested(model, source, tmp_path / "c", tokens=320)
    in_former_words(tmp_path / "c")
    for asked in ({}, {"prepend_bos": False, "separator": "none"}):
        shutil.copytree(tmp_path / "c", out := tmp_path / f"grown {len(asked)}")
        grown = harvested(model, source, out, tokens=640, **asked)
        assert (grown.n_rows(), grown.identity["prepend_bos"], grown.identity["separator"]) == (640, True, "bos")
    with pytest.raises(CacheMismatch, match="separator is 'bos' there, 'eos' here"):
        harvested(model, source, tmp_path / "c", tokens=640, separator="eos")


def rows_of(n_rows: int, *, bos: bool, length: int = CONTEXT) -> list[list[int]]:
    rows = np.random.default_rng(0).integers(2, 500, (n_rows, length))
    rows[:, 0] = 0 if bos else rows[:, 0]
    return rows.tolist()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("remainder", [0, 5])
def test_rows_of_whole_sequences_are_kept(bos, remainder, tiny_model, tmp_path):
    """The last row may be short, as what is left when a text was cut."""
    rows = rows_of(300, bos=bos)
    source = of_ids([*rows, *([[7] * remainder] if remainder else [])])
    cache = harvested(tiny_model, source, tmp_path / "c")
    assert cache.sequences("train").tolist() == rows
    assert (np.unique(cache.documents("train"), axis=1) == np.arange(300)[:, None]).all()
    assert (cache.identity["rows"], cache.identity["prepend_bos"], cache.identity["separator"]) == ("kept", bos, "none")
    again = harvested(tiny_model, source, tmp_path / "c")
    assert again.fingerprint == cache.fingerprint


def test_kept_rows_are_held_out_row_by_row_and_grow(tiny_model, tmp_path):
    rows = rows_of(60, bos=True)
    cache = harvested(tiny_model, of_ids(rows), tmp_path / "c", holdout=0.3, tokens=20 * CONTEXT)
    assert cache.n_rows("train") + cache.n_rows("validation") == 20 * CONTEXT
    cache = harvested(tiny_model, of_ids(rows), tmp_path / "c", holdout=0.3)
    found = {split: cache.sequences(split) for split in ("train", "validation")}
    assert len(found["train"]) + len(found["validation"]) == 60
    for split, sequences in found.items():
        assert sequences.tolist() == [rows[document] for document in cache.documents(split)[:, 0]]


def test_padded_rows_that_are_whole_once_the_padding_is_gone_are_kept(tiny_model, tmp_path):
    rows = rows_of(12, bos=True)
    padded = {"input_ids": [[1, 1, *row] for row in rows], "attention_mask": [[0, 0, *[1] * CONTEXT]] * 12}
    cache = harvested(tiny_model, LoadedDataset(datasets.Dataset.from_dict(padded)), tmp_path / "c")
    assert cache.sequences("train").tolist() == rows


@pytest.mark.parametrize("lengths", [[16, 16, 9, 16], [16, 16, 17], [9, 16, 16], [9], [32, 32]])
def test_rows_of_other_lengths_are_packed(lengths, tiny_model, tmp_path):
    rows = [rows_of(1, bos=False, length=length)[0] for length in lengths * 4]
    cache = harvested(tiny_model, of_ids(rows), tmp_path / "c")
    assert "rows" not in cache.identity
    assert (cache.sequences("train")[:, 0] == 0).all()


@pytest.mark.parametrize("length", [9, 17])
def test_another_row_after_many_whole_ones_is_named(length, tiny_model, tmp_path):
    rows = rows_of(300, bos=True)
    rows.insert(280, [5] * length)
    says = rf"row 280 has {length} token ids, and those before it have 16 and are kept as they are; pass --repack"
    with pytest.raises(DatasetError, match=says):
        harvested(tiny_model, of_ids(rows), tmp_path / "c")
    assert harvested(tiny_model, of_ids(rows), tmp_path / "c", repack=True).n_rows() > 300 * CONTEXT


def test_a_cache_of_repacked_rows_grows_as_it_was_packed(tiny_model, tmp_path):
    """Those of former versions are such caches: they say nothing of rows, for all were packed."""
    source = of_ids(rows_of(60, bos=False))
    packed = harvested(tiny_model, source, tmp_path / "whole", repack=True)
    assert "rows" not in packed.identity
    assert (packed.sequences("train")[:, 0] == 0).all()
    for asked in (True, False):
        harvested(tiny_model, source, out := tmp_path / str(asked), tokens=320, repack=True)
        harvested(tiny_model, source, out, repack=asked)
        assert promised_files(out).keys() == promised_files(packed.path).keys()
        assert np.array_equal(harvested(tiny_model, source, out).sequences("train"), packed.sequences("train"))


def test_kept_rows_are_not_packed_anew_in_the_same_folder(tiny_model, tmp_path):
    source = of_ids(rows_of(20, bos=True))
    harvested(tiny_model, source, tmp_path / "c")
    with pytest.raises(CacheMismatch, match="rows is 'kept' there, None here"):
        harvested(tiny_model, source, tmp_path / "c", repack=True)


def test_lost_documents_of_kept_rows_are_restored(tiny_model, tmp_path):
    from actcache.integrity.repair import repair

    datasets.Dataset.from_dict({"input_ids": rows_of(20, bos=True)}).to_parquet(tmp_path / "ids.parquet")
    source = DatasetSource(path=str(tmp_path / "ids.parquet"))
    cache = harvested(tiny_model, source, tmp_path / "c")
    before = promised_files(cache.path)
    (lost,) = (cache.path / "acts.zarr" / "train" / "sequences" / "document").rglob("c/0/0")
    lost.unlink()
    repair(cache.path, lambda compute: tiny_model, dataset=source)
    assert promised_files(cache.path) == before


def test_token_ids_need_no_tokenizer(tiny_model, tmp_path):
    from actcache.models.load import wrap_model

    bare = wrap_model(tiny_model._model, None)
    rows = rows_of(20, bos=True)
    kept = harvested(bare, of_ids(rows), tmp_path / "kept")
    assert (kept.sequences("train").tolist(), kept.special_token_ids) == (rows, ())
    packed = harvested(bare, of_ids([row[:9] for row in rows]), tmp_path / "packed")
    assert packed.identity["tokenizer_sha256"] is None
    assert packed.sequences("train").flatten().tolist() == [i for row in rows for i in row[:9]][: packed.n_rows()]
    with pytest.raises(CacheMismatch, match=r"tokenizer_sha256"):
        harvested(tiny_model, of_ids(rows), tmp_path / "kept")
    texts = LoadedDataset(datasets.Dataset.from_dict({"text": ["some text"]}))
    with pytest.raises(DatasetError, match=r"column 'text' holds text, and the model has no tokenizer; pass a dataset"):
        harvested(bare, texts, tmp_path / "texts")
