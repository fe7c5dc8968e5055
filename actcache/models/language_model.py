"""`LanguageModel`: what harvest, repair, evaluation and steering need of a language model."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any, NoReturn, cast

import numpy as np
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.models.adapters import Adapter
from actcache.models.former_identity import former_hashes
from actcache.models.identity import CONTENT, former_differences, identity_differences
from actcache.models.probe import probe_differences, probe_rows, probe_tokens, rounding_bound
from actcache.models.replacing import HookFn, in_turn, parts_of, same_shape, unless
from actcache.models.unembedding import Unembedding, measured_unembedding, norm_probes

_MEASURED: list[nn.Module] = []  # modules that are looked at just now, in which nothing may be replaced
SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


class LanguageModel(ABC):
    """A causal language model whose activations can be read and replaced by hook name.

    It runs without gradients. Sequences are whole and unpadded. Token ids may be on any device. On the CPU an id that
    the embedding lacks is a ModelError.

    Attributes:
        tokenizer: the model's tokenizer, unchanged; None if it has none, and takes token ids alone.
        name: for messages; that of the identity.
        identity: as `model_identity` gives it; plain JSON values, no absolute path.
        former: the hashes by which older versions knew the model, as `former_hashes` gives them.
        source: a hub name or an absolute path from which the model can be loaded again; "" if that is not known.
        adapter: what `load_model` has put on the model that is there; None if nothing.
        device: of the embedding. With a device map, activations may be on other devices.
        dtype: of the parameters, and of most activations.
        n_layers, d_model: number of blocks, width of the residual stream.
        vocab_size: how many logits there are at each position.
        n_embeddings: how many token ids the model can read: the rows of its embedding.
        max_positions: the most tokens that a sequence may have; None if the family has no limit.
        attention_kernel: "sdpa", "eager", "flash_attention_2" or another of transformers' names.
        compiled: whether its blocks run compiled.
        backend: "hf" or "transformer_lens", as `load_model` takes it.
    """

    backend: str
    compiled: bool = False
    adapter: Adapter | None = None

    def __init__(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase | None, identity: dict[str, Any]):
        model = cast(PreTrainedModel, module)  # or an adapter's wrapper that passes attributes on
        config = model.config.get_text_config()
        self.tokenizer = tokenizer
        self.identity, self.name = identity, str(identity["name"])
        self.former = former_hashes(model)
        path = cast(str, model.config.name_or_path)
        self.source = os.path.abspath(path) if os.path.isdir(path) else path
        embedding = model.get_input_embeddings()
        with align_module_device(embedding):  # an offloaded embedding is brought to the device that computes it
            self.device: torch.device = next(embedding.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.n_embeddings: int = getattr(embedding, "num_embeddings", config.vocab_size)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._head = cast(nn.Module | None, model.get_output_embeddings())
        self.attention_kernel: str = cast(str, config._attn_implementation)  # never "auto" once the model is made

    def activations(
        self, token_ids: Int[Tensor, "sequence position"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "sequence position d_in"]]:
        """hook name -> activations, in the order of `hook_names` and in the model's dtype.

        Nothing after the last hook is run. Two activations may share memory (`blocks.0.hook_resid_post` is
        `blocks.1.hook_resid_pre`), so do not change them in place.

        Raises:
            ValueError: `hook_names` is empty.
            ModelError: a hook does not exist, is never reached, or has no vector for each token.
        """
        captured: dict[str, Tensor] = {}
        self.run_until(token_ids, hook_names, captured.__setitem__)
        return {hook_name: captured[hook_name] for hook_name in hook_names}

    def run_until(
        self,
        token_ids: Int[Tensor, "sequence position"],
        hook_names: Sequence[str],
        on_activation: Callable[[str, Float[Tensor, "sequence position d_in"]], object],
    ) -> None:
        """Call `on_activation(hook_name, x)` at each of `hook_names`, in the order in which the model reaches them.

        Nothing after the last hook is run. An activation is freed unless `on_activation` keeps it.

        Args:
            token_ids: whole sequences.
            hook_names: at least one hook.
            on_activation: called with the name of a hook and its activation.

        Raises:
            ValueError, ModelError: as `activations` does; and whatever `on_activation` raises.
        """
        if not hook_names:
            raise ValueError("activations: hook_names must name at least one hook, got none")
        for hook_name in hook_names:
            self._check(hook_name)
        left = set(hook_names)
        hook_fn = partial(_stopping_after, left, on_activation)
        try:
            self._forward(
                token_ids, {hook_name: partial(hook_fn, hook_name) for hook_name in dict.fromkeys(hook_names)}
            )
        except _StopForward:
            return
        raise ModelError(f"{self.name}: the forward pass never reached {sorted(left)}; leave them out")

    def logits(
        self,
        token_ids: Int[Tensor, "sequence position"],
        *,
        hook_fns: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """The logits of the whole model.

        Args:
            token_ids: whole sequences.
            hook_fns: hook name -> a function that is called with the activation there.

        Raises:
            ModelError: a hook does not exist, or the model has no output head.
        """
        for name in hook_fns or {}:
            self._check(name)
        return self._forward(token_ids, dict(hook_fns or {}))

    @contextmanager
    def replacing(self, changes: Sequence[tuple[str, HookFn]]) -> Iterator[None]:
        """Inside the `with`, activations of every pass of the module are replaced, whoever calls it.

        Gradients flow where torch records them. At hook_resid_mid as `logits_with` says.

        Args:
            changes: a hook and a function that gets its activation [sequence, position, d_in] and returns another of
                the same shape, or None to leave it. Several of one hook act in their order.

        Raises:
            ModelError: a hook does not exist. ValueError, from the pass: a function returned another shape.
        """
        for hook_name, _ in changes:
            self._check(hook_name)
        by_hook: dict[str, list[HookFn]] = {}
        for hook_name, function in changes:
            by_hook.setdefault(hook_name, []).append(unless(self._module_is_measured, same_shape(function)))
        parts = [parts_of(hook_name, in_turn(functions)) for hook_name, functions in by_hook.items()]
        # what goes on after a changed hook_resid_mid is mended before others change it, from the mlp_out that they left
        ordered = [*(part.before for part in parts), *(part.here for part in parts), *(part.after for part in parts)]
        with ExitStack() as stack:
            for name, hook_fn in (pair for pairs in ordered for pair in pairs):
                stack.enter_context(self._hooked(name, hook_fn))
            yield

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Inside the `with`, nothing is replaced in the module: what it is like is found without splices."""
        _MEASURED.append(self._whole())
        try:
            yield
        finally:
            _MEASURED.pop()

    def _module_is_measured(self) -> bool:
        return any(module is self._whole() for module in _MEASURED)

    @abstractmethod
    def _whole(self) -> nn.Module:
        """The module that passes run through; the same for all wrappers of one."""

    def logits_with_gradients(
        self, token_ids: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocab"]:
        """As `logits`, and torch records what gradients need, such as those of replaced activations."""
        self._check_ids(token_ids)
        with torch.enable_grad():
            return self._logits(token_ids)

    def logits_with(
        self,
        token_ids: Int[Tensor, "sequence position"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
        *,
        hook_fns: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """The logits of the whole model with the activation at `hook_name` replaced by `replace(activation)`.

        At hook_resid_mid the residual stream itself is replaced, not only the input of the MLP; HookedTransformer does
        the same.

        Args:
            token_ids: whole sequences.
            hook_name: where the activation is replaced.
            replace: gets [sequence, position, d_in] and returns the same shape; the result is cast to the activation's
                dtype and device.
            hook_fns: hook name -> a function that is called with another activation of the same pass.

        Raises:
            ModelError: the hook does not exist, or the model has no output head.
            ValueError: `replace` returned another shape.
        """
        for name in (hook_name, *(hook_fns or {})):
            self._check(name)
        part = parts_of(hook_name, same_shape(replace))
        return self._forward(token_ids, {**(hook_fns or {}), **dict([*part.before, *part.here, *part.after])})

    def unembedding(self) -> Unembedding:
        """The final norm and the output head as numbers.

        The norm is measured: it is run, inside the model, on chosen residual streams. So it may be of any family, and
        whatever wraps it acts as in normal use. This takes a forward pass of a few tokens.

        Raises:
            ModelError: the model has no output head, or no single LayerNorm or RMSNorm before it.
        """
        if self._head is None:
            raise ModelError(f"{self.name}: the checkpoint has no output head to read directions with")
        probes, seen = norm_probes(self.d_model), dict[str, Tensor]()
        handle = self._head.register_forward_pre_hook(lambda module, args: seen.update(normed=args[0][0]))
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        try:
            self.logits_with(torch.zeros((1, len(probes)), dtype=torch.long), last, lambda x: probes[None])
        finally:
            handle.remove()
        W_U, b_U = self._head_weights()
        return measured_unembedding(seen["normed"], W_U, b_U, self.name)

    def has_layer_norm(self) -> bool:
        """Whether the final norm subtracts the mean over d_model: LayerNorm does, RMSNorm does not.

        Without an output head it is told from the classes of the norms. Raises ModelError as `unembedding` does.
        """
        return self._has_layer_norm

    @cached_property
    def _has_layer_norm(self) -> bool:
        if self._head is None:
            return any(isinstance(module, nn.LayerNorm) for module in self._whole().modules())
        with self._measured():
            return self.unembedding().is_centred

    def has_centred_stream(self) -> bool:
        """Whether the residual stream has mean 0 over d_model, as TransformerLens can make it."""
        return False

    def refuse_unknown_ids(self, token_ids: Int[Tensor, "*shape"] | Int[np.ndarray, "*shape"]) -> None:
        """Raise ModelError if the embedding lacks a row for one of these ids."""
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self.n_embeddings:
            raise ModelError(
                f"{self.name}: token ids must be in [0, {self.n_embeddings}), the rows of its embedding, "
                f"got {lowest if lowest < 0 else highest}; pass the tokenizer of this model, or resize its embedding"
            )

    def probe(self) -> dict[str, Any]:
        """{"stream", "logits"}: the last residual stream and the logits of a forward pass over fixed tokens.

        Each is what `probe_rows` gives, plain JSON values; "logits" is None if the model has no output head.
        """
        token_ids = probe_tokens(self.n_embeddings, self.max_positions)
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        if self._head is None:
            return {"stream": probe_rows(self.activations(token_ids, [last])[last][0]), "logits": None}
        # a compiled model runs uncompiled where a hook is inside each block; to compile for this pass would take longer
        inside = {f"blocks.{i}.hook_mlp_out": lambda x: None for i in range(self.n_layers if self.compiled else 0)}
        seen: dict[str, Any] = {}
        logits = self.logits(token_ids, hook_fns={**inside, last: lambda x: seen.update(stream=probe_rows(x[0]))})
        return {**seen, "logits": probe_rows(logits[0])}

    def tolerance(self) -> float:
        """How far apart two computations of a row may be, as a fraction of its norm, if they round differently."""
        return rounding_bound(self.dtype, self.d_model, self.n_layers)

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """What makes the model of a cache another model than this one, in words; [] if they are the same.

        Names and places do not count, unless nothing else is known.

        Args:
            there: `model` of the cache's identity, of any version.
        """
        if not there.get(CONTENT):
            return former_differences(there, self.identity, self.former)
        found = identity_differences(there, self.identity)
        if not found and there.get("probe"):
            found = probe_differences(there["probe"], self.probe(), self.tolerance())
        return found

    def logits_after(
        self, past: Any, token_ids: Int[Tensor, "sequence position"]
    ) -> tuple[Float[Tensor, "sequence position vocab"], Any]:
        """(logits of these tokens, the past with them): a text that grows is not run again.

        Args:
            past: what the call before gave; None at the start of a text. If a call gives None, the backend keeps no
                past: pass None and the whole text again.
            token_ids: the tokens after those of the past.

        Raises:
            ModelError: the model has no output head, or not so many positions.
        """
        return self.logits(token_ids), None

    @abstractmethod
    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """hook name -> d_in. Raises ModelError for an unknown hook; the message lists similar names."""

    def logits_from(
        self,
        token_ids: Int[Tensor, "sequence position"],
        start: Float[Tensor, "sequence position d_model"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "sequence position vocab"]:
        """The logits of `logits_with`, bit for bit; nothing before `stream_before(hook_name)` is run again.

        Args:
            token_ids: whole sequences.
            start: the activation at `stream_before(hook_name)` in an earlier pass over the same tokens.
            hook_name, replace: as for `logits_with`.

        Raises:
            ModelError: as `logits_with` does; also if `stream_before(hook_name)` is None.
            ValueError: `start` or the result of `replace` has another shape.
        """
        raise ModelError(f"{self.name}: each pass of this backend begins at the embedding; use logits_with")

    def stream_before(self, hook_name: str) -> str | None:
        """The hook where `logits_from` begins: hook_resid_pre of the same block.

        None if every pass of this backend begins at the embedding. Raises ModelError if the hook does not exist.
        """
        self._check(hook_name)
        return None

    def _head_weights(self) -> tuple[Tensor, Tensor | None]:
        """W_U [vocab, d_model], and b_U [vocab] if there is one."""
        head = cast(nn.Linear, self._head)
        with align_module_device(head):  # an offloaded head is brought to the device that computes it
            return head.weight.detach(), None if head.bias is None else head.bias.detach()

    @abstractmethod
    def _check(self, hook_name: str) -> None:
        """Raise ModelError if the model has no such hook."""

    @torch.no_grad()
    def _forward(self, token_ids: Tensor, hook_fns: dict[str, HookFn]) -> Tensor:
        """Run the model without gradients and call each hook_fn with its activation; returns logits."""
        self._check_ids(token_ids)
        with ExitStack() as stack:
            for hook_name, hook_fn in hook_fns.items():
                stack.enter_context(self._hooked(hook_name, hook_fn))
            return self._logits(token_ids)

    def _check_ids(self, token_ids: Tensor) -> None:
        """Raise ModelError for ids or a length that the model cannot take."""
        if token_ids.device.type == "cpu":  # elsewhere a look at them would wait for the device
            self.refuse_unknown_ids(token_ids)

    @abstractmethod
    def _hooked(self, hook_name: str, hook_fn: HookFn) -> AbstractContextManager[object]:
        """Inside the `with`, `hook_fn` is called with the activation in every pass of the module."""

    @abstractmethod
    def _logits(self, token_ids: Tensor) -> Tensor:
        """Run the module; returns logits."""


def unknown_hook(model: LanguageModel, hook_name: str, hook_names: Sequence[str], way_out: str) -> NoReturn:
    """Raise ModelError for a hook that `model` lacks. hook_names: those it has. way_out: the end of the message."""
    near = get_close_matches(hook_name, hook_names, n=3)
    raise ModelError(
        f"{model.name}: no hook {hook_name!r}; near names: {', '.join(near) or 'none'}; there are "
        f"{model.n_layers} layers, blocks.0 to blocks.{model.n_layers - 1}, with {', '.join(SITES)}; {way_out}"
    )


class _StopForward(Exception):
    """Raised inside the forward pass after the last hook; never leaves this module."""


def _stopping_after(left: set[str], on_activation: Callable[[str, Tensor], object], hook_name: str, x: Tensor) -> None:
    """Call `on_activation`, and stop the forward pass when no hook is left."""
    on_activation(hook_name, x)
    left.discard(hook_name)
    if not left:
        raise _StopForward
