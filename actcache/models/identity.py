"""What a language model is, apart from where it lies: hashes of its architecture and of its weights."""

import hashlib
import json
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from actcache.errors import ModelError

SAMPLES_PER_PARAMETER = 64
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)


def model_identity(model: PreTrainedModel, name: str, revision: str | None) -> dict[str, str | None]:
    """{"name", "revision", "config_sha256", "weights_sha256"}: names as given, hashes of what is computed with what."""
    config = _architecture(model.config.to_diff_dict())
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return {
        "name": name,
        "revision": revision,
        "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "weights_sha256": weights_sha256(model),
    }


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config, nested configs too, that says what is computed: no names, versions, dtypes, token ids."""
    kept = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    return {key: _architecture(value) if isinstance(value, dict) else value for key, value in kept.items()}


def weights_sha256(model: nn.Module) -> str:
    """Hash of the name, the shape and 64 to 127 evenly strided elements (as float32) of every parameter.

    Equal for the same weights loaded in the same dtype, on any device, spread over several or offloaded. It tells other
    checkpoints, training steps, dtypes, quantisations and adapters apart. It does not see a change confined to elements
    between the samples, nor buffers.

    Raises:
        ModelError: a parameter is on the "meta" device and nothing knows its values.
    """
    digest = hashlib.sha256()
    tied = _tied_names(model)
    for name, parameter in list(model.named_parameters()):  # reading an offloaded one puts a new object in its place
        if parameter.is_meta and name in tied:
            continue  # once it has been read or run, accelerate no longer shows it as the one that it is tied to
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        stride = max(1, parameter.numel() // SAMPLES_PER_PARAMETER)
        sample = _values(model, name, parameter).flatten()[::stride]
        digest.update(sample.to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _values(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """The parameter, detached; fetched from where accelerate has offloaded it, host memory or disk, if it has."""
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
    """Names of the parameters that are tied to another one, as transformers declares them."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for name in module.all_tied_weights_keys
    }
