"""The identity of a language model: hashes of its architecture and of its weights, wherever its files lie."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError

SAMPLES_PER_PARAMETER = 64
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)
_REMOTE_CODE = "transformers_modules."  # transformers imports the code that models bring from packages below this one


def model_identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, revision: str | None
) -> dict[str, str | None]:
    """{"name", "revision", "config_sha256", "weights_sha256"} of a loaded model; name and revision are as given.

    "code_sha256" is there too if the model or its tokenizer runs Python code that it brought.
    """
    config = _architecture(model.config.to_diff_dict())
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    code = code_sha256([tokenizer, model.config, *model.modules()])
    return {
        "name": name,
        "revision": revision,
        "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "weights_sha256": weights_sha256(model),
        **({"code_sha256": code} if code else {}),
    }


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that says what is computed: without names, versions, dtypes and token ids, at any depth."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_ARCHITECTURE
    }


def weights_sha256(model: nn.Module) -> str:
    """sha256 of the name, the shape and 64 to 127 evenly strided elements (as float32) of every parameter.

    The same weights in the same dtype have the same hash on any device, spread over several devices or offloaded. Other
    checkpoints, training steps, dtypes, quantisations and adapters have other hashes. A change of elements between the
    samples, or of a buffer, does not change the hash.

    Raises:
        ModelError: a parameter is on the "meta" device and its values are nowhere.
    """
    digest = hashlib.sha256()
    tied = _tied_names(model)
    for name, parameter in list(model.named_parameters()):  # a list: reading an offloaded parameter replaces its object
        if parameter.is_meta and name in tied:
            continue  # a tied parameter is hashed once; accelerate separates offloaded ones when they are read
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        stride = max(1, parameter.numel() // SAMPLES_PER_PARAMETER)
        sample = _values(model, name, parameter).flatten()[::stride]
        digest.update(sample.to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()


def code_sha256(parts: Iterable[object]) -> str | None:
    """sha256 of the Python files that a model brought, as they were imported; None if it runs none.

    parts: the tokenizer, the config and the modules of the model.
    """
    homes = {type(part).__module__.rpartition(".")[0] for part in parts}
    folders = tuple(f"{home}." for home in homes if home.startswith(_REMOTE_CODE))
    files = [str(module.__file__) for name, module in list(sys.modules.items()) if name.startswith(folders)]
    if not files:
        return None
    digest = hashlib.sha256()
    for code in sorted(Path(file).read_bytes() for file in files):
        digest.update(hashlib.sha256(code).digest())
    return digest.hexdigest()


def _values(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """The detached values of a parameter. If accelerate has offloaded them to host memory or disk, they are fetched."""
    if not parameter.is_meta:
        return parameter.detach()
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        values = module.get_parameter(leaf).detach()
    if values.is_meta:
        raise ModelError(f"weights_sha256: {name} must have values, is on the meta device; load the weights first")
    return values


def _tied_names(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers declares as tied to another parameter."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for name in module.all_tied_weights_keys
    }
