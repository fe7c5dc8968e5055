"""TransformerLens' hook names for submodules of a transformers model. Other programs name activations by submodule."""

import re

MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)[._](\d+)(?:\.(\w+))?")  # a block, or a submodule of one
SITES = {  # submodule of a block, None for the block itself -> (hook at its input, hook at its output)
    None: ("hook_resid_pre", "hook_resid_post"),
    "mlp": ("mlp.hook_in", "hook_mlp_out"),
    **dict.fromkeys(("attn", "attention", "self_attn"), ("attn.hook_in", "hook_attn_out")),
}


def hooks_of(module: str, model_name: str | None) -> tuple[str, str] | None:
    """(hook at the input, hook at the output) of a submodule.

    The submodule is a block such as `transformer.h.3`, its MLP or its attention; others give None. MLP and attention of
    Gemma give None too: Gemma 2 and 3 apply a norm to their outputs, and the hooks come after that norm.
    """
    match = MODULE.fullmatch(module)
    if match is None or match[2] not in SITES or (match[2] and "gemma" in str(model_name).lower()):
        return None
    before, after = SITES[match[2]]
    return f"blocks.{match[1]}.{before}", f"blocks.{match[1]}.{after}"
