"""Load a language model and run it up to the last hook that is asked for.

Hook names are TransformerLens': `blocks.{L}.hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`,
`hook_resid_post`. HuggingFaceModel takes them from the transformers module itself (fast, eight families);
BridgeModel takes them, and every other hook, from TransformerLens' TransformerBridge (slower, many families).

Neither changes the model: no folding, no centring, no conversion of weights.
"""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ConfigError, ModelError
from actcache.models.compiled import compile_blocks_
from actcache.models.families import blocks_of, family_of
from actcache.models.identity import model_identity
from actcache.models.pretrained import (
    check_flash_attention,
    device_of,
    dtype_of,
    load_config,
    load_tokenizer,
    load_weights,
    name_of,
    revision_of,
    source_of,
)
from actcache.models.unembedding import Unembedding, measured_unembedding, norm_probes

Visit = Callable[[Tensor], Tensor | None]  # is shown an activation; returns what takes its place, or None to leave it

BACKENDS = ("hf", "transformer_lens")
ATTENTION_KERNELS = ("auto", "sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # what accelerate can work out by itself
SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


class _AllShown(Exception):
    """Raised inside the forward pass when the last asked activation was shown; never leaves this module."""


class LanguageModel(ABC):
    """A causal language model whose activations can be read and replaced by hook name.

    Runs without gradients. Sequences are whole and unpadded; token ids may live on any device.

    Attributes:
        tokenizer: as loaded, untouched.
        identity: {"name", "revision", "config_sha256", "weights_sha256"}; JSON-able, no absolute paths.
        source: where it can be loaded from again, a hub name or an absolute path; "" if that is not known.
        device: of the embedding, where token ids go; with a device map the activations may be elsewhere.
        dtype: of the parameters, and of the activations unless a hook says otherwise.
        n_layers, d_model: number of blocks, width of the residual stream.
        max_positions: tokens of a sequence at most; None where the family has no bound.
        attention_kernel: "sdpa", "eager", "flash_attention_2", ...
        compiled: its blocks run compiled.
        backend: "hf" or "transformer_lens", as `load_model` takes it.
    """

    backend: str
    compiled: bool = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: dict[str, str | None]):
        config = model.config.get_text_config()
        self.tokenizer = tokenizer
        self.identity = identity
        path = cast(str, model.config.name_or_path)
        self.source = os.path.abspath(path) if os.path.isdir(path) else path
        embedding = model.get_input_embeddings()
        with align_module_device(embedding):  # where it is computed, if it is offloaded
            self.device: torch.device = next(embedding.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._head = cast(nn.Linear | None, model.get_output_embeddings())
        self.attention_kernel: str = cast(str, config._attn_implementation)  # resolved when the model was made

    def activations(
        self, token_ids: Int[Tensor, "sequence position"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "sequence position d_in"]]:
        """The activations at `hook_names`, in that order, in the model's dtype; nothing after the last one is run.

        Hooks may share memory (`blocks.0.hook_resid_post` is `blocks.1.hook_resid_pre`): do not change them in place.

        Raises:
            ModelError: a hook does not exist, is never reached, or has no vector for each token.
        """
        captured: dict[str, Tensor] = {}
        self.show(token_ids, hook_names, captured.__setitem__)
        return {hook_name: captured[hook_name] for hook_name in hook_names}

    def show(
        self,
        token_ids: Int[Tensor, "sequence position"],
        hook_names: Sequence[str],
        see: Callable[[str, Float[Tensor, "sequence position d_in"]], object],
    ) -> None:
        """Call `see(hook_name, activation)` at each of `hook_names` when it is there, in the order of the model.

        What `see` does not keep is freed as in any forward pass; nothing after the last hook is run. Raises as
        `activations`, and what `see` raises.
        """
        if not hook_names:
            raise ValueError("activations: hook_names must name at least one hook, got none")
        left = set(hook_names)

        def visit(hook_name: str, x: Tensor) -> None:
            see(hook_name, x)
            left.discard(hook_name)
            if not left:
                raise _AllShown

        for hook_name in hook_names:
            self._check(hook_name)
        try:
            self._forward(token_ids, {hook_name: partial(visit, hook_name) for hook_name in dict.fromkeys(hook_names)})
        except _AllShown:
            return
        raise ModelError(f"{self.identity['name']}: the forward pass never reached {sorted(left)}; leave them out")

    def logits(
        self,
        token_ids: Int[Tensor, "sequence position"],
        *,
        show: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """The output of the whole model. show: what gets an activation to see on the way, by the hook's name.

        Raises:
            ModelError: a hook does not exist, or the model has no output head.
        """
        for name in show or {}:
            self._check(name)
        return self._forward(token_ids, dict(show or {}))

    def logits_with(
        self,
        token_ids: Int[Tensor, "sequence position"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
        *,
        show: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """The output of the whole model with the activation at `hook_name` replaced by `replace(activation)`.

        `replace` gets [sequence, position, d_in] and returns the same shape; its result is cast to the model's dtype.
        show: what else gets an activation to see, by the hook's name, in the same pass and so before what comes after.
        At hook_resid_mid the residual stream itself is replaced, not only what the MLP reads, as in HookedTransformer.

        Raises:
            ModelError: the hook does not exist, or the model has no output head.
            ValueError: `replace` returned another shape.
        """
        for name in (hook_name, *(show or {})):
            self._check(name)
        return self._forward(token_ids, {**(show or {}), **_replacing(hook_name, _same_shape(replace))})

    def unembedding(self) -> Unembedding:
        """The final norm, measured by running it on chosen streams, and the output head.

        So what wraps the norm acts as in normal use, and it may be of any family. Costs a forward pass of a few tokens.

        Raises:
            ModelError: the model has no output head, or something else than one LayerNorm or RMSNorm before it.
        """
        if self._head is None:
            raise ModelError(f"{self.identity['name']}: the checkpoint has no output head to read directions with")
        probes, seen = norm_probes(self.d_model), dict[str, Tensor]()
        handle = self._head.register_forward_pre_hook(lambda module, args: seen.update(normed=args[0][0]))
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        try:
            self.logits_with(torch.zeros((1, len(probes)), dtype=torch.long), last, lambda x: probes[None])
        finally:
            handle.remove()
        with align_module_device(self._head):  # where it is computed, if it is offloaded
            W_U, b_U = self._head.weight.detach(), self._head.bias
        return measured_unembedding(seen["normed"], W_U, None if b_U is None else b_U.detach(), self.identity["name"])

    @abstractmethod
    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook. Raises ModelError for an unknown hook, listing near names."""

    def logits_from(
        self,
        token_ids: Int[Tensor, "sequence position"],
        start: Float[Tensor, "sequence position d_model"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "sequence position vocab"]:
        """As `logits_with`, bit for bit, without running again what comes before `stream_before(hook_name)`.

        start: the activation there in an earlier pass over the same tokens.

        Raises:
            ModelError, ValueError: as `logits_with`; ModelError too where `stream_before` is None.
        """
        raise ModelError(f"{self.identity['name']}: each pass of this backend begins at the embedding; use logits_with")

    def stream_before(self, hook_name: str) -> str | None:
        """The hook where `logits_from` begins, hook_resid_pre of the same block; None if all passes begin at the
        embedding. Raises ModelError if the hook does not exist.
        """
        self._check(hook_name)
        return None

    @abstractmethod
    def _check(self, hook_name: str) -> None:
        """Raise ModelError if the model has no such hook."""

    @abstractmethod
    def _forward(self, token_ids: Tensor, visits: dict[str, Visit]) -> Tensor:
        """Run the model without gradients, showing each hook's activation to its visit; returns logits."""


class HuggingFaceModel(LanguageModel):
    """Hooks on the transformers module as it is: the fast path.

    The module may be quantised, adapted or spread over devices. The whole module is called, so whatever wraps the
    blocks acts as it does in normal use; the early stop keeps later blocks, the final norm and the output head from
    running. With `compiled`, the blocks' forward passes are replaced by compiled ones for good; a block whose inside is
    asked for (hook_attn_out, hook_resid_mid, hook_mlp_out) runs uncompiled in that pass. So the last bits of an
    activation may depend on which hooks are asked for together.

    Raises:
        ModelError: the model is of a family that is not in the table, or its blocks are not where that family has them.
    """

    backend = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: dict[str, str | None],
        *,
        compiled: bool = False,
    ):
        super().__init__(model, tokenizer, identity)
        config = model.config.get_text_config()
        self._model = model
        self._family = family_of(config, identity["name"])
        self._blocks = blocks_of(model, self._family, self.n_layers, identity["name"])
        sites = [site for site in SITES if site != "hook_resid_mid" or self._family.resid_mid is not None]
        self._hook_names = [f"blocks.{layer}.{site}" for layer in range(self.n_layers) for site in sites]
        self.compiled = compiled
        if compiled:
            compile_blocks_(self._blocks, identity["name"])

    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook: all five sites read or write the residual stream, so it is d_model."""
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
        """The blocks before the hook's are not run: they give `start`, as they did before."""
        self._check(hook_name)
        if start.shape != (*token_ids.shape, self.d_model):
            raise ValueError(
                f"logits_from: start must have shape {(*token_ids.shape, self.d_model)}, got {tuple(start.shape)}; "
                f"pass what {self.stream_before(hook_name)} was for the same tokens"
            )
        with _giving(start, self._blocks[: int(hook_name.split(".")[1])]):
            return self.logits_with(token_ids, hook_name, replace)

    def stream_before(self, hook_name: str) -> str:
        """hook_resid_pre of the hook's block."""
        self._check(hook_name)
        return f"blocks.{hook_name.split('.')[1]}.hook_resid_pre"

    def _check(self, hook_name: str) -> None:
        if hook_name in self._hook_names:
            return
        if hook_name.endswith(".hook_resid_mid") and self._family.resid_mid is None:
            raise ModelError(
                f"{self.identity['name']}: no hook {hook_name!r}: attention and MLP of this model are parallel, both "
                "read hook_resid_pre; use hook_resid_pre or hook_resid_post"
            )
        _unknown_hook(self, hook_name, self._hook_names, "load with --backend transformer_lens for other sites")

    @torch.no_grad()
    def _forward(self, token_ids: Tensor, visits: dict[str, Visit]) -> Tensor:
        if self.max_positions is not None and token_ids.shape[1] > self.max_positions:
            raise ModelError(
                f"{self.identity['name']}: sequences have at most {self.max_positions} tokens, got "
                f"{token_ids.shape[1]}; pass a smaller --context-size, or a shorter text"
            )
        with ExitStack() as stack:
            for hook_name, visit in visits.items():
                stack.callback(self._attach(hook_name, visit).remove)
            token_ids = token_ids.to(self.device, non_blocking=True)
            # A mask of ones changes nothing; without it GPT-2 warns about padding when BOS is also the pad token.
            output = self._model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)
        if "logits" not in output:
            raise ModelError(f"{self.identity['name']}: the checkpoint has no output head, so no logits; use one with")
        return output["logits"]

    def _attach(self, hook_name: str, visit: Visit) -> RemovableHandle:
        """Show `visit` the activation whenever the module runs, until the handle is removed."""
        _, layer, site = hook_name.split(".")
        block = self._blocks[int(layer)]
        family = self._family
        match site:
            case "hook_resid_pre":
                return block.register_forward_pre_hook(_on_input(visit))
            case "hook_attn_out":
                return block.get_submodule(family.attn_out).register_forward_hook(_on_output(visit))
            case "hook_resid_mid":
                assert family.resid_mid is not None, "checked by _check"
                return block.get_submodule(family.resid_mid).register_forward_pre_hook(_on_input(visit))
            case "hook_mlp_out":
                return block.get_submodule(family.mlp_out).register_forward_hook(_on_output(visit))
            case _:
                return block.register_forward_hook(_on_output(visit))


class BridgeModel(LanguageModel):
    """TransformerLens' TransformerBridge around the same module: every hook of the bridge, many more families.

    No compatibility mode: its centring changes the residual stream. The bridge computes attention itself ("eager").
    Hooks with several axes for a token, such as `attn.hook_z`, are flattened to [sequence, position, d_in].
    The module belongs to the bridge afterwards.

    Raises:
        ModelError: the bridge does not support the model.
    """

    backend = "transformer_lens"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: dict[str, str | None]):
        super().__init__(model, tokenizer, identity)
        # Imported here: it takes seconds, and only this backend needs it.
        from transformer_lens.model_bridge import TransformerBridge

        # The bridge gets token ids only, but wants a tokenizer, changes it, and if it has a BOS fetches it anew.
        spare = copy.deepcopy(tokenizer)
        spare.bos_token = None
        # With hf_model the bridge reads the family from the config, never from the name (a path may hold 'llama').
        try:
            self._bridge = TransformerBridge.boot_transformers(
                cast(str, identity["name"]), hf_model=model, tokenizer=spare, device=self.device, dtype=self.dtype
            )
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(
                f"{identity['name']}: TransformerLens cannot take model_type {model.config.model_type!r}: {reason}; "
                "use a model of a family that it supports"
            ) from None

    def hook_widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """d_in of each hook, from one forward pass of one token."""
        token_ids = torch.zeros((1, 1), dtype=torch.long)
        return {hook_name: x.shape[-1] for hook_name, x in self.activations(token_ids, hook_names).items()}

    def _check(self, hook_name: str) -> None:
        if hook_name not in self._bridge.hook_dict:
            _unknown_hook(self, hook_name, list(self._bridge.hook_dict), "see the bridge's hook_dict for all")
        if hook_name.endswith(("hook_pattern", "hook_attn_scores")):
            raise ModelError(f"{self.identity['name']}: {hook_name} has no vector for each token; choose another hook")
        try:
            self._bridge.check_hooks_to_add(hook_name)  # some are off until a flag is set that slows every pass
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ModelError(f"{self.identity['name']}: {reason}; choose another hook") from None

    @torch.no_grad()
    def _forward(self, token_ids: Tensor, visits: dict[str, Visit]) -> Tensor:
        token_ids = token_ids.to(self.device, non_blocking=True)
        fwd_hooks: list[tuple[str | Callable, Callable]] = [
            (hook_name, self._flat(hook_name, token_ids.shape, visit)) for hook_name, visit in visits.items()
        ]
        return self._bridge.run_with_hooks(token_ids, fwd_hooks=fwd_hooks, return_type="logits")

    def _flat(self, hook_name: str, shape: torch.Size, visit: Visit) -> Callable[..., Tensor | None]:
        """The visit as a hook of the bridge; it sees [sequence, position, d_in] whatever the shape there."""

        def hook_fn(x: Tensor, hook: object) -> Tensor | None:
            if x.ndim < 3 or x.shape[:2] != shape:
                raise ModelError(
                    f"{self.identity['name']}: {hook_name} must have a vector for each of {tuple(shape)} tokens, "
                    f"got shape {tuple(x.shape)}; choose another hook"
                )
            replaced = visit(x.flatten(2))
            return None if replaced is None else replaced.view_as(x)

        return hook_fn


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    backend: str = "hf",
    attention: str = "auto",
    compile: bool = False,
) -> LanguageModel:
    """Load a causal language model and its tokenizer from a local directory or the Hugging Face hub.

    A hub name is taken from the local hub cache if it is there whole, without asking the network.

    Args:
        name_or_path: directory with config.json, weights and tokenizer; or a hub name such as "openai-community/gpt2".
        revision: branch, tag or commit on the hub.
        device: "auto" (cuda if there is one, else cpu) or a torch device.
        device_map: how accelerate spreads the model over all devices: "auto", "balanced", "balanced_low_0",
            "sequential"; each activation is then where its block is. None for one device.
        dtype: "auto" (float32 on the CPU, the checkpoint's elsewhere), "float32", "bfloat16" or "float16".
        backend: "hf" or "transformer_lens".
        attention: "auto" (what transformers prefers for the model), "sdpa", "eager" or "flash_attention_2".
        compile: run the blocks compiled, see HuggingFaceModel; only on one device.

    Raises:
        ConfigError: an unknown word, or settings that exclude each other.
        ModelError: nothing there, something missing or damaged, a family that the backend does not support, or an
            attention kernel that is not to be had.
    """
    _check_settings(device, device_map, backend, attention, compile)
    where = device_of(device)
    source = source_of(str(name_or_path))
    config = load_config(source, revision)
    name = name_of(source)
    if backend == "hf":
        family_of(config.get_text_config(), name)  # before the weights, which may be large
    torch_dtype = dtype_of(dtype, where)
    if attention == "flash_attention_2":
        check_flash_attention(where, torch_dtype, config)
    tokenizer = load_tokenizer(source, revision)
    kernel = "eager" if backend == "transformer_lens" else attention
    model = load_weights(source, revision, name, torch_dtype, kernel, device_map)
    if device_map is None:
        model.to(where)  # pyright: ignore[reportArgumentType]: transformers' stub loses `self`
    identity = model_identity(model, name, revision_of(config, revision))
    if backend == "transformer_lens":
        return BridgeModel(model, tokenizer, identity)
    return HuggingFaceModel(model, tokenizer, identity, compiled=compile)


