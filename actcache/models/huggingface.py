"""`HuggingFaceModel`: a transformers model with forward hooks on its submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.models.compiled import compile_blocks_
from actcache.models.families import blocks_of, family_of
from actcache.models.former_identity import former_hashes
from actcache.models.identity import CONTENT, content_sha256, model_identity, state_of
from actcache.models.language_model import SITES, LanguageModel, unknown_hook
from actcache.models.replacing import HookFn


class HuggingFaceModel(LanguageModel):
    """A transformers module with forward hooks; the module itself is used as it is. This is the fast backend.

    The module may be quantised, adapted or spread over devices. The whole module is called, so everything that wraps
    the blocks acts as in normal use. The forward pass stops after the last hook: later blocks, the final norm and the
    output head do not run.

    With `compiled`, the forward passes of the blocks are replaced by compiled ones for good. A block runs uncompiled in
    a pass that asks for a hook inside it (hook_attn_out, hook_resid_mid, hook_mlp_out). So the last bits of an
    activation may depend on which hooks are asked for together.

    Raises:
        ModelError: the family of the model is not in FAMILIES, or its blocks cannot be found.
    """

    backend = "hf"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        identity: dict[str, Any],
        *,
        compiled: bool = False,
    ):
        self._model, self._state = model, state_of(model) if CONTENT in identity else None
        super().__init__(model, tokenizer, identity)
        config = cast(PreTrainedModel, model).config.get_text_config()
        self._family = family_of(config, self.name)
        self._blocks = blocks_of(model, self._family, self.n_layers, self.name)
        sites = [site for site in SITES if site != "hook_resid_mid" or self._family.resid_mid is not None]
        self._hook_names = [f"blocks.{layer}.{site}" for layer in range(self.n_layers) for site in sites]
        self.compiled = compiled
        if compiled:
            compile_blocks_(self._blocks, self.name)

    @property
    def identity(self) -> dict[str, Any]:
        """As `model_identity` gives it, of the module as it is now: adapters are switched, weights are changed.

        If only the name and the revision were given, the rest is found when it is first asked for.
        """
        state = state_of(self._model)
        if self._state is None:
            self._identity = model_identity(self._model, self.tokenizer, self.name, self._identity.get("revision"))
        elif state != self._state:
            self._identity = self._identity | {CONTENT: content_sha256(self._model)}
            self.former = former_hashes(self._model)
        self._state = state
        return self._identity

    @identity.setter
    def identity(self, identity: dict[str, Any]) -> None:
        self._identity = identity

    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook.

        It is d_model, because all five sites read or write the residual stream. Raises ModelError.
        """
        for hook_name in hook_names:
            self._check(hook_name)
        return dict.fromkeys(hook_names, self.d_model)

    def logits_from(
        self,
        token_ids: Int[Tensor, "sequence position"],
        start: Float[Tensor, "sequence position d_model"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "sequence position vocab"]:
        """As `LanguageModel.logits_from`.

        The blocks before the hook's block are not run; they return `start` instead.
        """
        self._check(hook_name)
        if start.shape != (*token_ids.shape, self.d_model):
            raise ValueError(
                f"logits_from: start must have shape {(*token_ids.shape, self.d_model)}, got {tuple(start.shape)}; "
                f"pass what {self.stream_before(hook_name)} was for the same tokens"
            )
        skipped = self._blocks[: int(hook_name.split(".")[1])]
        with skip_blocks((start,) if skipped and self._is_in_tuples else start, skipped):
            return self.logits_with(token_ids, hook_name, replace)

    @cached_property
    def _is_in_tuples(self) -> bool:
        """Whether blocks return the stream in a tuple, as those of GPT-NeoX do in older versions of transformers."""
        returned: list[object] = []
        with self._blocks[0].register_forward_hook(lambda _, __, output: returned.append(output)):
            self.activations(torch.zeros((1, 1), dtype=torch.int64), ["blocks.0.hook_resid_post"])
        return isinstance(returned[0], tuple)

    def stream_before(self, hook_name: str) -> str:
        """hook_resid_pre of the hook's block. Raises ModelError if the hook does not exist."""
        self._check(hook_name)
        return f"blocks.{hook_name.split('.')[1]}.hook_resid_pre"

    def _check(self, hook_name: str) -> None:
        if hook_name in self._hook_names:
            return
        if hook_name.endswith(".hook_resid_mid") and self._family.resid_mid is None:
            raise ModelError(
                f"{self.name}: no hook {hook_name!r}: attention and MLP of this model are parallel, both "
                "read hook_resid_pre; use hook_resid_pre or hook_resid_post"
            )
        unknown_hook(self, hook_name, self._hook_names, "load with --backend transformer_lens for other sites")

    @torch.no_grad()
    def logits_after(
        self, past: Any, token_ids: Int[Tensor, "sequence position"]
    ) -> tuple[Float[Tensor, "sequence position vocab"], Any]:
        """As `LanguageModel.logits_after`; the past is a cache of keys and values."""
        if self.compiled:  # the blocks would be compiled for each length
            return super().logits_after(past, token_ids)
        n_before = 0 if past is None else past.get_seq_length()
        self._check_ids(token_ids, n_before)
        output = self._run(token_ids, n_before, use_cache=True, past_key_values=past)
        return output["logits"], output["past_key_values"]

    def _check_ids(self, token_ids: Tensor, n_before: int = 0) -> None:
        n_tokens = n_before + token_ids.shape[1]
        if self.max_positions is not None and n_tokens > self.max_positions:
            raise ModelError(
                f"{self.name}: sequences have at most {self.max_positions} tokens, got {n_tokens}; pass a "
                "smaller --context-size, or a shorter text"
            )
        super()._check_ids(token_ids)

    def _logits(self, token_ids: Tensor) -> Tensor:
        return self._run(token_ids, 0, use_cache=False)["logits"]

    def _run(self, token_ids: Tensor, n_before: int, **settings: Any) -> Any:
        """What the module gives for tokens after `n_before` others; "logits" is in it."""
        token_ids = token_ids.to(self.device, non_blocking=True)
        # A mask of ones changes nothing; without it GPT-2 warns about padding when BOS is also the pad token.
        mask = token_ids.new_ones((len(token_ids), n_before + token_ids.shape[1]))
        output = self._model(input_ids=token_ids, attention_mask=mask, **settings)
        if "logits" not in output:
            raise ModelError(f"{self.name}: the checkpoint has no output head, so no logits; use one with")
        return output

    def _whole(self) -> nn.Module:
        return self._model

    def _hooked(self, hook_name: str, hook_fn: HookFn) -> RemovableHandle:
        _, layer, site = hook_name.split(".")
        block = self._blocks[int(layer)]
        family = self._family
        match site:
            case "hook_resid_pre":
                return block.register_forward_pre_hook(partial(_on_input, hook_fn))
            case "hook_attn_out":
                return block.get_submodule(family.attn_out).register_forward_hook(partial(_on_output, hook_fn))
            case "hook_resid_mid":
                assert family.resid_mid is not None, "checked by _check"
                return block.get_submodule(family.resid_mid).register_forward_pre_hook(partial(_on_input, hook_fn))
            case "hook_mlp_out":
                return block.get_submodule(family.mlp_out).register_forward_hook(partial(_on_output, hook_fn))
            case _:
                return block.register_forward_hook(partial(_on_output, hook_fn))


def _on_input(hook_fn: HookFn, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook that calls `hook_fn` with the first positional argument."""
    replaced = hook_fn(args[0])
    return None if replaced is None else (replaced, *args[1:])


def _on_output(hook_fn: HookFn, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook that calls `hook_fn` with the output, or with its first part (attention also returns weights)."""
    if not isinstance(output, tuple):
        return hook_fn(output)
    replaced = hook_fn(output[0])
    return None if replaced is None else (replaced, *output[1:])


@contextmanager
def skip_blocks(x: Tensor | tuple[Tensor], blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with`, every block returns x and does not run. Afterwards each has its own `forward` again."""
    forwards = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block, _ in forwards:
            block.forward = lambda *_, **__: x
        yield
    finally:
        for block, forward in forwards:
            if forward is None:  # the block had the method of its class; otherwise it was compiled or offloaded
                del block.forward
            else:
                block.forward = forward
