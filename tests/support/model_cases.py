"""What the tests of models share: where each family keeps its parts, a batch of tokens, hooks, raw torch hooks."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from actcache.models.language_model import SITES
from support.tiny_models import N_LAYERS

# Written out by hand, apart from the table under test: blocks; what writes attention's part; what the MLP's; the chain
# of modules from hook_resid_mid to hook_mlp_out.
PLACES = {
    "gpt2": ("transformer.h", "attn", "mlp", ["ln_2", "mlp"]),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", []),
    "gpt_neox_sequential": ("gpt_neox.layers", "attention", "mlp", ["post_attention_layernorm", "mlp"]),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        ("model.layers", "self_attn", "mlp", ["post_attention_layernorm", "mlp"]),
    ),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        (
            "model.layers",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
        ),
    ),
}
# 3 sequences of 20 tokens: longer than the sliding windows of 8
TOKENS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))


def hook_names(family: str) -> list[str]:
    sites = [site for site in SITES if (family, site) != ("gpt_neox", "hook_resid_mid")]
    return [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in sites]


def with_raw_hook(model: nn.Module, path: str, change: Callable, run: Callable[[], object], *, on_input: bool = False):
    """`run()` with a plain torch hook on the module at `path`."""
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(change) if on_input else module.register_forward_hook(change)
    try:
        with torch.no_grad():
            return run()
    finally:
        handle.remove()


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value) and error.value.__cause__ is None