def wrap_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> LanguageModel:
    """A transformers model that is loaded already: quantised, adapted, spread over devices, or plain.

    Args:
        model: in evaluation mode, of a supported family; used as it is, where it is.
        tokenizer: the model's.
        name: for the record; by default the one that the model was loaded under.

    Raises:
        ModelError: the model is in training mode (dropout would change the activations) or of an unknown family.
    """
    model = cast(PreTrainedModel, model)  # or an adapter's wrapper that passes attributes on
    name = name or name_of(cast(str, model.config.name_or_path)) or type(model).__name__
    if model.training:
        raise ModelError(f"wrap_model: {name} must be in evaluation mode, got training mode; call model.eval() first")
    return HuggingFaceModel(model, tokenizer, model_identity(model, name, revision_of(model.config, None)))


def _check_settings(device: str, device_map: str | None, backend: str, attention: str, compile: bool) -> None:
    """Raise ConfigError for a word that is unknown, or settings that exclude each other."""
    if backend not in BACKENDS:
        raise ConfigError(f"load_model: backend must be one of {list(BACKENDS)}, got {backend!r}")
    if attention not in ATTENTION_KERNELS:
        raise ConfigError(f"load_model: attention must be one of {list(ATTENTION_KERNELS)}, got {attention!r}")
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ConfigError(f"load_model: device_map must be one of {list(DEVICE_MAPS)}, got {device_map!r}")
    if device_map is not None and device != "auto":
        raise ConfigError(
            f"load_model: device_map chooses the devices, so device must be auto, got {device!r} with device_map "
            f"{device_map!r}; leave one of them out"
        )
    if device_map is not None and compile:
        raise ConfigError(
            f"load_model: compile needs the model on one device, got device_map {device_map!r}; leave one of them out"
        )
    if backend == "transformer_lens" and (device_map is not None or compile or attention not in ("auto", "eager")):
        raise ConfigError(
            "load_model: backend transformer_lens computes attention itself (eager), uncompiled, on one device; got "
            f"attention {attention!r}, compile {compile}, device_map {device_map!r}; leave them out or use backend hf"
        )


