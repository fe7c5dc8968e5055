import pytest
from support.model_cases import PLACES, TOKENS
from support.tiny_models import FAMILIES, N_LAYERS
from torch import nn
from transformers import OPTConfig

from actcache.errors import ModelError
from actcache.models.families import blocks_of, family_of
from actcache.models.load import load_model


def test_parallel_blocks_have_no_resid_mid(ours, bridge):
    with pytest.raises(ModelError, match=r"attention and MLP of this model are parallel.*hook_resid_pre"):
        ours("gpt_neox").activations(TOKENS, ["blocks.1.hook_resid_mid"])
    with pytest.raises(ModelError, match="no hook"):
        bridge("gpt_neox").activations(TOKENS, ["blocks.1.hook_resid_mid"])


def test_unknown_family_names_the_known_ones_and_the_other_backend(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'gpt2'.*'gemma3_text'.*got 'opt'.*--backend transformer_lens"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_found_in_what_is_wrapped_around_them(family, theirs):
    model = theirs(family)
    row = family_of(model.config, family)
    expected = model.get_submodule(PLACES[family][0])
    assert blocks_of(model, row, N_LAYERS, family) is expected
    assert blocks_of(nn.ModuleDict({"adapter": model}), row, N_LAYERS, family) is expected


def test_blocks_that_are_not_there_or_twice_are_refused(theirs):
    model = theirs("llama")
    row = family_of(model.config, "llama")
    with pytest.raises(ModelError, match=r"must have one list 'layers' of 4 blocks .* found 0"):
        blocks_of(model, row, N_LAYERS + 1, "llama")
    with pytest.raises(ModelError, match="found 2"):
        blocks_of(nn.ModuleList([model, theirs("qwen2")]), row, N_LAYERS, "llama")
