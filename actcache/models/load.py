"""`load_model` and `wrap_model`: a LanguageModel from a name or folder, or from a model that is loaded already.

Hook names are TransformerLens': `blocks.{L}.hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`,
`hook_resid_post`. HuggingFaceModel takes these from the transformers module itself (fast, eight families). BridgeModel
takes them, and every other hook, from TransformerLens' TransformerBridge (slower, many families).

Neither changes the model: weights are not folded, centred or converted.
"""

from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.arguments import device_of, one_of, typed
from actcache.errors import ConfigError, ModelError
from actcache.machine.installs import no_installs
from actcache.machine.limits import require_memory
from actcache.models.adapters import adapted, find_adapter
from actcache.models.bridge import BridgeModel
from actcache.models.families import family_of
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.identity import model_identity
from actcache.models.language_model import LanguageModel
from actcache.models.pretrained import (
    capping_kernel,
    check_flash_attention,
    commit_of,
    dtype_of,
    load_config,
    load_tokenizer,
    load_weights,
    missing_bytes,
    name_of,
    source_of,
    weights_bytes,
)

BACKENDS = ("hf", "transformer_lens")
ATTENTION_KERNELS = ("auto", "sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate makes these by itself


@no_installs("transformers")
def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    adapter_revision: str | None = None,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    backend: str = "hf",
    attention: str = "auto",
    compile: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LanguageModel:
    """Load a causal language model, and its tokenizer if it has one, from a local directory or the Hugging Face hub.

    If the local hub cache holds the whole model, the network is not asked.

    Args:
        name_or_path: directory with config.json, weights and tokenizer; or a hub name such as "openai-community/gpt2".
        revision: branch, tag or commit on the hub. Config, tokenizer and weights are all of the commit that it is, and
            the model's identity says which.
        adapter: directory or hub name of a LoRA adapter of peft, which computes beside the model's own weights.
        adapter_revision: branch, tag or commit of the adapter on the hub.
        device: "auto" (cuda if there is one, else cpu) or a torch device.
        device_map: how accelerate spreads the model over all devices: "auto", "balanced", "balanced_low_0",
            "sequential". Each activation is then on the device of its block. None for one device.
        dtype: "auto" (float32 on the CPU, the checkpoint's elsewhere), "float32", "bfloat16" or "float16".
        backend: "hf" or "transformer_lens".
        attention: "auto" (what transformers prefers for the model), "sdpa", "eager" or "flash_attention_2".
        compile: run the blocks compiled (see HuggingFaceModel); only on one device.
        trust_remote_code: let the model run Python code that it brings; a hash of it is in the model's identity.
        allow_pickle: take weights that are a pickle, such as pytorch_model.bin, if there are no safetensors. Of a
            pickle only tensors are read.

    Raises:
        ConfigError: an unknown word, or settings that exclude each other.
        ModelError: the model is missing, incomplete or damaged, or brings code that is not trusted, or weights as a
            pickle that is not allowed; the backend does not support its family; or the attention kernel is not
            available.
        MemoryError: the weights go onto a CPU, and take more memory than there is.
    """
    _check_settings(device, device_map, backend, attention, compile, adapter)
    where = device_of("load_model", device)
    source = source_of(str(name_or_path))
    kernel = "eager" if backend == "transformer_lens" else attention
    revision = commit_of(source, revision, trust_remote_code)
    config = load_config(source, revision, trust_remote_code, kernel)
    name = name_of(source)
    kernel = capping_kernel(kernel, config, name)
    found = None if adapter is None else find_adapter(str(adapter), adapter_revision)
    if backend == "hf":
        family_of(config.get_text_config(), name)  # refuse an unknown family before loading the weights
    torch_dtype = dtype_of(dtype, where)
    if attention == "flash_attention_2":
        check_flash_attention(where, torch_dtype, config)
    tokenizer = load_tokenizer(source, revision, trust_remote_code)
    n_stored = weights_bytes(source, revision, config, torch_dtype, allow_pickle=allow_pickle)
    if n_stored and not trust_remote_code and not hasattr(config, "quantization_config"):
        n_missing = missing_bytes(source, revision, config, torch_dtype, n_stored)
        if n_missing:
            require_memory(n_missing, f"the weights of {name}, as its config.json asks for them,")
    if where.type == "cpu" and device_map is None:
        require_memory(n_stored, f"the weights of {name}")
    model = load_weights(
        source,
        revision,
        trust_remote_code,
        config=config,
        name=name,
        dtype=torch_dtype,
        kernel=kernel,
        device_map=device_map,
        allow_pickle=allow_pickle,
    )
    whole = cast(nn.Module, model)
    if found is not None:
        whole, name = adapted(model, found, name), f"{name}+{found.name}"
    if device_map is None:
        whole.to(where)
    identity = model_identity(whole, tokenizer, name, revision)
    if backend == "transformer_lens":
        return BridgeModel(model, tokenizer, identity)
    loaded = HuggingFaceModel(whole, tokenizer, identity, compiled=compile)
    loaded.adapter = found
    return loaded


def wrap_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, name: str | None = None) -> LanguageModel:
    """A LanguageModel of a transformers model that is loaded: plain, quantised, adapted or spread over devices.

    Args:
        model: in evaluation mode and of a supported family. It is neither changed nor moved.
        tokenizer: the tokenizer of the model; None for a model that takes token ids alone.
        name: recorded in caches; None takes the name that the model was loaded by.

    Raises:
        ModelError: the model is in training mode (dropout would change the activations) or of an unknown family.
    """
    config = cast(PreTrainedModel, model).config  # or that which an adapter's wrapper passes on
    name = name or name_of(cast(str, config.name_or_path)) or type(model).__name__
    if model.training:
        raise ModelError(f"wrap_model: {name} must be in evaluation mode, got training mode; call model.eval() first")
    known = {"name": name, "revision": getattr(config, "_commit_hash", None)}
    return HuggingFaceModel(model, tokenizer, known)  # hashing its weights takes seconds, and steering needs no hash


def _check_settings(
    device: str, device_map: str | None, backend: str, attention: str, compile: bool, adapter: str | Path | None
) -> None:
    """Raise ConfigError for an unknown word, or for settings that exclude each other.

    The arguments are load_model's.
    """
    typed("load_model", "compile", compile, bool)
    one_of("load_model", "backend", backend, BACKENDS)
    one_of("load_model", "attention", attention, ATTENTION_KERNELS)
    if device_map is not None:
        one_of("load_model", "device_map", device_map, DEVICE_MAPS)
    if device_map is not None and device != "auto":
        raise ConfigError(
            f"load_model: device_map chooses the devices, so device must be auto, got {device!r} with device_map "
            f"{device_map!r}; leave one of them out"
        )
    if device_map is not None and compile:
        raise ConfigError(
            f"load_model: compile needs the model on one device, got device_map {device_map!r}; leave one of them out"
        )
    if backend == "transformer_lens" and adapter is not None:
        raise ConfigError(
            f"load_model: backend transformer_lens runs no adapter, got {str(adapter)!r}; merge it into its model by "
            "peft, or use backend hf"
        )
    if backend == "transformer_lens" and (device_map is not None or compile or attention not in ("auto", "eager")):
        raise ConfigError(
            "load_model: backend transformer_lens computes attention itself (eager), uncompiled, on one device; got "
            f"attention {attention!r}, compile {compile}, device_map {device_map!r}; leave them out or use backend hf"
        )
