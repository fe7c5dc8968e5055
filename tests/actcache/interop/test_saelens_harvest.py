"""What a config of SAELens says of a harvest."""

import inspect
import math
from pathlib import Path

import pytest
from support.saelens_configs import flat_file

from actcache.commands.harvest import harvest
from actcache.errors import ConfigError
from actcache.interop.saelens_config import read_saelens_config
from actcache.interop.saelens_harvest import harvest_options

FLAT = {"model_name": "m", "hook_name": "blocks.3.hook_resid_pre", "dataset_path": "texts"}


def options(**fields: object) -> dict:
    return harvest_options(read_saelens_config(FLAT | fields))


def test_a_training_config_says_the_whole_harvest(tmp_path: Path):
    assert harvest_options(read_saelens_config(flat_file(tmp_path))) == {
        "model": "gpt2-small",
        "hook": ["blocks.8.hook_resid_pre"],
        "dataset": "monology/pile-uncopyrighted",
        "streaming": True,
        "tokens": 102_000_000,
        "context_size": 128,
        "prepend_bos": True,
        "separator": "bos",
        "seed": 42,
        "dtype": "float32",
        "compiled": False,
        "backend": "hf",
    }


def test_every_option_is_one_of_harvest():
    more = {"autocast_lm": True, "store_batch_size_prompts": 8, "model_from_pretrained_kwargs": {"revision": "r"}}
    assert {*options(**more)} <= {*inspect.signature(harvest).parameters}


@pytest.mark.parametrize(
    ("fields", "option", "value"),
    [
        ({"hook_name": "blocks.3.attn.hook_z"}, "backend", "transformer_lens"),
        ({"hook_name": "blocks.3.hook_mlp_out"}, "backend", "hf"),
        (
            {"hook_name": "model.layers.3", "model_class_name": "AutoModelForCausalLM"},
            "hook",
            ["blocks.3.hook_resid_post"],
        ),
        ({"autocast_lm": True}, "model_dtype", "bfloat16"),
        ({"model_from_pretrained_kwargs": {"torch_dtype": "torch.float16"}}, "model_dtype", "float16"),
        ({"model_from_pretrained_kwargs": {"revision": "abc"}}, "revision", "abc"),
        ({"store_batch_size_prompts": 8}, "batch_size", 8),
        ({"compile_llm": True}, "compiled", True),
        ({"prepend_bos": False}, "separator", "none"),
        ({"sae": {"d_sae": 8}, "prepend_bos": False}, "separator", "bos"),
        ({"sae": {"d_sae": 8}, "sequence_separator_token": None}, "separator", "none"),
        ({"training_tokens": 1e6, "exclude_special_tokens": True}, "tokens", 1_050_000),
        ({"dtype": "torch.bfloat16"}, "dtype", "bfloat16"),
    ],
    ids=str,
)
def test_a_field_becomes_an_option(fields, option, value):
    assert options(**fields)[option] == value


@pytest.mark.parametrize(("n_tokens", "special"), [(1000, False), (10**9, True)])
def test_held_out_and_special_tokens_leave_as_many_rows_as_training_reads(n_tokens, special):
    asked = options(training_tokens=n_tokens, exclude_special_tokens=special)["tokens"]
    of_sequences = 127 / 128 if special else 1.0
    assert math.floor(asked * 0.99 * of_sequences) >= n_tokens  # 0.99: the holdout is 0.01


def test_what_no_harvest_can_do_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"use_chat_formatting=True .*; dtype='float64'"):
        options(use_chat_formatting=True, dtype="float64")
