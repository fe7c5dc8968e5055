"""The parts of `load_model`: config, tokenizer, weights and dtype, each checked. Errors are one line long."""

import copy
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from actcache.arguments import can_only_be_a_path, local_path, missing_here, refuse_address
from actcache.errors import ConfigError, ManifestError, ModelError
from actcache.files import contents, file_bytes, is_allowed, listed
from actcache.models.model_files import (
    ADAPTER,
    adapter_refused,
    check_config,
    check_counts,
    check_sizes,
    check_weight_names,
    commit_here,
    faulty_json,
    pickle_refused,
    refuse_adapter,
    snapshot_of,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json"}  # no name on the hub ends in one of them
_LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, EOFError),
    *(UnpicklingError, SafetensorError, StrictDataclassError),
)
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError)  # what a malformed index raises
MOST_REASON = 400  # letters of an error of others
CONVERSION_OFF = "DISABLE_SAFETENSORS_CONVERSION"  # a variable of transformers
TOKENIZER_WRONG = "a file of its tokenizer holds what it may not"
MODEL_WRONG = "config.json or the weights hold what they may not"
TOKENIZER_FILE = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|tekken|.*\.(model|tiktoken)$")
WHOLE_MODEL = "check the name or pass a directory with a whole model"


def source_of(name_or_path: str) -> str:
    """The hub name, or the path of the directory.

    Raises ConfigError for an address. Raises ModelError for no name, and for a directory that is missing, has no
    config.json or has an adapter.
    """
    if not name_or_path:  # the path "" is this folder
        raise ModelError(
            "load_model: a model must be named, got ''; pass a directory with a model, or a hub name owner/model"
        )
    refuse_address(name_or_path, "a directory or a hub name owner/model")
    path = local_path(name_or_path)
    if path.is_dir():
        refuse_adapter(str(path), None)
        if not (path / "config.json").is_file():
            raise ModelError(f"load_model: {path} has no config.json; pass a directory with config, weights, tokenizer")
        return str(path)
    if can_only_be_a_path(name_or_path, FILE_SUFFIXES):
        raise ModelError(f"load_model: no directory {path}; pass a directory with a model, or a hub name owner/model")
    return name_or_path


def name_of(source: str) -> str:
    """The hub name as given, or the last part of a directory's path: the rest would tell about this machine."""
    return Path(source).resolve().name if os.path.isdir(source) else source


