"""How older versions identified a language model: caches that they made are compared in the same way."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.models.stored_values import values_of

SAMPLES_PER_PARAMETER = 64
RENAMED = (("embed_out.weight", "lm_head.weight"),)  # of GPT-NeoX: transformers up to 5.12, later ones
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)


def former_hashes(model: nn.Module) -> dict[str, frozenset[str]]:
    """ "config_sha256" and "weights_sha256" as older versions gave them: each hash that the model may have had.

    A hash of weights held the names of the parameters, which are others in other versions of transformers. It sampled
    each parameter, and neither buffers nor what adapters are active were in it.

    Raises:
        ModelError: a parameter is on the "meta" device and its values are nowhere.
    """
    config = cast(PreTrainedModel, model).config.to_diff_dict()
    canonical = json.dumps(_architecture(config), sort_keys=True, separators=(",", ":"), default=str)
    weights = [hashlib.sha256() for _ in range(1 + 2 * len(RENAMED))]
    tied = _tied_names(model)
    for name, parameter in list(model.named_parameters()):  # a list: reading an offloaded parameter replaces its object
        if parameter.is_meta and name in tied:
            continue  # a tied parameter was hashed once
        stride = max(1, parameter.numel() // SAMPLES_PER_PARAMETER)
        sample = values_of(model, name, parameter).flatten()[::stride]
        data = sample.to(device="cpu", dtype=torch.float32).numpy().tobytes()
        for digest, known_as in zip(weights, _names(name), strict=True):
            digest.update(f"{known_as} {tuple(parameter.shape)}\n".encode())
            digest.update(data)
    return {
        "config_sha256": frozenset({hashlib.sha256(canonical.encode()).hexdigest()}),
        "weights_sha256": frozenset(digest.hexdigest() for digest in weights),
    }


def _names(name: str) -> list[str]:
    """The name of a parameter today, and in each version of transformers that named it otherwise."""
    pairs = [pair for one, other in RENAMED for pair in ((one, other), (other, one))]
    return [name, *(name.removesuffix(one) + other if name.endswith(one) else name for one, other in pairs)]


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that says what is computed: without names, versions, dtypes and token ids, at any depth."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_ARCHITECTURE
    }


def _tied_names(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers declares as tied to another parameter."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for name in module.all_tied_weights_keys
    }
