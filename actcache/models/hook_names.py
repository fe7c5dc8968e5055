"""TransformerLens' hook names for the modules of a transformers model, by which others name what they store."""

import re

MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)[._](\d+)(?:\.(\w+))?")  # a block, or what is in it
SITES = {  # in a block -> its input and its output
    None: ("hook_resid_pre", "hook_resid_post"),
    "mlp": ("mlp.hook_in", "hook_mlp_out"),
    **dict.fromkeys(("attn", "attention", "self_attn"), ("attn.hook_in", "hook_attn_out")),
}


def hooks_of(module: str, model_name: str | None) -> tuple[str, str] | None:
    """(input, output) hook of a module: a block such as `transformer.h.3`, its MLP or its attention; None for others.

    Not of Gemma inside a block: the norms of Gemma 2 and 3 come after the MLP and after attention, before the stream,
    and hook_mlp_out and hook_attn_out after those.
    """
    match = MODULE.fullmatch(module)
    if match is None or match[2] not in SITES or (match[2] and "gemma" in str(model_name).lower()):
        return None
    before, after = SITES[match[2]]
    return f"blocks.{match[1]}.{before}", f"blocks.{match[1]}.{after}"
