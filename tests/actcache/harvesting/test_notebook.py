import itertools
import json

import datasets
import jaxtyping
import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS

from actcache.errors import DatasetError
from actcache.harvesting.notebook import harvest


def test_harvest_from_python_takes_a_loaded_model(tiny_llama_dir, tiny_texts, tiny_cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import actcache

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    settings = {"context_size": 16, "holdout": 0.2, "batch_size": 8}
    cache = actcache.harvest(model, tokenizer, texts, HOOKS, tmp_path / "c", **settings)
    assert cache.identity["model"] == tiny_cache.identity["model"]
    ours, theirs = (zarr.open_group(c.path / "acts.zarr", mode="r")["train"] for c in (cache, tiny_cache))
    assert np.array_equal(ours[f"{HOOKS[1]}/acts"][:], theirs[f"{HOOKS[1]}/acts"][:])


@pytest.mark.parametrize("texts", [["fine", "half \ud800"], ["fine", 5], [b"caf\xe9"], [], [{"text": "a"}]], ids=ascii)
def test_a_list_that_holds_no_texts_is_one_line(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of annotations that only tests have
    model, tokenizer = tiny_model._model, tiny_model.tokenizer
    with pytest.raises(DatasetError, match=r"whole Unicode|holds no rows|must hold text") as error:
        harvest(model, tokenizer, texts, HOOKS, tmp_path / "c", context_size=16)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["stream", "splits", "streams", "dict", "set", "generator"])
def test_what_is_no_list_of_texts_is_refused_before_it_is_read(tiny_model, kind, tmp_path, monkeypatch):
    """An endless stream too; of a dictionary the keys would be texts."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    endless = datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in itertools.count()))
    rows = datasets.Dataset.from_dict({"text": ["a" * 100]})
    dataset, says = {
        "stream": (endless, "got IterableDataset, which nothing identifies before it is read to its end"),
        "splits": (datasets.DatasetDict(train=rows), "got DatasetDict, which holds several splits"),
        "streams": (datasets.IterableDatasetDict(train=endless), "got IterableDatasetDict, which holds several splits"),
        "dict": ({"text": ["a" * 100]}, "got dict, which has no order of texts"),
        "set": ({"a" * 100}, "got set, which has no order of texts"),
        "generator": ((str(i) for i in itertools.count()), "got generator, which has no order of texts"),
    }[kind]
    with pytest.raises(DatasetError, match=says):
        harvest(tiny_model._model, tiny_model.tokenizer, dataset, HOOKS, tmp_path / "c", context_size=16)
    assert not (tmp_path / "c").exists()
