"""Configs of SAELens in every shape that users have them, and what becomes of their fields."""

import dataclasses
import json
from pathlib import Path

import pytest
from support.saelens_configs import FLAT_CALL, flat_file, runner_config

from actcache.errors import ConfigError
from actcache.interop.python_call import Unread
from actcache.interop.saelens_config import DEFAULTS, FLAT_DEFAULTS, read_saelens_config

FLAT = {"hook_name": "blocks.3.hook_resid_pre", "d_in": 64, "d_sae": 256, "dtype": "torch.float32"}


def verdicts(config, command="train") -> dict[str, str]:
    return {row.field: row.verdict for row in config.rows(command)}


def test_a_flat_call_is_read_with_the_defaults_of_its_time(tmp_path: Path):
    config = read_saelens_config(flat_file(tmp_path))
    assert config.is_flat
    assert (config["d_sae"], config["lr"], config["l1_coefficient"]) == (6144, 4e-4, 8e-5)
    assert (config["adam_beta1"], config["b_dec_init_method"], config["seed"]) == (0.0, "geometric_median", 42)


def test_a_file_a_mapping_and_an_object_say_the_same(tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    theirs = runner_config(sae_lens.TopKTrainingSAEConfig(d_in=8, d_sae=32, k=4, dtype="bfloat16"), lr=1e-3, seed=7)
    of_object = read_saelens_config(theirs)
    (tmp_path / "runner_cfg.json").write_text(json.dumps(theirs.to_dict()))
    (tmp_path / "cfg.yaml").write_text(json.dumps(theirs.to_dict()))
    for cfg in (theirs.to_dict(), tmp_path / "runner_cfg.json", str(tmp_path / "cfg.yaml")):
        config = read_saelens_config(cfg)
        for name in {*of_object.given} - {"metadata", "seqpos_slice"}:
            assert config[name] == of_object[name], name
    assert (of_object.architecture, of_object["k"], of_object["lr"], of_object["seed"]) == ("topk", 4, 1e-3, 7)
    assert (of_object["dtype"], of_object["sae.dtype"], of_object["wandb_log_frequency"]) == ("float32", "bfloat16", 20)
    assert not of_object.is_flat


def test_the_cfg_json_of_an_sae_says_what_it_can(tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = sae_lens.BatchTopKTrainingSAEConfig(d_in=8, d_sae=32, k=4)
    theirs = sae.from_sae_runner_config(runner_config(sae, context_size=64, model_name="gpt2"))
    (tmp_path / "cfg.json").write_text(json.dumps(theirs.get_inference_sae_cfg_dict()))
    config = read_saelens_config(tmp_path / "cfg.json")
    assert config.of_sae_alone
    assert (config.architecture, config["k"], config["d_sae"]) == ("batchtopk", 4, 32)
    assert (config["context_size"], config["model_name"], config.hook_name) == (64, "gpt2", "blocks.1.hook_resid_post")


def test_the_defaults_are_those_of_the_installed_saelens():
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    theirs: dict[str, set[str]] = {}
    saes = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values() if config.__module__.startswith("sae_lens.")]
    for each in (*saes, sae_lens.LoggingConfig, sae_lens.LanguageModelSAERunnerConfig):
        for field in dataclasses.fields(each):
            default = [] if field.default_factory is list else field.default
            theirs.setdefault(field.name, set()).add(repr(default))
    for name, value in DEFAULTS.items():
        assert repr(value) in theirs[name], name


def test_old_names_of_fields_stand_for_those_of_today():
    config = read_saelens_config(
        {
            "hook_point": "blocks.{layer}.hook_mlp_out",
            "hook_point_layer": 5,
            "total_training_tokens": 9,
            "store_batch_size": 3,
        }
    )
    assert (config.hook_name, config["training_tokens"]) == ("blocks.5.hook_mlp_out", 9)
    assert config["store_batch_size_prompts"] == 3
    assert read_saelens_config(FLAT | {"activation_fn_str": "topk"}).architecture == "topk"
    assert read_saelens_config(FLAT)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("said", "version"),
    [({"sae_lens_version": "5.6.1"}, (5, 6, 1)), ({"sae_lens_version": "new"}, None), ({}, None)],
)
def test_the_version_is_read_where_it_is_said(said, version):
    assert read_saelens_config(FLAT | said).version == version


def test_rows_say_first_what_is_refused_and_then_what_is_different():
    config = read_saelens_config(FLAT | {"lp_norm": 0.5, "use_ghost_grads": True, "colour": 1, "verbose": False})
    rows = config.rows("train")
    order = ["refused", "different", "taken", "not here"]
    assert [row.verdict for row in rows] == sorted((row.verdict for row in rows), key=order.index)
    said = verdicts(config)
    assert {name for name, verdict in said.items() if verdict == "refused"} == {"lp_norm", "colour"}
    assert said["use_ghost_grads"] == "different"
    assert (said["d_sae"], said["verbose"]) == ("taken", "not here")
    assert {row.field for row in rows if not row.is_given} <= {*FLAT_DEFAULTS}


