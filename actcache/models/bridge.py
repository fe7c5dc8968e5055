"""`BridgeModel`: a language model with every hook of TransformerLens' TransformerBridge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GPT2Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.machine.installs import no_installs
from actcache.models.language_model import HookFn, LanguageModel, unknown_hook


class BridgeModel(LanguageModel):
    """A transformers module inside TransformerLens' TransformerBridge. It has every hook of the bridge.

    It supports many more families than HuggingFaceModel. The bridge computes attention itself ("eager"). Its
    compatibility mode stays off, because that mode centres the residual stream. Activations with several axes for a
    token, such as `attn.hook_z`, are flattened to [sequence, position, d_in]. The module belongs to the bridge
    afterwards.

    Raises:
        ModelError: the bridge does not support the model.
    """

    backend = "transformer_lens"
    _shape: torch.Size | None = None  # of the token ids, during a pass of this class

    @no_installs("TransformerLens")
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, identity: dict[str, Any]):
        super().__init__(model, tokenizer, identity)
        # Imported here: it takes seconds, and only this backend needs it.
        from transformer_lens.model_bridge import TransformerBridge

        # The bridge gets token ids only, but it needs a tokenizer and changes it. If that tokenizer has a BOS, the
        # bridge loads it a second time. So the bridge gets a copy without a BOS.
        spare = copy.deepcopy(tokenizer) if tokenizer else GPT2Tokenizer()  # one without a vocabulary
        spare.bos_token = None
        # With hf_model the bridge takes the family from the config, not from the name (a path may contain "llama"). By
        # the name it looks for a processor of pictures: the whole path, so that the hub is not asked for a folder.
        name = self.source or cast(str, identity["name"])
        try:
            self._bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=spare, device=self.device, dtype=self.dtype
            )
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(
                f"{identity['name']}: TransformerLens cannot take model_type {model.config.model_type!r}: {reason}; "
                "use a model of a family that it supports"
            ) from None

    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook, found by a forward pass of one token. Raises ModelError as `activations` does."""
        token_ids = torch.zeros((1, 1), dtype=torch.long)
        return {hook_name: x.shape[-1] for hook_name, x in self.activations(token_ids, hook_names).items()}

    def _check(self, hook_name: str) -> None:
        if hook_name not in self._bridge.hook_dict:
            unknown_hook(self, hook_name, list(self._bridge.hook_dict), "see the bridge's hook_dict for all")
        if hook_name.endswith(("hook_pattern", "hook_attn_scores")):
            raise ModelError(f"{self.identity['name']}: {hook_name} has no vector for each token; choose another hook")
        try:
            self._bridge.check_hooks_to_add(hook_name)  # some hooks are off until a flag is set that slows every pass
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(f"{self.identity['name']}: {reason}; choose another hook") from None

    def _hooked(self, hook_name: str, hook_fn: HookFn) -> AbstractContextManager[object]:
        return self._bridge.hooks(fwd_hooks=[(hook_name, self._flat(hook_name, hook_fn))])

    def _logits(self, token_ids: Tensor) -> Tensor:
        self._shape = token_ids.shape
        try:
            return self._bridge(token_ids.to(self.device, non_blocking=True), return_type="logits")
        finally:
            self._shape = None

    def _flat(self, hook_name: str, hook_fn: HookFn) -> Callable[..., Tensor | None]:
        """A hook of the bridge that shows `hook_fn` the activation as [sequence, position, d_in]."""

        def flat_hook_fn(x: Tensor, hook: object) -> Tensor | None:
            if x.ndim < 3 or self._shape not in (None, x.shape[:2]):
                tokens = "token" if self._shape is None else f"of {tuple(self._shape)} tokens"
                raise ModelError(
                    f"{self.identity['name']}: {hook_name} must have a vector for each {tokens}, got shape "
                    f"{tuple(x.shape)}; choose another hook"
                )
            replaced = hook_fn(x.flatten(2))
            return None if replaced is None else replaced.view_as(x)

        return flat_hook_fn
