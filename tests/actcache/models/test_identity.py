import json
import shutil

import pytest
import torch
from support.remote_code import RemoteCode
from support.tiny_models import FAMILIES, make_model, make_tokenizer

from actcache.errors import ModelError
from actcache.models.identity import weights_sha256
from actcache.models.load import load_model, wrap_model


def test_identity_is_the_model_not_the_place(directory, ours, bridge, tmp_path):
    moved = shutil.copytree(directory("llama"), tmp_path / "elsewhere" / "llama")
    expected = ours("llama").identity
    assert expected["name"] == "llama"
    assert expected["revision"] is None
    assert json.loads(json.dumps(expected)) == expected
    assert load_model(moved, device="cpu").identity == expected
    assert bridge("llama").identity == expected


def test_identity_of_other_weights_dtype_and_config(directory, ours):
    expected = ours("llama").identity
    other_seed = wrap_model(make_model("llama", 512, seed=1), make_tokenizer(), name="llama").identity
    other_dtype = load_model(directory("llama"), device="cpu", dtype="bfloat16").identity
    assert other_seed["config_sha256"] == other_dtype["config_sha256"] == expected["config_sha256"]
    assert len({i["weights_sha256"] for i in (expected, other_seed, other_dtype)}) == 3
    assert len({ours(family).identity["config_sha256"] for family in FAMILIES}) == len(FAMILIES)


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="weight must have values, is on the meta device"):
        weights_sha256(model)


def test_the_code_that_a_model_brings_is_part_of_its_identity(directory, ours, tmp_path):
    made = RemoteCode(directory("llama"), tmp_path)
    plain = load_model(made.model("own", model_type="llama"), device="cpu").identity
    first, again, other = (
        load_model(
            made.model(f"{place}/own", comment=comment, model_type="llama"), device="cpu", trust_remote_code=True
        ).identity
        for place, comment in (("a", "one"), ("b", "one"), ("c", "another"))
    )
    assert set(plain) == set(ours("llama").identity) == set(first) - {"code_sha256"}
    assert first == again
    assert {**first, "code_sha256": ""} == {**other, "code_sha256": ""}
    assert first["code_sha256"] != other["code_sha256"]
    trusted = load_model(directory("llama"), device="cpu", trust_remote_code=True).identity
    assert trusted == ours("llama").identity
