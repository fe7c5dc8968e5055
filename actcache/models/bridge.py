"""Language models with every hook of TransformerLens, which this library boots or which the caller has booted."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.machine.installs import no_installs
from actcache.models.language_model import LanguageModel, unknown_hook
from actcache.models.probe import probe_tokens
from actcache.models.replacing import HookFn

# Of the model's dtype, or of float32, in which weights are centred; as a fraction of a row's root mean square, over
# sqrt(d_model): a mean of so many roundings is so much smaller, and so is that of a raw stream.
CENTRED_ROUNDINGS = 32


class HookPointModel(LanguageModel):
    """A model whose hooks are TransformerLens' hook points.

    Activations with several axes for a token, such as `attn.hook_z`, are flattened to [sequence, position, d_in].
    """

    backend = "transformer_lens"
    _module: Any  # a TransformerBridge or a HookedTransformer
    _shape: torch.Size | None = None  # of the token ids, during a pass of this class

    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook, found by a forward pass of one token. Raises ModelError as `activations` does."""
        token_ids = torch.zeros((1, 1), dtype=torch.long)
        return {hook_name: x.shape[-1] for hook_name, x in self.activations(token_ids, hook_names).items()}

    def _check(self, hook_name: str) -> None:
        if hook_name not in self._module.hook_dict:
            unknown_hook(self, hook_name, list(self._module.hook_dict), "see the model's hook_dict for all")
        if hook_name.endswith(("hook_pattern", "hook_attn_scores")):
            raise ModelError(f"{self.name}: {hook_name} has no vector for each token; choose another hook")
        try:  # some hooks are off until a flag is set that slows every pass
            self._check_flags(hook_name)
        except (ValueError, AssertionError) as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(f"{self.name}: {reason}; choose another hook") from None

    def _check_flags(self, hook_name: str) -> None:
        """Raise if the hook is off, as the module itself does."""
        self._module.check_hooks_to_add(hook_name)

    def _whole(self) -> nn.Module:
        return self._module

    def _hooked(self, hook_name: str, hook_fn: HookFn) -> AbstractContextManager[object]:
        return self._module.hooks(fwd_hooks=[(hook_name, self._flat(hook_name, hook_fn))])

    def _logits(self, token_ids: Tensor) -> Tensor:
        self._shape = token_ids.shape
        try:
            return self._module(token_ids.to(self.device, non_blocking=True), return_type="logits")
        finally:
            self._shape = None

    def _flat(self, hook_name: str, hook_fn: HookFn) -> Callable[..., Tensor | None]:
        """A hook of the bridge that shows `hook_fn` the activation as [sequence, position, d_in]."""

        def flat_hook_fn(x: Tensor, hook: object) -> Tensor | None:
            if x.ndim < 3 or self._shape not in (None, x.shape[:2]):
                tokens = "token" if self._shape is None else f"of {tuple(self._shape)} tokens"
                raise ModelError(
                    f"{self.name}: {hook_name} must have a vector for each {tokens}, got shape "
                    f"{tuple(x.shape)}; choose another hook"
                )
            replaced = hook_fn(x.flatten(2))
            return None if replaced is None else replaced.view_as(x)

        return flat_hook_fn


class BridgeModel(HookPointModel):
    """A transformers module inside TransformerLens' TransformerBridge. It has every hook of the bridge.

    It supports many more families than HuggingFaceModel. The bridge computes attention itself ("eager"). Its
    compatibility mode stays off, because that mode centres the residual stream. The module belongs to the bridge
    afterwards.

    Raises:
        ModelError: the bridge does not support the model.
    """

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
            self._module = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=spare, device=self.device, dtype=self.dtype
            )
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(
                f"{identity['name']}: TransformerLens cannot take model_type {model.config.model_type!r}: {reason}; "
                "use a model of a family that it supports"
            ) from None


class LoadedHookPointModel(HookPointModel):
    """A HookedTransformer or TransformerBridge that is loaded; the module itself is used as it is.

    TransformerLens may have changed its weights: `has_centred_stream` says whether its stream has lost its mean. The
    logits are those of the raw model, some activations are not. So no cache is made of it.
    """

    compiled = False

    def __init__(self, module: Any, tokenizer: PreTrainedTokenizerBase | None = None):
        config = module.cfg
        self.name = str(getattr(config, "model_name", None) or type(module).__name__)
        self._module, self.tokenizer = module, tokenizer or module.tokenizer
        self.identity, self.former, self.source = {"name": self.name, "revision": None}, {}, ""
        parameter = next(iter(module.parameters()))
        self.device, self.dtype = parameter.device, parameter.dtype
        self.n_layers, self.d_model = config.n_layers, config.d_model
        self.vocab_size, self.n_embeddings = config.d_vocab_out, config.d_vocab
        learned = getattr(config, "positional_embedding_type", "standard") == "standard"
        self.max_positions = config.n_ctx if learned else None
        self.attention_kernel = "eager"
        self._head = module.unembed

    def has_centred_stream(self) -> bool:
        """Whether the mean of the stream over d_model is 0 but for rounding, in a pass of a few tokens."""
        return self._has_centred_stream

    @cached_property
    def _has_centred_stream(self) -> bool:
        hook_name = "blocks.0.hook_resid_pre"
        with self._measured():
            x = self.activations(probe_tokens(self.n_embeddings, self.max_positions), [hook_name])[hook_name].double()
        bound = (
            CENTRED_ROUNDINGS / self.d_model**0.5 * max(torch.finfo(dtype).eps for dtype in (self.dtype, torch.float32))
        )
        return bool((x.mean(-1).abs() <= bound * x.square().mean(-1).sqrt()).all())

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """Raises ModelError: the weights of this module may be changed, so nothing is known of it."""
        raise ModelError(
            f"{self.name}: a {type(self._module).__name__} that is loaded already cannot be compared with "
            "the model of a cache; pass the model that load_model gives"
        )

    def _check_flags(self, hook_name: str) -> None:
        check, hook_point = self._module.check_hooks_to_add, self._module.hook_dict[hook_name]
        if "hook_point" in inspect.signature(check).parameters:  # HookedTransformer, which asserts
            check(hook_point, hook_name, None)
        else:
            check(hook_name)

    def _head_weights(self) -> tuple[Tensor, Tensor | None]:
        return self._module.W_U.T, self._module.b_U
