"""A trained SAE for inference: `SAE` encodes, decodes and reconstructs raw activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actcache.models.live import live_model
from trainer.sae.activations import matching_pursuit
from trainer.sae.cfg import ArchitectureName, SAECfg, SAEMetadata
from trainer.sae.normalisation import Normalised, normalised
from trainer.sae.streams import CENTRED, checked_stream

PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")  # settings of matching_pursuit
RESCALED = ("topk", "abstopk")  # their cfg has rescale_acts_by_decoder_norm
HEADS = ("hook_z", "hook_q", "hook_k", "hook_v")  # TransformerLens has them with an axis for the heads
GROUPED = ("groupmax", "groupmax_transcoder", "groupmax_skip_transcoder")
RANKED = (*RESCALED, "topk_transcoder", "topk_skip_transcoder", *GROUPED)  # their cfg has k


def is_transcoder(architecture: str) -> bool:
    """Whether SAEs of this architecture predict the activation at another hook, hook_name_out."""
    return architecture.endswith("transcoder")


class SAE(nn.Module):
    """A sparse autoencoder for inference on raw activations, with SAELens' definitions of the architectures.

    h = x W_enc + b_enc, or (x - b_dec) W_enc + b_enc where subtracts_b_dec is set. x_hat = feature_acts W_dec + b_dec.
    Everything is computed in the weights' dtype, on their device.

    feature_acts, by architecture:
        standard          ReLU(h).
        topk              ReLU of the k largest h of a row.
        abstopk           the k entries of a row with the largest |h|, with their signs.
        groupmax          ReLU of the largest h of each of k groups of neighbours.
        jumprelu          ReLU(h) where h > threshold, else 0.
        gated             ReLU(exp(r_mag) h + b_mag) where h + b_gate > 0, else 0. h has no b_enc here.
        matching_pursuit  as `activations.matching_pursuit`. W_enc is W_dec transposed. b_dec is added to x_hat only
                          where it is subtracted from x.
        crosscoder        as standard, where x and x_hat are the activations at all hook_names, side by side.

    With rescale_acts_by_decoder_norm, topk and abstopk multiply h by ||d_i|| first, and the decoder divides by it.
    A transcoder is as standard, but x_hat predicts the activation at hook_name_out. jumprelu_transcoder,
    topk_transcoder and groupmax_transcoder are as their first parts in the same way. Where the name holds `skip`,
    W_skip x is added to x_hat.

    x is what `seen` gives of the activation at hook_name, and x_hat stands for what `target` gives of that at
    output_hooks. Where normalize_activations is not "none", each row is normalised before it is encoded, and x_hat is
    brought back to the units of x; a transcoder's x_hat is not.

    It is a torch module. Its parameters are the tensors that SAELens saves, by the same names; they have no gradients
    before `requires_grad_()`. x may have any number of axes before d_in, as prompts [batch, position, d_in] have.
    """

    reads_sequences = False  # whether x is [*batch, position, d_in], whole sequences, and not rows in any order

    W_enc: nn.Parameter  # [d_in, d_sae]
    W_dec: nn.Parameter  # [d_sae, d_out]
    b_dec: nn.Parameter  # [d_out]
    b_enc: nn.Parameter | None  # [d_sae], as the four below
    threshold: nn.Parameter | None
    b_gate: nn.Parameter | None
    b_mag: nn.Parameter | None
    r_mag: nn.Parameter | None
    W_skip: nn.Parameter | None  # [d_out, d_in]
    log_sparsity: Tensor | None

    def __init__(
        self,
        *,
        architecture: str,
        hook_name: str,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        W_enc: Float[Tensor, "d_in d_sae"] | None = None,
        hook_name_out: str | None = None,
        hook_names: tuple[str, ...] | None = None,
        hook_widths: tuple[int, ...] | None = None,
        W_skip: Float[Tensor, "d_out d_in"] | None = None,
        b_enc: Float[Tensor, " d_sae"] | None = None,
        threshold: Float[Tensor, " d_sae"] | None = None,
        b_gate: Float[Tensor, " d_sae"] | None = None,
        b_mag: Float[Tensor, " d_sae"] | None = None,
        r_mag: Float[Tensor, " d_sae"] | None = None,
        k: int | None = None,
        rescale_acts_by_decoder_norm: bool = False,
        residual_threshold: float = 0.0,
        max_iterations: int | None = None,
        stop_on_duplicate_support: bool = False,
        normalize_activations: str = "none",
        subtracts_b_dec: bool,
        metadata: Mapping[str, Any],
    ):
        """Make an SAE of tensors and settings, as the class describes them. The tensors are not copied.

        Args:
            W_enc: left out for matching_pursuit alone.
            hook_widths: d_in of each of hook_names.
            normalize_activations: one of NORMALISATIONS.
            metadata: what else is known of the SAE, by SAELens' names: model_name, context_size, ... Two of them count
                here. With hook_head_index the SAE is of one attention head. Where model_from_pretrained_kwargs say
                center_writing_weights, it is of a model whose residual stream has mean 0 over d_model at each token.
        """
        super().__init__()
        self.architecture, self.metadata = architecture, metadata
        self.hook_name, self.hook_name_out = hook_name, hook_name_out
        self.hook_names, self.hook_widths = hook_names, hook_widths
        self.k, self.rescale_acts_by_decoder_norm = k, rescale_acts_by_decoder_norm
        self.residual_threshold, self.max_iterations = residual_threshold, max_iterations
        self.stop_on_duplicate_support = stop_on_duplicate_support
        self.normalize_activations, self.subtracts_b_dec = normalize_activations, subtracts_b_dec
        self.hook_head_index: int | None = metadata.get("hook_head_index")
        self.is_centred = bool((metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))
        # [d_sae], log10 of how often each latent fires, where that is known; it moves with the SAE
        self.register_buffer("log_sparsity", None, persistent=False)
        weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        weights |= {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag, "W_skip": W_skip}
        for name, weight in weights.items():
            held = None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
            self.register_parameter(name, held)

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str, device: torch.device | str = "cpu") -> SAE:
        """A published SAE: of SAELens' registry where sae_lens is installed, or of a repository of the hub.

        As in SAELens before 6, `sae, cfg_dict, sparsity = SAE.from_pretrained(...)` works too.

        Args:
            release: such as "gpt2-small-res-jb"; or owner/name or hf://owner/name of a repository of the hub.
            sae_id: such as "blocks.8.hook_resid_pre"; or a folder of the repository, as SAELens, sparsify or
                dictionary_learning save one.
            device: where the weights are put.

        Raises:
            ConfigError: sae_lens is needed and not installed, or there is no such release or id.
            ManifestError: the files cannot be downloaded, or are malformed.
            CacheMismatch: the SAE is of activations that no raw model has.
        """
        from trainer.formats.pretrained import from_pretrained  # here: the readers make this class

        return from_pretrained(release, sae_id, device)

    @classmethod
    def load_from_disk(cls, path: Path | str, device: torch.device | str = "cpu") -> SAE:
        """The SAE of a RUN folder, or of a folder as SAELens, sparsify or dictionary_learning save one.

        Raises ManifestError, CacheMismatch and ConfigError as `from_pretrained`.
        """
        from trainer.formats.pretrained import load_from_disk

        return load_from_disk(path, device)

    def save(self, path: Path | str) -> Path:
        """Write a SAELens directory, cfg.json and sae_weights.safetensors. The same again does nothing. Returns `path`.

        Raises:
            CacheMismatch: there is something else at `path`.
            CacheLocked: another process is writing there.
        """
        from trainer.formats.saelens import save_sae

        return save_sae(self, path)

    def __iter__(self) -> Iterator[Any]:
        """The SAE, its cfg and its log_sparsity, which is what `SAE.from_pretrained` gave in SAELens before 6."""
        return iter((self, self.cfg, self.log_sparsity))

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self.W_dec.T if found is None and name == "W_enc" else found

    @property
    def cfg(self) -> SAECfg:
        """The settings by SAELens' names, as of now. A change of it changes nothing here."""
        hook_out = {} if self.hook_name_out is None else {"hook_name_out": self.hook_name_out}
        cfg: dict[str, Any] = {
            "architecture": ArchitectureName(self.architecture),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "apply_b_dec_to_input": self.subtracts_b_dec,
            "normalize_activations": self.normalize_activations,
            # the activation of hook_z is [..., head, d_head]; SAELens flattens it only if it is told to
            "reshape_activations": "hook_z" if self._reads_heads and not hook_out else "none",
            "metadata": SAEMetadata({**self.metadata, "hook_name": self.hook_name, **hook_out}),
        }
        return SAECfg(cfg | self._own_cfg)

    @property
    def _own_cfg(self) -> dict[str, Any]:
        """The settings that only SAEs of this architecture have."""
        own: dict[str, Any] = {"k": self.k} if self.architecture in RANKED else {}
        if self.architecture in RESCALED:
            own |= {"rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}
        if self.architecture == "matching_pursuit":
            own |= {name: getattr(self, name) for name in PURSUIT}
        if is_transcoder(self.architecture):
            own |= {"d_out": self.d_out}
        if self.hook_names is not None:
            own |= {"hook_names": list(self.hook_names), "hook_widths": list(self.hook_widths or ())}
        return own

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations are x, side by side."""
        return self.hook_names or (self.hook_name,)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations x_hat reconstructs, side by side."""
        return self.input_hooks if self.hook_name_out is None else (self.hook_name_out,)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of x_hat."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights. x must be there too."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything is computed."""
        return self.W_dec.dtype

    def seen(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rest d_in"]:
        """What the SAE reads of the activation at its hook; what this gives may be given again.

        Of all heads side by side it is the one of hook_head_index. Heads on an axis of their own,
        [..., head, d_head], are put side by side. The mean over d_model of a stream is subtracted if the SAE is of a
        centred model. That model has the same activations as the raw one elsewhere: the mean is what its LayerNorms
        take away.
        """
        return self._part(x, self.d_in, self.input_hooks)

    def target(self, y: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rest d_out"]:
        """What x_hat reconstructs of the activation at output_hooks, as `seen`."""
        return self._part(y, self.d_out, self.output_hooks)

    def placed(self, y: Float[Tensor, "*batch width"], x_hat: Float[Tensor, "*rest d_out"]) -> Tensor:
        """The activation at output_hooks with x_hat in the place of what it reconstructs, of the shape of y."""
        if self._centres(self.output_hooks):
            x_hat = x_hat + y.to(x_hat.dtype).mean(-1, keepdim=True)
        if (head := self._head_of(y.shape[-1], self.d_out)) is not None:
            return torch.cat([y[..., : head.start].to(x_hat), x_hat, y[..., head.stop :].to(x_hat)], dim=-1)
        return x_hat.reshape(y.shape)

    def added(self, y: Float[Tensor, "*batch width"], change: Float[Tensor, "*batch d_out"]) -> Tensor:
        """The activation at output_hooks with `change` added to what x_hat reconstructs of it."""
        if (head := self._head_of(y.shape[-1], self.d_out)) is not None:
            change = nn.functional.pad(change, (head.start, y.shape[-1] - head.stop))
        return y + change

    def takes(self, width: int) -> bool:
        """Whether activations of this width are those of input_hooks."""
        return width == self.d_in or self._head_of(width, self.d_in) is not None

    def gives(self, width: int) -> bool:
        """Whether activations of this width are those of output_hooks."""
        return width == self.d_out or self._head_of(width, self.d_out) is not None

    def own_channels(self, width: int) -> tuple[int, int] | None:
        """(first, end) of the channels that x_hat reconstructs of an activation of this width; None for all."""
        head = self._head_of(width, self.d_out)
        return None if head is None else (head.start, head.stop)

    def output_scale(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rest 1"] | None:
        """By what a decoded change of x's feature activations is multiplied in x_hat; None stands for 1."""
        is_whole = self.normalize_activations == "none" or is_transcoder(self.architecture)
        return None if is_whole else self._normalised(x).scale

    def check(self, model: Any) -> str:
        """Which residual stream the SAE is of, and which the model has, in words.

        `TransformerLens` can make a model's stream centred: its mean over d_model is 0 at each token, and its logits
        stay the same. An SAE of one stream computes nonsense on the other. A centred SAE takes the raw stream too,
        because `seen` subtracts the mean; but only a model with LayerNorm has the centred one.

        Args:
            model: the language model whose activations the SAE is given, as `live_model` takes it.

        Raises:
            CacheMismatch: they do not fit.
        """
        return checked_stream(live_model(model), (*self.input_hooks, *self.output_hooks), is_centred=self.is_centred)

    def encode(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rest d_sae"]:
        """The feature activations of raw activations x, which may have any float dtype, in the weights' dtype."""
        return self._encode(self._normalised(x).z)

    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """x_hat from the feature activations, in the weights' dtype. W_skip x, if there is one, is not part of it.

        Args:
            feature_acts: as `encode` gives them.
            x: the activations that they are of; needed where each row is normalised, and not looked at elsewhere.

        Raises:
            ValueError: x is needed and not given.
        """
        x_hat = self._decode(feature_acts)
        if self.normalize_activations == "none" or is_transcoder(self.architecture):
            return x_hat
        if x is None:
            raise ValueError(
                f"SAE.decode: an SAE with normalize_activations {self.normalize_activations!r} needs the rows whose "
                "features these are; pass decode(feature_acts, x)"
            )
        return self._normalised(x).undone(x_hat)

    def reconstruct(
        self, x: Float[Tensor, "*batch width"]
    ) -> tuple[Float[Tensor, "*rest d_sae"], Float[Tensor, "*rest d_out"]]:
        """(feature_acts, x_hat) of raw activations, in the weights' dtype."""
        given = self._normalised(x)
        feature_acts = self._encode(given.z)
        x_hat = self._decode(feature_acts)
        if not is_transcoder(self.architecture):
            x_hat = given.undone(x_hat)
        return feature_acts, x_hat if self.W_skip is None else x_hat + self.seen(x).to(self.dtype) @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*rest d_out"]:
        """x_hat of raw activations, in the weights' dtype."""
        return self.reconstruct(x)[1]

    def _normalised(self, x: Tensor) -> Normalised:
        return normalised(self.seen(x).to(self.dtype), self.normalize_activations)

    def _encode(self, x: Tensor) -> Tensor:
        centred = x - self.b_dec if self.subtracts_b_dec else x
        if self.architecture == "matching_pursuit":
            settings = {name: getattr(self, name) for name in PURSUIT}
            feature_acts = matching_pursuit(centred.reshape(-1, self.d_in), self.W_dec, **settings)
            return feature_acts.reshape(*x.shape[:-1], self.d_sae)
        pre_acts = centred @ self.W_enc
        if self.b_gate is not None and self.b_mag is not None and self.r_mag is not None:
            magnitude = centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag  # rounded as SAELens rounds it
            return (pre_acts + self.b_gate > 0) * magnitude.relu()
        if self.b_enc is not None:
            pre_acts = pre_acts + self.b_enc
        if self.rescale_acts_by_decoder_norm:
            pre_acts = pre_acts * self.W_dec.norm(dim=-1)
        if self.architecture in GROUPED:
            grouped = pre_acts.relu().unflatten(-1, (self.k or 1, -1))
            best = grouped.max(dim=-1, keepdim=True)
            return torch.zeros_like(grouped).scatter(-1, best.indices, best.values).flatten(-2)
        if self.k is not None:
            signed = self.architecture == "abstopk"
            top = (pre_acts.abs() if signed else pre_acts).topk(self.k, dim=-1, sorted=False).indices
            active = pre_acts.gather(-1, top)
            return torch.zeros_like(pre_acts).scatter_(-1, top, active if signed else active.relu())
        if self.threshold is not None:
            return pre_acts.relu() * (pre_acts > self.threshold)
        return pre_acts.relu()

    def _decode(self, feature_acts: Tensor) -> Tensor:
        if self.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self.W_dec.norm(dim=-1))
        x_hat = feature_acts @ self.W_dec
        has_bias = self.subtracts_b_dec or self.architecture != "matching_pursuit"
        return x_hat + self.b_dec if has_bias else x_hat

    def _part(self, x: Tensor, width: int, hook_names: tuple[str, ...]) -> Tensor:
        """What counts of an activation at hooks: width channels of it, without their mean where that is not seen."""
        if (head := self._head_of(x.shape[-1], width)) is not None:
            return x[..., head]
        if self._reads_heads and x.shape[-1] != width and x.ndim > 1 and x.shape[-2] * x.shape[-1] == width:
            return x.flatten(-2)
        if self._centres(hook_names):
            x = x.to(torch.promote_types(torch.promote_types(x.dtype, torch.float32), self.dtype))
            return x - x.mean(-1, keepdim=True)
        return x

    @property
    def _reads_heads(self) -> bool:
        """Whether x is all heads' activations, which TransformerLens has as [..., head, d_head]."""
        return self.hook_head_index is None and self.hook_name.endswith(HEADS)

    def _centres(self, hook_names: tuple[str, ...]) -> bool:
        return self.is_centred and CENTRED.fullmatch(hook_names[0]) is not None

    def _head_of(self, width: int, d_head: int) -> slice | None:
        """The channels of the SAE's head among those of all heads; None where all channels are its own."""
        if self.hook_head_index is None or width == d_head or width % d_head:
            return None
        start = self.hook_head_index * d_head
        return slice(start, start + d_head) if start < width else None

    def __repr__(self) -> str:
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        hooks = {"hook_name": " + ".join(self.input_hooks), "hook_name_out": self.hook_name_out}
        where = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        said = {"architecture": self.architecture, **sizes, **hooks, **where}
        return f"SAE({', '.join(f'{name}={value}' for name, value in said.items() if value is not None)})"