REFUSED = {
    "train": {
        "architecture": "matching_pursuit",
        "hook_head_index": 3,
        "seqpos_slice": [5, -5],
        "from_pretrained_path": "sae",
        "normalize_activations": "layer_norm",
        "lp_norm": 0.5,
        "activation_fn": "tanh-relu",
        "noise_scale": 0.1,
        "mse_loss_normalization": "dense_batch",
        "exclude_special_tokens": [1, 2],
        "lr_scheduler_name": "cosineannealingwarmrestarts",
        "lr": "3e-4",
        "l1_coefficient": [1e-3, 1e-4],
        "training_tokens": 1.5,
        "d_sae": True,
        "l1_coeficient": 1.0,
    },
    "harvest": {
        "model_class_name": "HookedMamba",
        "use_chat_formatting": True,
        "disable_concat_sequences": True,
        "sequence_separator_token": 7,
        "dtype": "float64",
        "context_size": "128",
        "dataset_path": Unread("path()"),
    },
}


@pytest.mark.parametrize(
    ("command", "field"), [(command, field) for command, fields in REFUSED.items() for field in fields]
)
def test_what_would_be_something_else_is_refused(command, field):
    config = read_saelens_config(FLAT | {field: REFUSED[command][field]})
    refused = [row.field for row in config.rows(command) if row.verdict == "refused"]
    assert refused == [field]


@pytest.mark.parametrize("command", REFUSED)
def test_all_that_is_refused_is_named_at_once(command):
    config = read_saelens_config(FLAT | {"architecture": "standard"} | REFUSED[command])
    with pytest.raises(ConfigError, match="would train or harvest something else") as caught:
        config.refuse(config.rows(command))
    unused = {"lp_norm", "l1_coefficient"} if command == "train" else set()  # by matching_pursuit
    assert all(f"{field}=" in str(caught.value) for field in {*REFUSED[command]} - unused)


@pytest.mark.parametrize("slice_", [None, [None], (None,), (0, None), (None, None, None)], ids=str)
def test_a_slice_of_every_position_is_no_slice(slice_):
    assert verdicts(read_saelens_config(FLAT | {"seqpos_slice": slice_}))["seqpos_slice"] == "not here"


def test_what_is_no_literal_is_refused_only_where_it_is_taken(tmp_path: Path):
    path = tmp_path / "cfg.py"
    path.write_text(FLAT_CALL.replace("lr=4e-4", "lr=rate, device=device"))
    said = verdicts(read_saelens_config(path))
    assert (said["lr"], said["device"]) == ("refused", "not here")


def test_what_an_architecture_does_not_use_is_neither_taken_nor_refused():
    config = read_saelens_config(FLAT | {"architecture": "topk", "activation_fn_kwargs": {"k": 3}, "lp_norm": 0.5})
    said = verdicts(config)
    assert (said["lp_norm"], said["activation_fn_kwargs"]) == ("not here", "taken")
    assert "l1_coefficient" not in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", '{"lr": 1e999}', "numbers of at most 64 bits, got inf"),
        ("a.json", '{"lr": NaN}', "numbers of at most 64 bits, got nan"),
        ("a.json", '{"a": [' + "1, " * 10_000 + "1]}", "at most 10,000 values"),
        ("a.json", '{"a":' * 30 + "1" + "}" * 30, "20 levels deep"),
        ("a.json", '{"a": "' + "x" * (1 << 20) + '"}', "must have at most 1,048,576 bytes"),
        ("a.json", "[1]", "must be a config of SAELens"),
        ("a.yaml", "a: *b", "is not YAML"),
        ("a.py", "\xff", "is not text in UTF-8"),
        (
            "a.py",
            "x = 1",
            "must call LanguageModelSAERunnerConfig or CacheActivationsRunnerConfig once, it does so 0 times",
        ),
        ("a.py", FLAT_CALL * 2, "it does so 2 times"),
        ("a.py", "a = [1]\n" + "a = [a, a]\n" * 60 + "LanguageModelSAERunnerConfig(x=a)", "at most 10,000 values"),
        ("a.py", "LanguageModelSAERunnerConfig(sae=3)", "sae and logger must be configs of their own, got 3 and None"),
    ],
)
def test_a_file_of_a_stranger_is_one_error(tmp_path: Path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        read_saelens_config(path)


def test_a_file_that_is_not_there_is_one_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cfg\.json: cannot be read .*; name an existing file"):
        read_saelens_config(tmp_path / "cfg.json")