# Hook names and modules


def _unknown_hook(model: LanguageModel, hook_name: str, hook_names: Sequence[str], way_out: str) -> NoReturn:
    near = get_close_matches(hook_name, hook_names, n=3)
    raise ModelError(
        f"{model.identity['name']}: no hook {hook_name!r}; near names: {', '.join(near) or 'none'}; there are "
        f"{model.n_layers} layers, blocks.0 to blocks.{model.n_layers - 1}, with {', '.join(SITES)}; {way_out}"
    )


def _on_input(visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """The visit as a forward pre-hook: it sees the first positional argument."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = visit(args[0])
        return None if replaced is None else (replaced, *args[1:])

    return hook


def _on_output(visit: Visit) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """The visit as a forward hook: it sees the output, or the first of several (attention also returns weights)."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return visit(output)
        replaced = visit(output[0])
        return None if replaced is None else (replaced, *output[1:])

    return hook


# Replacing


@contextmanager
def _giving(x: Tensor, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let every block give x instead of being run; what its forward was (compiled, offloaded) is put back."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block, _ in before:
            block.forward = lambda *_, **__: x
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _same_shape(replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`replace` with its result checked and cast to the dtype and device of what it replaces."""

    def checked(x: Tensor) -> Tensor:
        replaced = replace(x)
        if replaced.shape != x.shape:
            raise ValueError(
                f"logits_with: replace must keep the shape {tuple(x.shape)}, got {tuple(replaced.shape)}; return one "
                "vector for each token"
            )
        return replaced.to(x)

    return checked


def _replacing(hook_name: str, replace: Callable[[Tensor], Tensor]) -> dict[str, Visit]:
    """The visits that put `replace(x)` in the place of the activation x at the hook.

    hook_resid_mid is only read by the norm before the MLP; the stream goes round it. So the block's output is made
    anew as well, by the add that the block itself does: replaced + mlp_out. Exact: replacing x by x changes no bit.
    That the block does so is checked on the values (ModelError).
    """
    block, _, site = hook_name.rpartition(".")
    if site != "hook_resid_mid":
        return {hook_name: replace}
    kept: dict[str, Tensor] = {}

    def at_mid(x: Tensor) -> Tensor:
        kept["resid_mid"], kept["replaced"] = x, replace(x)
        return kept["replaced"]

    def at_mlp_out(x: Tensor) -> None:
        kept["mlp_out"] = x

    def at_post(x: Tensor) -> Tensor:
        if not torch.equal(x, kept["resid_mid"] + kept["mlp_out"]):
            raise ModelError(
                f"logits_with: replacing {hook_name} needs a block whose output is hook_resid_mid + hook_mlp_out, this "
                "one gives something else; replace at hook_resid_post"
            )
        return kept["replaced"] + kept["mlp_out"]

    return {hook_name: at_mid, f"{block}.hook_mlp_out": at_mlp_out, f"{block}.hook_resid_post": at_post}
