"""Sequences made again, from the tokens or from the dataset."""

import shutil

import pytest
from support.damages import HOOK, TRAIN, drop, flip
from support.repairs import SETTINGS, repaired
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheMismatch, DatasetError
from actcache.integrity.verify import verify

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_ids_and_tokens_of_the_same_rows_come_from_the_dataset(tiny_model, sound, copied):
    flip(copied / TRAIN / "sequences" / "id" / "c" / "0" / "0")
    flip(copied / TRAIN / "tokens" / "id" / "c" / "1")
    drop(copied / TRAIN / HOOK / "acts" / "c" / "1" / "0")
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_a_dataset_that_has_moved_is_named(tiny_model, tiny_texts, tmp_path):
    texts = shutil.copy(tiny_texts, tmp_path / "first.jsonl")
    cache = harvest_tiny(tiny_model, texts, tmp_path / "c", **SETTINGS).path
    before = promised_files(cache)
    texts.rename(tmp_path / "second.jsonl")
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    drop(cache / TRAIN / "zarr.json")
    with pytest.raises(DatasetError, match=r"cannot load .*first\.jsonl"):
        repaired(cache, lambda compute: tiny_model)
    assert {problem.array for problem in verify(cache).problems} == {"sequences/document"}, "the rest is repaired"
    repaired(cache, lambda compute: tiny_model, dataset=str(tmp_path / "second.jsonl"))
    assert promised_files(cache) == before


def test_another_dataset_is_refused(tiny_model, copied, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "' + "another text " * 3000 + '"}\n')
    path = copied / TRAIN / "sequences" / "document" / "c" / "0" / "0"
    drop(path)
    with pytest.raises(CacheMismatch, match="the dataset does not give it again; pass its former revision"):
        repaired(copied, lambda compute: tiny_model, dataset=str(tmp_path / "other.jsonl"))
    assert not path.exists()


def test_a_dataset_in_memory_is_asked_for(tiny_model, tiny_texts, tmp_path):
    import json

    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import LoadedDataset

    texts = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    source = LoadedDataset(Dataset.from_dict({"text": texts}))
    config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, batch_size=8, tokens=640, holdout=0.0)
    cache = harvest(tiny_model, source, config, tmp_path / "c").path
    before = promised_files(cache)
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    with pytest.raises(DatasetError, match="where the dataset is was not remembered; pass --dataset"):
        repaired(cache, lambda compute: tiny_model)
    repaired(cache, lambda compute: tiny_model, dataset=source)
    assert promised_files(cache) == before
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    repaired(cache, lambda compute: tiny_model, dataset=str(tiny_texts))
    assert promised_files(cache) == before, "the same texts from a file"
