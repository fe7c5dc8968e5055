"""What the files of a model may say, for they may be a stranger's: no code is fetched, no pickle is read unasked."""

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from actcache.arguments import local_path, shown
from actcache.errors import ManifestError, ModelError
from actcache.files import MOST_BYTES, NoFile, contents, file_bytes, is_file, listed

READ_WHOLE = (".json", ".jinja", ".txt", ".model")  # the files of config and tokenizer
SAFE = ".safetensors"
ADAPTER = "adapter_config.json"
COMMIT = re.compile("[0-9a-f]{40}")
GET_AGAIN = "get the model again"
MOST_OF = {re.compile(r"(num|n)_.*(layers?|experts?)|n_layer"): 2_000, re.compile(r"num_labels"): 50_000}
# of transformers and torch alone; all others are, or are replaced by, packages of the hub
ATTENTION_OF_CONFIG = ("eager", "sdpa", "flex_attention")
EXPERTS_OF_CONFIG = ("eager", "batched_mm", "grouped_mm")
# each by a package that the user has installed; transformers would fetch kernels from the hub for the others
QUANTISED_BY = (
    *("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "awq", "auto-round", "hqq", "quanto"),
    *("torchao", "compressed-tensors"),
)


def pickle_refused(source: str) -> ModelError:
    """The error of weights that are a pickle, or are not there as safetensors."""
    return ModelError(
        f"load_model: {source!r} must hold its weights as safetensors, and does not; if they are a pickle, save them "
        "again by save_pretrained of transformers, or pass --allow-pickle (in Python allow_pickle=True)"
    )


def adapter_refused(source: str, path: Path) -> ModelError:
    """The error of a folder or a hub name that holds an adapter. path: of its adapter_config.json.

    transformers would load the base model, wherever the adapter says that it is, if peft is installed; without peft it
    leaves the adapter out.
    """
    try:
        base = json.loads(contents(local_path(path))).get("base_model_name_or_path")
    except (OSError, ManifestError, AttributeError, ValueError, RecursionError):
        base = None
    return ModelError(
        f"load_model: {source!r} holds an adapter of {shown(base) if base else 'another model'}, not a whole model; "
        "pass that model, and the adapter as --adapter (in Python adapter=)"
    )


def refuse_adapter(source: str, revision: str | None) -> None:
    """Raise ModelError if a model that is on this machine has an adapter beside it, or is nothing but one.

    source, revision: as for `load_weights`.
    """
    path = Path(source) / ADAPTER if os.path.isdir(source) else _here(source, revision, ADAPTER)
    if path is not None and is_file(local_path(path)):
        raise adapter_refused(source, path)


def check_sizes(source: str) -> None:
    """Raise ModelError if a file of a local directory is too large that is read as a whole."""
    for path in listed(Path(source)) if os.path.isdir(source) else ():
        n_bytes = (file_bytes(local_path(path)) or 0) if path.suffix in READ_WHOLE else 0
        if n_bytes > MOST_BYTES:
            raise ModelError(
                f"load_model: {path} must have at most {MOST_BYTES:,} bytes, has {n_bytes:,}; get the model again"
            )


def faulty_json(folder: Path) -> str | None:
    """What is wrong with the first JSON file of a folder that holds no JSON object; None if all do."""
    for path in listed(folder):
        if path.suffix != ".json":
            continue
        try:
            if not isinstance(json.loads(contents(local_path(path))), dict):
                return f"{path} must hold a JSON object, holds another value"
        except NoFile:
            return f"{path} is no regular file"
        except RecursionError:
            return f"{path} is nested too deep"
        except ValueError as error:
            return f"{path} is damaged: {str(error).partition(';')[0]}"
    return None


def check_counts(values: object, name: str) -> None:
    """Raise ModelError if a config asks for more layers, experts or labels than any model has: each takes time.

    Args:
        values: what config.json holds.
        name: the model's, for messages.
    """
    for key, value in values.items() if isinstance(values, dict) else ():
        for pattern, most in MOST_OF.items():
            if isinstance(value, int) and value > most and pattern.fullmatch(str(key)):
                must = f"{key} must be at most {most:,}, got {shown(value)}"
                raise ModelError(f"load_model: config.json of {name}: {must}; {GET_AGAIN}")
        check_counts(value, name)


def snapshot_of(source: str, revision: str | None) -> Path | None:
    """The folder on this machine that holds the files of a model, if there is one."""
    config = _here(source, revision, "config.json")
    return Path(source) if os.path.isdir(source) else None if config is None else config.parent


def commit_here(source: str, revision: str | None) -> str | None:
    """The commit of a hub name whose config.json this machine holds for a revision; None if there is none.

    The cache of the hub keeps the files of each commit in a folder of that name.
    """
    folder = None if os.path.isdir(source) else snapshot_of(source, revision)
    return None if folder is None or not COMMIT.fullmatch(folder.name) else folder.name


def check_config(config: PretrainedConfig, name: str, attention: str) -> None:
    """Refuse a config that makes transformers fetch code, or that hides its own methods.

    Args:
        config: as transformers has read it.
        name: the model's, for messages.
        attention: the kernel that the caller asks for; "auto" leaves it to the config.

    Raises:
        ModelError: a field is not one of those that are allowed.
    """
    for part in _parts(config):
        fields = vars(part)
        hidden = [key for key in fields if callable(getattr(type(part), key, None)) and not callable(fields[key])]
        if hidden:
            raise ModelError(f"load_model: config.json of {name} must have no field {hidden[0]!r}; {GET_AGAIN}")
        if not isinstance(part.get_text_config(), PretrainedConfig):
            raise ModelError(
                f"load_model: config.json of {name}: the config of its text must be an object; {GET_AGAIN}"
            )
        if attention == "auto":
            flash = ("flash_attention_2",) if find_spec("flash_attn") else ()
            allowed = (*ATTENTION_OF_CONFIG, *flash)
            _check_word(name, "attn_implementation", fields.get("_attn_implementation_internal"), allowed)
        _check_word(name, "experts_implementation", fields.get("_experts_implementation_internal"), EXPERTS_OF_CONFIG)
        quantised = fields.get("quantization_config")
        if isinstance(quantised, dict):
            _check_word(name, "quant_method", quantised.get("quant_method"), QUANTISED_BY)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those inside it, such as those of the text and of the pictures."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _check_word(name: str, field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        way_out = (
            "pass --attention sdpa or eager" if field == "attn_implementation" else "get another copy of the model"
        )
        raise ModelError(
            f"load_model: config.json of {name}: {field} must be one of {', '.join(allowed)}, got {shown(value)}, "
            f"and nothing that transformers would fetch code for; {way_out}"
        )


