"""The families of transformers models that HuggingFaceModel knows, and the submodules that hold their hooks."""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from actcache.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the submodules of one family. `blocks` is looked for in the model, the others in a block."""

    blocks: str  # the ModuleList of blocks
    attn_out: str  # its output is what attention adds to the residual stream
    mlp_out: str  # its output is what the MLP adds to the residual stream
    resid_mid: str | None  # its input is the residual stream between attention and MLP; None if they run in parallel


_LLAMA = Family(blocks="layers", attn_out="self_attn", mlp_out="mlp", resid_mid="post_attention_layernorm")
_GEMMA = Family(  # norms after attention and MLP too: their outputs are added to the stream
    blocks="layers",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    resid_mid="pre_feedforward_layernorm",
)
FAMILIES = {
    "gpt2": Family(blocks="h", attn_out="attn", mlp_out="mlp", resid_mid="ln_2"),
    "gpt_neox": Family(blocks="layers", attn_out="attention", mlp_out="mlp", resid_mid="post_attention_layernorm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def family_of(config: PretrainedConfig, name: str | None) -> Family:
    """The family of a text config.

    name: the model's, for messages. Raises ModelError for a family that is not in FAMILIES.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{name}: model_type must be one of {list(FAMILIES)}, got {config.model_type!r}; load it with "
            "--backend transformer_lens"
        )
    if config.model_type == "gpt_neox" and config.use_parallel_residual:
        return replace(family, resid_mid=None)
    return family


def blocks_of(model: nn.Module, family: Family, n_layers: int, name: str | None) -> nn.ModuleList:
    """The blocks of a model. Adapters and heads may have wrapped them at any depth.

    Args:
        model: the transformers model.
        family: of the model.
        n_layers: how many blocks the model has.
        name: the model's name, for messages.

    Raises:
        ModelError: not exactly one ModuleList has this name, this length and blocks of this family.
    """
    needed = {family.attn_out, family.mlp_out} | ({family.resid_mid} - {None})
    found = [
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == family.blocks
        and isinstance(module, nn.ModuleList)
        and len(module) == n_layers > 0
        and needed <= {child for child, _ in module[0].named_children()}
    ]
    if len(found) != 1:
        raise ModelError(
            f"{name}: must have one list {family.blocks!r} of {n_layers} blocks with {sorted(map(str, needed))}, found "
            f"{len(found)}; load it with --backend transformer_lens"
        )
    return found[0]
