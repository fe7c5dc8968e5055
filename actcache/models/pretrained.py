"""Load a transformers model and its tokenizer from a directory or the hub, whole, or say in one line why not."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actcache.errors import ConfigError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE_MODEL = "check the name or pass a directory with a whole model"


def source_of(name_or_path: str) -> str:
    """The name or path, if it can be one. Raises ModelError for a directory that is absent or has no config.json."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"load_model: {path} has no config.json; pass a directory with config, weights, tokenizer")
        return str(path)
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelError(f"load_model: no directory {path}; pass a directory with a model, or a hub name owner/model")
    return name_or_path


def name_of(source: str) -> str:
    """A hub name as given; of a local directory its own name, so that it says nothing about this machine."""
    return Path(source).resolve().name if os.path.isdir(source) else source


def revision_of(config: PretrainedConfig, revision: str | None) -> str | None:
    """The commit if the hub told it (a branch moves), else as given."""
    return getattr(config, "_commit_hash", None) or revision  # there only when it came from the hub


def device_of(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"load_model: device must be auto or a torch device such as cuda:0, got {device!r}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"load_model: device {device!r} asked for, torch sees no CUDA device; pass auto or cpu")
    return where


def dtype_of(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ConfigError(f"load_model: dtype must be auto or one of {list(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load_config(source: str, revision: str | None) -> PretrainedConfig:
    """Raises ModelError if there is none, or it is damaged or of an unknown type."""
    return _loaded(AutoConfig.from_pretrained, source, revision)


def load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Raises ModelError if there is none, or it is damaged."""
    return _loaded(AutoTokenizer.from_pretrained, source, revision)


def check_flash_attention(device: torch.device, dtype: torch.dtype | str, config: PretrainedConfig) -> None:
    """Raise ModelError where flash attention cannot run; transformers would find out in the forward pass."""
    loaded_as = config.dtype if dtype == "auto" else dtype
    if device.type != "cuda" or loaded_as not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"load_model: flash_attention_2 needs a CUDA device and bfloat16 or float16, got {device} and "
            f"{str(loaded_as).removeprefix('torch.')}; pass --attention auto, or --device cuda --model-dtype bfloat16"
        )


def load_weights(
    source: str, revision: str | None, name: str, dtype: torch.dtype | str, kernel: str, device_map: str | None
) -> PreTrainedModel:
    """The transformers model with its weights, whole and checked; on the CPU, or where the device map puts it."""
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if kernel != "auto":
        settings["attn_implementation"] = kernel
    if device_map is not None:
        settings["device_map"] = device_map
    way_out = WHOLE_MODEL if kernel in ("auto", "eager") else f"pass --attention auto, or {WHOLE_MODEL}"
    with _quiet():
        model, report = _loaded(AutoModelForCausalLM.from_pretrained, source, revision, way_out, **settings)
    return _complete(model, report, name)


def _loaded(
    from_pretrained: Callable[..., Any],
    source: str,
    revision: str | None,
    way_out: str = WHOLE_MODEL,
    **settings: object,
) -> Any:
    """`from_pretrained(source)`, from local files if they are there. Raises ModelError, one line, if it fails."""
    try:
        try:
            return from_pretrained(source, revision=revision or "main", local_files_only=True, **settings)
        except OSError:
            if os.path.isdir(source):
                raise
            return from_pretrained(source, revision=revision or "main", **settings)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        at = "" if revision is None else f" at revision {revision}"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"load_model: cannot load {source!r}{at}: {lines[0].rstrip(':.')}; {way_out}") from None


def _complete(model: PreTrainedModel, report: dict[str, Any], name: str) -> PreTrainedModel:
    """The model, without its head if the checkpoint lacks one. Raises ModelError for any other hole in the weights."""
    inside = {key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")}
    wrong = sorted(inside | {key for key, *_ in report["mismatched_keys"]})
    if wrong:
        raise ModelError(
            f"load_model: {name} must hold every parameter in the shape that its config.json says; {len(wrong)} are "
            f"missing or of another shape, such as {wrong[0]}; get the checkpoint again"
        )
    return cast(PreTrainedModel, model.base_model) if report["missing_keys"] else model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load reports of transformers meanwhile; what they say is checked or raised here."""
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()
