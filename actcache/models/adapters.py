"""LoRA adapters of peft (Hu et al. 2021, arXiv:2106.09685), put on a model that is loaded already.

Their files may be a stranger's. The base model that an adapter names is never loaded: who uses it names that one. The
weights tell which modules are adapted, for in its config they may be a regular expression. Of the config only what is
plain LoRA is taken, for peft imports what other keys name.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from actcache.arguments import local_path, missing_here, shown
from actcache.errors import ManifestError, ModelError
from actcache.files import contents, file_bytes, is_file
from actcache.machine.limits import require_memory
from actcache.models.model_files import ADAPTER

WEIGHTS = "adapter_model.safetensors"
_TAKEN = {
    **{"r": int, "lora_alpha": int | float, "bias": str, "modules_to_save": list | None},
    **{"rank_pattern": dict | None, "alpha_pattern": dict | None},
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"), bool),
}
_OF_TRAINING = {  # or of where the adapter comes from, or told by the weights
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("auto_mapping", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # used only with other keys, which are refused
}
_ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_(?:A\.weight|embedding_A)")
_MODULES = re.compile(r"\^?[\w.]+\$?")  # of rank_pattern; peft takes them as regular expressions
_MERGE = "merge it into its model by peft (merge_and_unload), save the result by save_pretrained, and pass that folder"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is on this machine.

    Attributes:
        source: its hub name, or the absolute path of its folder.
        revision: the commit on the hub; None for a folder.
        folder: where its files are.
    """

    source: str
    revision: str | None
    folder: Path

    @property
    def name(self) -> str:
        """The hub name, or the last part of the path."""
        return self.source if self.revision else self.folder.name


def find_adapter(source: str, revision: str | None = None) -> Adapter:
    """The adapter of a folder, or of a hub name, of which the files are fetched if they are not here.

    Raises:
        ModelError: peft is not installed; there is no adapter; or its weights are no safetensors.
    """
    if find_spec("peft") is None:
        raise ModelError("load_model: an adapter needs peft, which is not installed; pip install 'actcache[peft]'")
    path = local_path(source)
    if path.is_dir():
        found = Adapter(str(path), None, path)
    else:
        folder = _snapshot(source, revision)
        found = Adapter(source, folder.name, folder)
    for name in (ADAPTER, WEIGHTS):
        if not is_file(local_path(found.folder / name)):
            raise ModelError(
                f"load_model: the adapter {source!r} must hold {name}, and does not; pass a folder or a hub name to "
                "which save_pretrained of peft has written"
            )
    return found


def _snapshot(source: str, revision: str | None) -> Path:
    """The folder of one commit of a hub name, with what there is of the files of an adapter."""
    try:
        try:
            here = Path(snapshot_download(source, revision=revision, local_files_only=True))
            if (here / WEIGHTS).exists():
                return here
        except OSError:
            pass
        return Path(snapshot_download(source, revision=revision, allow_patterns=[ADAPTER, WEIGHTS]))
    except (OSError, ValueError) as error:  # ValueError: no name of the hub
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"load_model: cannot load the adapter {source!r}: {missing_here(source)}{said.rstrip('.:')}; pass a folder "
            "with an adapter, or its hub name owner/adapter"
        ) from None


def adapted(model: PreTrainedModel, adapter: Adapter, name: str) -> nn.Module:
    """The model with the adapter beside its weights, as `PeftModel.from_pretrained` gives it, in evaluation mode.

    Args:
        model: loaded and in evaluation mode; its modules are wrapped in place.
        adapter: as `find_adapter` gives it.
        name: the model's name, for messages.

    Raises:
        ModelError: the adapter is no plain LoRA, is damaged, or does not fit the model.
        MemoryError: it takes more memory than there is.
    """
    from peft import LoraConfig, PeftModel

    weights = local_path(adapter.folder / WEIGHTS)
    require_memory(file_bytes(weights) or 0, f"the adapter {adapter.source}")
    config = LoraConfig(**_settings(adapter), target_modules=_modules(adapter, weights), inference_mode=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is checked below
            # on the meta device: no number of the config is asked to be memory
            whole = PeftModel(model, config, low_cpu_mem_usage=True)
            report = whole.load_adapter(
                str(adapter.folder), "default", torch_device="cpu", low_cpu_mem_usage=True, is_trainable=False
            )
    except MemoryError:
        raise
    except Exception as error:  # files of a stranger raise errors of any kind
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise _fault(adapter, f"does not fit {name}: {said}") from None
    lost = [key for key in report.missing_keys if _is_of_adapter(key)]
    wrong = sorted([*lost, *report.unexpected_keys])
    if wrong:
        raise _fault(adapter, f"does not fit {name}: {len(wrong)} weights are missing or too many, such as {wrong[0]}")
    for path, parameter in whole.named_parameters():
        if _is_of_adapter(path):  # of the mapped file, where its place would decide the last bits of a product
            parameter.data = parameter.data.clone()
    return whole.eval()


def _is_of_adapter(path: str) -> bool:
    return ".lora_" in path or ".modules_to_save." in path


def _settings(adapter: Adapter) -> dict[str, Any]:
    """The arguments of LoraConfig, of an adapter's config."""
    try:
        values = json.loads(contents(local_path(adapter.folder / ADAPTER)))
        kind = values.get("peft_type")
    except (OSError, ManifestError, ValueError, AttributeError, RecursionError) as error:
        raise _fault(adapter, f"has an {ADAPTER} that cannot be read ({type(error).__name__})") from None
    if kind != "LORA":
        raise _fault(adapter, f"must be of LoRA, is of {shown(kind)}", _MERGE)
    strange = [key for key, value in values.items() if value and key not in {*_TAKEN, *_OF_TRAINING}]
    if strange:
        raise _fault(adapter, f"must be plain LoRA, has {shown(strange[0])}", _MERGE)
    settings = {key: values[key] for key in _TAKEN if key in values}
    wrong = [key for key, value in settings.items() if not isinstance(value, cast(Any, _TAKEN[key]))]
    patterns = [each for key in ("rank_pattern", "alpha_pattern") for each in (settings.get(key) or {})]
    if wrong or not all(_MODULES.fullmatch(each) for each in patterns):
        raise _fault(adapter, f"has an {ADAPTER} that is malformed: {wrong[0] if wrong else 'the names of a pattern'}")
    return settings


def _modules(adapter: Adapter, weights: Path) -> list[str]:
    """The paths of the modules that have low-rank weights."""
    try:
        with safe_open(os.fspath(weights), "pt") as file:
            found = sorted({match[1] for key in file.keys() if (match := _ADAPTED.fullmatch(key))})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _fault(adapter, f"has a {WEIGHTS} that cannot be read: {error}") from None
    if not found:
        raise _fault(adapter, f"has no LoRA weights in its {WEIGHTS}")
    return found


def _fault(adapter: Adapter, what: str, way_out: str = "get it again, or pass the model that it adapts") -> ModelError:
    return ModelError(f"load_model: the adapter {adapter.source!r} {what}; {way_out}")
