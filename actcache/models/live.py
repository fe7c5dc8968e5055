"""`live_model`: a LanguageModel of a model that the caller has loaded, whoever made it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def live_model(model: Any, tokenizer: Any = None) -> Any:
    """The model as a LanguageModel, which reads and replaces activations by hook name. The module is neither copied
    nor changed.

    Args:
        model: a LanguageModel, which is returned as it is, or with another tokenizer; a transformers model in
            evaluation mode; or a HookedTransformer or TransformerBridge of TransformerLens, with its own hook names.
        tokenizer: for texts; None takes that of a TransformerLens model, and none for a transformers model.

    Raises:
        ModelError: a transformers model is in training mode or of an unknown family.
    """
    if not isinstance(model, nn.Module):
        if tokenizer is not None:
            model = copy.copy(model)
            model.tokenizer = tokenizer
        return model
    if hasattr(model, "hook_dict"):
        from actcache.models.bridge import LoadedHookPointModel

        return LoadedHookPointModel(model, tokenizer)
    from actcache.models.load import wrap_model  # here: reading an SAE imports no language model

    return wrap_model(model, tokenizer)