def commit_of(source: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """The commit that a revision of a hub name is, because a branch moves; of a directory, the revision as given.

    If config.json is here, it is the commit of that. All files of a model are then loaded from this commit: some may be
    here, while the branch has moved on.

    Args:
        source, revision, trust_remote_code: as for `load_weights`.

    Raises:
        ModelError: config.json is neither here nor on the hub, or there is an adapter.
    """
    commit = commit_here(source, revision)
    if commit is None and not os.path.isdir(source):
        try:
            _loaded(PretrainedConfig.get_config_dict, source, revision, trust_remote_code)  # fetches it
        except ModelError:
            if adapter := _first_file(source, revision, [ADAPTER], here=False):
                raise adapter_refused(source, adapter) from None
            raise
        commit = commit_here(source, revision)
    refuse_adapter(source, commit)
    return commit or revision


def dtype_of(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype of that name. "auto" is float32 on a CPU; elsewhere it stays "auto", the checkpoint's own dtype.

    Raises ConfigError for an unknown name.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ConfigError(f"load_model: dtype must be auto or one of {list(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load_config(
    source: str, revision: str | None, trust_remote_code: bool, attention: str = "auto"
) -> PretrainedConfig:
    """The config of a model.

    Args:
        source, revision, trust_remote_code: as for `load_weights`.
        attention: the attention kernel that the caller asks for; "auto" leaves it to the config.

    Raises:
        ModelError: it is missing, damaged or of an unknown type, brings code that is not trusted, or names code that
            transformers would fetch.
    """
    check_sizes(source)
    values, _ = _loaded(PretrainedConfig.get_config_dict, source, revision, trust_remote_code)
    check_counts(values, name_of(source))
    config = _loaded(AutoConfig.from_pretrained, source, revision, trust_remote_code)
    check_config(config, name_of(source), attention)
    return config


def load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if it brings no vocabulary, for which transformers may make an empty tokenizer.

    Raises ModelError if it is damaged, or brings code that is not trusted.
    """
    try:
        tokenizer = _loaded(AutoTokenizer.from_pretrained, source, revision, trust_remote_code, TOKENIZER_WRONG)
    except ModelError:
        folder = snapshot_of(source, revision)
        if folder is None or any(TOKENIZER_FILE.match(path.name) for path in listed(folder)):
            raise
        return None
    return tokenizer if {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens} else None


def capping_kernel(kernel: str, config: PretrainedConfig, name: str) -> str:
    """The attention kernel, or "eager" in the place of "auto" for a model that caps its attention logits (Gemma 2).

    Older versions of transformers take sdpa for it, which leaves the cap out.

    Args:
        kernel: as asked for.
        config: of the model.
        name: the model's, for messages.

    Raises:
        ModelError: sdpa is asked for by name.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        return kernel
    if kernel == "sdpa":
        raise ModelError(f"load_model: {name} caps its attention logits, which sdpa does not; pass --attention eager")
    return "eager" if kernel == "auto" else kernel


def check_flash_attention(device: torch.device, dtype: torch.dtype | str, config: PretrainedConfig) -> None:
    """Raise ModelError if flash attention cannot run.

    Without this, transformers would fail in the first forward pass.
    """
    loaded_as = config.dtype if dtype == "auto" else dtype
    if device.type != "cuda" or loaded_as not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"load_model: flash_attention_2 needs a CUDA device and bfloat16 or float16, got {device} and "
            f"{str(loaded_as).removeprefix('torch.')}; pass --attention auto, or --device cuda --model-dtype bfloat16"
        )
    if find_spec("flash_attn") is None:  # transformers would fetch a compiled kernel from the hub, if it can
        raise ModelError(
            "load_model: flash_attention_2 needs the package flash_attn, which is not installed; install it, or pass "
            "--attention auto"
        )


def weights_bytes(
    source: str, revision: str | None, config: PretrainedConfig, dtype: torch.dtype | str, *, allow_pickle: bool
) -> int:
    """How many bytes the weights take in memory as `dtype`; 0 if that cannot be told.

    What there is beside them, such as a second copy in another layout, is not loaded and does not count. Of a hub name,
    what tells it is fetched if no weights are here: the index, or the weights themselves if one file holds them.
    """
    with _quiet():
        names = (
            SAFE_WEIGHTS_NAME,
            SAFE_WEIGHTS_INDEX_NAME,
            *((WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if allow_pickle else ()),
        )
        path = _first_file(source, revision, names, here=True) or _first_file(source, revision, names, here=False)
    try:
        if path is None:
            stored = 0
        elif path.suffix == ".json":
            stored = min(sys.maxsize, int(json.loads(contents(local_path(path)))["metadata"]["total_size"]))
        else:
            stored = file_bytes(local_path(path)) or 0  # the hub's files are links
    except (OSError, ManifestError, *_MALFORMED):  # transformers says what is wrong
        stored = 0
    return stored * _held(config, dtype).itemsize // _held(config, "auto").itemsize


def _held(config: PretrainedConfig, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of the parameters in memory; "auto" is the checkpoint's own."""
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return own if isinstance(dtype, str) else dtype


def missing_bytes(
    source: str, revision: str | None, config: PretrainedConfig, dtype: torch.dtype | str, n_stored: int
) -> int:
    """How many bytes more the parameters take that a config asks for than the stored weights do, at least 0.

    transformers makes those that are missing, or of another shape, before it says so.

    Args:
        source, revision, config, dtype: as for `load_weights`.
        n_stored: what `weights_bytes` gives.

    Raises:
        ModelError: no model can be made by this config.
    """

    def made(_: str, **settings: object) -> nn.Module:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")

    model = _loaded(made, source, revision, False, MODEL_WRONG)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return max(0, n_parameters * _held(config, dtype).itemsize - n_stored)


def _first_file(source: str, revision: str | None, names: Iterable[str], *, here: bool) -> Path | None:
    """The first of these files that a model has. here: ask no network."""
    for name in names:
        with suppress(OSError):
            return Path(cast(str, cached_file(source, name, revision=revision, local_files_only=here)))
    return None


def load_weights(
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    *,
    config: PretrainedConfig,
    name: str,
    dtype: torch.dtype | str,
    kernel: str,
    device_map: str | None,
    allow_pickle: bool,
) -> PreTrainedModel:
    """The transformers model with all its weights, on the CPU or where the device map puts it.

    Args:
        source: a hub name or a directory.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the model run code that it brings.
        config: of the model, as `load_config` gives it.
        name: the model's name, for messages.
        dtype: of the parameters; "auto" is the checkpoint's.
        kernel: the attention kernel; "auto" leaves it to transformers.
        device_map: as for `load_model`.
        allow_pickle: take a pickle if there are no safetensors. Only tensors of it are read.

    Raises:
        ModelError: the weights are missing, incomplete or damaged, or a pickle that is not allowed, or the kernel is
            not available.
    """
    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    settings["use_safetensors"] = None if allow_pickle else True
    if kernel != "auto":
        settings["attn_implementation"] = kernel
    if device_map is not None:
        settings["device_map"] = device_map
    if not allow_pickle:
        check_weight_names(source, revision, config)
    way_out = WHOLE_MODEL if kernel in ("auto", "eager") else f"pass --attention auto, or {WHOLE_MODEL}"
    with _quiet():
        model, report = _loaded(
            AutoModelForCausalLM.from_pretrained, source, revision, trust_remote_code, MODEL_WRONG, way_out, **settings
        )
    if not allow_pickle:
        check_weight_names(source, revision, model.config)  # those that have come from the hub meanwhile
    return _complete(model, report, name)


def _loaded(
    from_pretrained: Callable[..., Any],
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    part: str = "config.json holds what it may not",
    way_out: str = WHOLE_MODEL,
    **settings: object,
) -> Any:
    """What `from_pretrained(source)` gives, from local files if they are there, else from the hub.

    Args:
        from_pretrained: a loader of transformers.
        source, revision, trust_remote_code: as for `load_weights`.
        part: what is wrong if the error is of a kind that says little, for the message.
        way_out: the end of the message if loading fails.
        settings: more arguments of the loader.

    Raises:
        ModelError: loading fails, whatever is raised: files of a stranger raise errors of any kind.
        MemoryError: there is too little memory.
    """
    # said even where it is False: if nobody says it, transformers asks the terminal
    settings |= {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        with _no_conversion():
            try:
                return from_pretrained(source, local_files_only=True, **settings)
            except Exception:  # of a tokenizer that is not here it is a ValueError
                if os.path.isdir(source):
                    raise
                return from_pretrained(source, **settings)
    except MemoryError:
        raise
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):  # the message names the argument to pass
            raise ModelError(
                f"load_model: {source!r} brings code of its own, which must run to load it, and was not run; read that "
                "code, then pass --trust-remote-code (in Python trust_remote_code=True)"
            ) from None
        if settings.get("use_safetensors") and "safetensors`" in str(error):  # so says transformers of a hub's pickle
            raise pickle_refused(source) from None
        at = "" if revision is None else f" at revision {revision}"
        at_hub = "" if os.path.isdir(source) else missing_here(source)
        reason = _reason(error, "" if trust_remote_code else part, source, revision)
        raise ModelError(f"load_model: cannot load {source!r}{at}: {at_hub}{reason}; {way_out}") from None


def _reason(error: Exception, part: str, source: str, revision: str | None) -> str:
    """Why a model cannot be loaded, in at most MOST_REASON letters of one line.

    part: as of `_loaded`; "" for an error of a model's own code, which says what it likes.
    """
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):  # torch advises to load it unrestricted
        return "its weights are a pickle that holds more than tensors, and could run any code"
    if (closed := _closed_file(source)) is not None:  # safetensors says that there is no such file
        return f"this user may not read {closed}"
    folder = snapshot_of(source, revision)
    if folder is not None and (fault := faulty_json(folder)) is not None:
        return fault
    line = next(iter(str(error).strip().splitlines()), "").rstrip(":.")
    if part and not isinstance(error, _LOADING_ERRORS):  # its words, such as 'added_tokens', say little
        line = f"{part}, {type(error).__name__}: {line}"
    return line[:MOST_REASON] or type(error).__name__


@contextmanager
def _no_conversion() -> Iterator[None]:
    """Inside the `with`, transformers asks nobody on the hub to convert a pickle."""
    before = os.environ.get(CONVERSION_OFF)
    os.environ[CONVERSION_OFF] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CONVERSION_OFF]
        else:
            os.environ[CONVERSION_OFF] = before


def _closed_file(source: str) -> Path | None:
    """A file of a local directory that this user may not read, if there is one."""
    files = sorted(Path(source).iterdir()) if os.path.isdir(source) else []
    return next((file for file in files if not is_allowed(file, os.R_OK)), None)


def _complete(model: PreTrainedModel, report: dict[str, Any], name: str) -> PreTrainedModel:
    """The model, or its base if the checkpoint has no head. Raises ModelError if any other weight is missing."""
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
    """Inside the `with`, transformers shows no progress bar and no load report.

    This module checks that report itself.
    """
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()
