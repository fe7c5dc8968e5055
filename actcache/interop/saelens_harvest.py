"""`harvest_options`: what a training config of SAELens says of a harvest, as options of `actcache harvest`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from actcache.format.dtypes import ACTIVATION_DTYPES
from actcache.interop.saelens_config import SAELensConfig
from actcache.models.hook_names import hooks_of

HELD_OUT, SPECIAL = 0.02, 0.05  # how many rows more than training reads: held out, and special tokens too
_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


def harvest_options(config: SAELensConfig) -> dict[str, Any]:
    """The options of a harvest whose cache holds what the config trains on, by their names in Python.

    Without special tokens a cache must hold more rows, for those are stored and not trained on.

    Raises:
        ConfigError: a field asks for another harvest than there is. The message names all such fields.
    """
    config.refuse(config.rows("harvest"))
    hook_name = _hook_name(config)
    more = SPECIAL if config["exclude_special_tokens"] else HELD_OUT
    options = {
        "model": config["model_name"],
        "hook": [hook_name],
        "dataset": config["dataset_path"],
        "streaming": config["streaming"],
        "tokens": math.ceil(config["training_tokens"] * (1 + more)),
        "context_size": config["context_size"],
        "prepend_bos": config["prepend_bos"],
        "separator": _separator(config),
        "seed": config["seed"],
        "dtype": config["dtype"],
        "compiled": bool(config["compile_llm"]),
        "backend": "hf" if hook_name.rpartition(".")[2] in _SITES else "transformer_lens",
        **_of_model(config["model_from_pretrained_kwargs"]),
    }
    if config["autocast_lm"]:
        options["model_dtype"] = "bfloat16"
    if {"store_batch_size_prompts", "store_batch_size", "model_batch_size"} & config.given.keys():
        options["batch_size"] = config["store_batch_size_prompts"]
    return {name: value for name, value in options.items() if value not in ("", None, -1)}


def _hook_name(config: SAELensConfig) -> str:
    """The hook by TransformerLens' name, which SAELens leaves only for a transformers model: `model.layers.8`."""
    name = config.hook_name
    hooks = hooks_of(name, config["model_name"]) if config["model_class_name"] == "AutoModelForCausalLM" else None
    return name if hooks is None else hooks[1]


def _separator(config: SAELensConfig) -> str:
    """SAELens 3 to 5 put BOS between documents only where sequences begin with it (tokenization_and_batching.py)."""
    asked = config["sequence_separator_token"] if config["prepend_bos"] or not config.is_flat else None
    return asked or "none"


def _of_model(settings: object) -> dict[str, Any]:
    """The dtype and the revision among what SAELens hands on to `from_pretrained`."""
    given = settings if isinstance(settings, Mapping) else {}
    dtype = str(given.get("dtype") or given.get("torch_dtype") or "").removeprefix("torch.")
    revision = given.get("revision")
    return ({"model_dtype": dtype} if dtype in ACTIVATION_DTYPES else {}) | (
        {"revision": revision} if isinstance(revision, str) else {}
    )
