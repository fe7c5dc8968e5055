"""The two residual streams that SAEs are of: the raw one, and the one without its mean over d_model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from actcache.errors import CacheMismatch

# The residual stream, what blocks write into it, and copies of it: a centred model has them without their mean. Some
# have another name in a TransformerBridge.
CENTRED = re.compile(
    r"(blocks\.\d+\.)?hook_(embed|pos_embed|resid_(pre|mid|post)|attn_out|mlp_out|attn_in|mlp_in)"
    r"|blocks\.\d+\.((attn|mlp)\.hook_out|hook_in|hook_out)"
)


@runtime_checkable
class Model(Protocol):
    """What a check of the stream needs of a language model. `actcache.models.LanguageModel` is one."""

    name: str

    def has_centred_stream(self) -> bool:
        """Whether its residual stream has mean 0 over d_model."""
        ...

    def has_layer_norm(self) -> bool:
        """Whether its norms subtract that mean, so that it counts for nothing."""
        ...


def checked_stream(model: Model, hook_names: Sequence[str], *, is_centred: bool) -> str:
    """Which stream an SAE is of and which a model has, in words. Raises CacheMismatch unless it can take them.

    Args:
        model: the language model.
        hook_names: of the SAE.
        is_centred: whether the SAE is of the centred stream.
    """
    of_stream = [name for name in hook_names if CENTRED.fullmatch(name)]
    if not of_stream:
        return f"{hook_names[0]} is the same in the raw and in the centred residual stream"
    has_centred = model.has_centred_stream()
    wants, has = (("centred" if each else "raw") for each in (is_centred, has_centred))
    if has_centred and not is_centred:
        raise CacheMismatch(
            f"{of_stream[0]}: the SAE is of the raw residual stream, {model.name} was loaded with a centred one "
            "(center_writing_weights); load it with HookedTransformer.from_pretrained_no_processing, without "
            "enable_compatibility_mode, or with load_model"
        )
    if is_centred and not has_centred and not model.has_layer_norm():
        raise CacheMismatch(
            f"{of_stream[0]}: the SAE is of a centred residual stream (center_writing_weights), which {model.name} "
            "cannot have: its norms are RMSNorms, to which the mean counts; pass the model that the SAE was trained on"
        )
    made = ", whose mean the SAE subtracts" if wants != has else ""
    return f"{of_stream[0]}: the SAE is of the {wants} residual stream, {model.name} has the {has} one{made}"