def check_weight_names(source: str, revision: str | None, config: PretrainedConfig) -> None:
    """Raise ModelError unless all weights are safetensors, as far as they are on this machine.

    Without this, an index of safetensors may name a pickle, or a file elsewhere.

    Args:
        source, revision: as for `load_weights`.
        config: of the model; it may name the file of the weights.
    """
    named = getattr(config, "transformers_weights", None)
    if named is None and _here(source, revision, SAFE_WEIGHTS_NAME) is not None:
        return
    index = _here(source, revision, SAFE_WEIGHTS_INDEX_NAME)
    if named is not None:
        if not isinstance(named, str) or not named.endswith((SAFE, f"{SAFE}.index.json")):
            raise _no_safe_name("config.json", "transformers_weights", named)
        index = _here(source, revision, named) if named.endswith(".json") else None
    elif index is None and any(
        is_file(local_path(Path(source) / pickled)) for pickled in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    ):
        raise pickle_refused(source)
    for file in _files_of(index) if index else ():
        if not isinstance(file, str) or not file.endswith(SAFE) or Path(file).name != file:
            raise _no_safe_name(str(index), "weight_map", file)


def _no_safe_name(path: str, field: str, got: object) -> ModelError:
    return ModelError(
        f"load_model: {path}: {field} must name files {SAFE} of the same folder, got {shown(got)}; get the model "
        "again, or pass --allow-pickle (in Python allow_pickle=True)"
    )


def _files_of(index: Path) -> list[Any]:
    """The files that an index of weights names."""
    try:
        stored = json.loads(contents(local_path(index)))
        return [*stored["weight_map"].values()]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ModelError(f"load_model: {index} is damaged ({type(error).__name__}); get the checkpoint again") from None


def _here(source: str, revision: str | None, name: str) -> Path | None:
    """A file of a model, if it is on this machine."""
    found = cached_file(
        source,
        name,
        revision=revision or "main",
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(cast(str, found))
