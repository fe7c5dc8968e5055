"""The identity of a language model: its architecture, and a hash of all that its forward pass uses.

No name of a parameter, of a library's version or of a folder is part of it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.arguments import shown
from actcache.models.names import same_name
from actcache.models.stored_values import used_state, values_of

CONTENT = "content_sha256"
HASHED_AT_ONCE = 4
# names and versions; the sizes of a dtype and what is tied, which the weights tell; token ids; training; other tasks
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "auto_map", "_attn_implementation"}
    | {"dtype", "torch_dtype", "tie_word_embeddings", "use_cache", "cache_implementation", "is_decoder"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "gradient_checkpointing"}
    | {"id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "return_dict"}
    | {"output_hidden_states", "output_attentions"}
)
_TRAINING = ("dropout", "pdrop", "summary_")  # in the middle of keys that do nothing in evaluation mode
_REMOTE_CODE = "transformers_modules."  # transformers imports the code that models bring from packages below this one


def model_identity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, name: str, revision: str | None
) -> dict[str, Any]:
    """{"name", "revision", "config", "content_sha256"} of a loaded model; name and revision are as given.

    "config" holds the keys of the config that say what is computed, as JSON values. "code_sha256" is there too if the
    model or its tokenizer runs Python code that it brought.

    Raises:
        ModelError: a parameter is on the "meta" device and its values are nowhere.
    """
    whole = cast(PreTrainedModel, model).config  # or that which an adapter's wrapper passes on
    config = _architecture(whole.to_diff_dict())
    code = code_sha256([tokenizer, whole, *model.modules()])
    return {
        "name": name,
        "revision": revision,
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        CONTENT: content_sha256(model),
        **({"code_sha256": code} if code else {}),
    }


def content_sha256(model: nn.Module) -> str:
    """sha256 of the dtype, the shape and the bytes of all that a forward pass may use (see `used_state`).

    Names do not count: a tensor is known by the numbers in its path, such as that of its block, and by its content. The
    same weights in the same dtype have the same hash on any device, spread over several devices or offloaded. Two
    tensors of one block that have changed places keep the hash; what the model computes tells them apart (see
    `actcache.models.probe`).

    Raises:
        ModelError: a tensor is on the "meta" device and its values are nowhere.
    """
    return hashlib.sha256("\n".join(sorted(_digests(model))).encode()).hexdigest()


def _digests(model: nn.Module) -> Iterator[str]:
    """A line for each part that a forward pass uses: where it is, in numbers, and the sha256 of what it is."""
    shared: dict[tuple[Any, ...], Future[str]] = {}  # a tied weight is read once
    lines: list[tuple[str, Future[str]]] = []
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, os.cpu_count() or 1)) as pool:
        for name, part, is_kept in used_state(model):
            place = ".".join(step for step in name.split(".") if step.isdecimal())
            if isinstance(part, str):
                yield f"{place} {part}"
            elif part.is_meta or not is_kept:  # fetched or made one at a time
                yield f"{place} {_sha256(values_of(model, name, part))}"
            else:
                key = (part.data_ptr(), part.device, part.dtype, part.shape, part.stride())
                if not part.numel() or key not in shared:
                    shared[key] = pool.submit(_sha256, part.detach())
                lines.append((place, shared[key]))
    yield from (f"{place} {digest.result()}" for place, digest in lines)


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Another value whenever weights, buffers or active adapters may have changed.

    Of what the model keeps, nothing is read for it. What the model makes for who asks, such as the integers of a
    quantised weight, is hashed.
    """
    return [(name, *_state(value, is_kept)) for name, value, is_kept in used_state(model)]


def _state(value: Tensor | str, is_kept: bool) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if not is_kept:
        return (_sha256(value.detach()),)
    return (value.data_ptr(), None if value.is_inference() else value._version)


def identity_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two identities with a content, in words; [] if they are those of one model.

    Of the configs the keys that both have are compared: another version of transformers may know other keys.
    """
    found = [] if there[CONTENT] == here[CONTENT] else [_other("its weights are others", CONTENT, there, here)]
    found += _other_settings("config", there["config"], here["config"])
    if there.get("code_sha256") != here.get("code_sha256"):
        found.append(_other("it runs other code", "code_sha256", there, here))
    return found


def former_differences(
    there: Mapping[str, Any], here: Mapping[str, Any], former: Mapping[str, Iterable[str]]
) -> list[str]:
    """As `identity_differences`, for an identity that an older version made, or an import, which knows the name only.

    former: what `former_hashes` gives of the model that is here.
    """
    words = {"config_sha256": "its config is another", "weights_sha256": "its weights are others"}
    hashes = [key for key in words if there.get(key)]
    found = [f"{words[key]} ({key} {there[key][:12]} there)" for key in hashes if there[key] not in former[key]]
    if not hashes and not same_name(there["name"], here["name"]):
        found.append(f"its name is {shown(there['name'])} there, {shown(here['name'])} here")
    if not hashes and there.get("revision") not in (None, here["revision"]):
        found.append(f"its revision is {shown(there['revision'])} there, {shown(here['revision'])} here")
    if there.get("code_sha256") and there["code_sha256"] != here.get("code_sha256"):
        found.append(_other("it runs other code", "code_sha256", there, here))
    return found


def _other(words: str, key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return f"{words} ({key} {str(there.get(key))[:12]} there, {str(here.get(key))[:12]} here)"


def _other_settings(path: str, there: Any, here: Any) -> list[str]:
    """The settings of two configs that have other values, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        both = sorted(there.keys() & here.keys())
        return [words for key in both for words in _other_settings(f"{path}.{key}", there[key], here[key])]
    return [] if there == here else [f"{path} is {shown(there)} there, {shown(here)} here"]


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that says what is computed in evaluation mode, at any depth."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_ARCHITECTURE and not any(part in key for part in _TRAINING)
    }


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
