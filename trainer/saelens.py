"""Inference SAEs in SAELens' directory format: cfg.json beside sae_weights.safetensors, written and read without
sae_lens.

What is written takes raw activations: the input scale is folded into the weights. With s the scale of training,
h = (s x - b_dec) W_enc + b_enc = (x - b_dec / s) (s W_enc) + b_enc, so W_enc *= s, W_dec /= s, b_dec /= s;
pre-activations, b_enc and thresholds stay as they are.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from actcache.errors import CacheMismatch, ManifestError
from actcache.writer import sync_folder, write_atomically
from trainer.config import BATCH_FAMILY, TRANSCODERS, SAEConfig, ScaledHook, subtracts_b_dec

SAE_LENS_VERSION = "6.54.12"  # whose format is written; a reader drops the metadata of anything under 6.0.0
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated", *TRANSCODERS)
ARCHITECTURES = (*SAELENS_ARCHITECTURES, "crosscoder")  # the last in the same two files, which SAELens cannot read
RANKED = ("topk", "abstopk")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SAE:
    """A sparse autoencoder for inference on raw activations, as SAELens defines its architectures.

    h = (x - b_dec if subtracts_b_dec else x) W_enc + b_enc; feature_acts are ReLU(h) (standard), ReLU of the k largest
    h of a row (topk), the k of largest |h| (abstopk; both ranked and scaled by ||d_i|| where
    rescale_acts_by_decoder_norm), or ReLU(h) where h > threshold (jumprelu). gated has no b_enc: feature_acts are
    ReLU(exp(r_mag) h + b_mag) where h + b_gate > 0. x_hat = feature_acts W_dec + b_dec. Everything is computed in the
    weights' dtype, on their device.

    transcoder and skip_transcoder are as standard, but x_hat is of the activation at hook_name_out, and the latter adds
    W_skip x. A crosscoder is as standard for the activations at all of its hook_names side by side.
    """

    architecture: str
    hook_name: str
    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    hook_name_out: str | None = None
    hook_names: tuple[str, ...] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    b_enc: Float[Tensor, " d_sae"] | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None
    b_mag: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    subtracts_b_dec: bool
    metadata: Mapping[str, Any]

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """Whose activations x is, side by side."""
        return self.hook_names or (self.hook_name,)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """Whose activations x_hat is."""
        return self.input_hooks if self.hook_name_out is None else (self.hook_name_out,)

    @property
    def d_in(self) -> int:
        """Width of the activations it takes."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of x_hat."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so where x must be."""
        return self.W_enc.device

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of raw activations of any float dtype; the result has the weights' dtype."""
        x = x.to(self.W_enc.dtype)
        centred = x - self.b_dec if self.subtracts_b_dec else x
        pre_acts = centred @ self.W_enc
        if self.b_gate is not None and self.b_mag is not None and self.r_mag is not None:
            magnitude = centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag  # rounded as SAELens rounds it
            return (pre_acts + self.b_gate > 0) * magnitude.relu()
        if self.b_enc is not None:
            pre_acts = pre_acts + self.b_enc
        if self.rescale_acts_by_decoder_norm:
            pre_acts = pre_acts * self.W_dec.norm(dim=-1)
        if self.k is not None:
            signed = self.architecture == "abstopk"
            top = (pre_acts.abs() if signed else pre_acts).topk(self.k, dim=-1, sorted=False).indices
            kept = pre_acts.gather(-1, top)
            return torch.zeros_like(pre_acts).scatter_(-1, top, kept if signed else kept.relu())
        if self.threshold is not None:
            return pre_acts.relu() * (pre_acts > self.threshold)
        return pre_acts.relu()

    def reconstruct(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_out"]]:
        """(feature_acts, x_hat) of raw activations, in the weights' dtype."""
        feature_acts = self.encode(x)
        x_hat = self.decode(feature_acts)
        return feature_acts, x_hat if self.W_skip is None else x_hat + x.to(self.W_skip.dtype) @ self.W_skip.T

    def decode(self, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """What the latents give of x_hat, in the weights' dtype: all of it, but for skip_transcoder."""
        if self.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self.W_dec.norm(dim=-1))
        return feature_acts @ self.W_dec + self.b_dec


def save_inference_sae(
    config: SAEConfig, weights: Mapping[str, Tensor], out: Path | str, *, metadata: Mapping[str, Any]
) -> Path:
    """Write a trained SAE as a SAELens directory at `out`, whole or not at all; one that is there is replaced.

    Args:
        config: the SAE's config; `input_scale` is folded, the rest goes into cfg.json under metadata.actcache.
        weights: the training weights, which see scaled activations: W_enc [d_sae, d_in] (transposed here), W_dec
            [d_sae, d_in], b_enc [d_sae] (gated: b_gate, b_mag and r_mag), b_dec [d_in]; threshold on pre-activations,
            [d_sae] or a scalar, for jumprelu, batchtopk and matryoshka_batchtopk, all written as jumprelu.
        metadata: what else cfg.json's metadata should say (model_name, context_size, ...), plain JSON values.

    Returns:
        `out`.

    Raises:
        ValueError: the weights are not those of the config, or not finite.
    """
    architecture = "jumprelu" if config.architecture in BATCH_FAMILY else config.architecture
    tensors = _folded(config, architecture, weights)
    cfg = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": subtracts_b_dec(config.architecture),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            **metadata,
            "sae_lens_version": SAE_LENS_VERSION,
            "sae_lens_training_version": None,
            "training_architecture": config.architecture,
            "hook_name": config.hook_name,
            **({} if config.hook_name_out is None else {"hook_name_out": config.hook_name_out}),
            "actcache": asdict(config),
        },
    }
    if architecture in RANKED:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if architecture in TRANSCODERS:
        cfg |= {"d_out": config.d_out}
    if config.hook_names is not None:
        cfg |= {"hook_names": list(config.hook_names), "hook_widths": list(config.hook_widths or ())}
    return _write_directory(Path(out), {CONFIG_FILE: _json_bytes(cfg), WEIGHTS_FILE: save(tensors)})


def load_sae(path: Path | str, *, device: torch.device | str = "cpu") -> SAE:
    """Read a RUN folder, its sae/, or any SAELens (6.0 or later) directory of one of ARCHITECTURES.

    Raises:
        ManifestError: a file is missing or malformed, a tensor is missing, too many, of a wrong shape or not finite, or
        the
            directory asks for what is not supported (another architecture, normalize_activations, a single head).
        CacheMismatch: the SAE was trained on a centred stream (center_writing_weights), which a raw one is not.
    """
    folder = _sae_folder(Path(path))
    cfg = _read_config(folder / CONFIG_FILE)
    metadata = cfg["metadata"]
    tensors = _read_tensors(folder / WEIGHTS_FILE, cfg, device)
    return SAE(
        architecture=cfg["architecture"],
        hook_name=metadata["hook_name"],
        hook_name_out=metadata["hook_name_out"] if cfg["architecture"] in TRANSCODERS else None,
        hook_names=tuple(cfg["hook_names"]) if cfg["architecture"] == "crosscoder" else None,
        k=cfg["k"] if cfg["architecture"] in RANKED else None,
        rescale_acts_by_decoder_norm=cfg["architecture"] in RANKED and cfg.get("rescale_acts_by_decoder_norm", False),
        subtracts_b_dec=cfg.get("apply_b_dec_to_input", True),
        metadata=metadata,
        **tensors,
    )


def export_sae(run: Path | str, out: Path | str) -> Path:
    """Copy the SAE of a RUN folder (or of a SAELens directory) to `out`, where SAELens can load it; returns `out`.

    Raises:
        ManifestError: there is no SAE at `run` that `load_sae` takes, or it is a crosscoder, which SAELens has not.
        CacheMismatch: `out` is there and holds something else than the same SAE.
    """
    if load_sae(run).architecture not in SAELENS_ARCHITECTURES:
        raise ManifestError(
            f"export: SAELens has {', '.join(SAELENS_ARCHITECTURES)}, {run} is a crosscoder; load it with load_sae"
        )
    source, out = _sae_folder(Path(run)), Path(out).absolute()
    files = {name: (source / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    if out.exists() and not out.is_dir():
        raise CacheMismatch(f"export: {out} must be a directory, got a file; choose another --out")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held == sorted(files) and all((out / name).read_bytes() == data for name, data in files.items()):
        return out
    if held:
        raise CacheMismatch(f"export: {out} must be new or empty, it holds {_some(held)}; choose another --out")
    return _write_directory(out, files)


def _folded(config: SAEConfig, architecture: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file: checked, scale folded in float64, W_enc transposed, contiguous, on the CPU."""
    shapes = _shapes(architecture, config.d_in, config.d_sae, config.d_out)
    names = [name for name in shapes if name != "W_enc"]
    if set(weights) != {"W_enc", *names}:
        raise ValueError(f"save_inference_sae: {config.architecture} has W_enc, {', '.join(names)}; got {[*weights]}")
    x, y = _per_channel(config.inputs, config), 1 / _per_channel(config.outputs, config)
    scale = {"W_enc": x[:, None], "W_dec": y, "b_dec": y, "W_skip": y[:, None] * x}
    tensors = {}
    for name, shape in shapes.items():
        tensor = weights[name].detach().to("cpu")
        tensor = tensor.T if name == "W_enc" else tensor.expand(shape) if name == "threshold" else tensor
        if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
            raise ValueError(f"save_inference_sae: {name} must be finite of shape {shape}, got {tuple(tensor.shape)}")
        tensors[name] = (tensor.double() * scale.get(name, 1.0)).to(tensor.dtype).contiguous()
    return tensors


def _per_channel(hooks: Sequence[ScaledHook], config: SAEConfig) -> Float[Tensor, " #width"]:
    """What each channel of the hooks side by side is multiplied by, float64; one number where they are one hook."""
    widths = config.hook_widths or (1,)
    scales = torch.tensor([hook.scale for hook in hooks], dtype=torch.float64)
    return scales.repeat_interleave(torch.tensor(widths))


def _shapes(architecture: str, d_in: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a SAELens directory, exactly."""
    per_latent = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}.get(
        architecture, ("b_enc",)
    )
    matrices = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture == "skip_transcoder":
        matrices["W_skip"] = (d_out, d_in)
    return {**matrices, **dict.fromkeys(per_latent, (d_sae,))}


def _sae_folder(path: Path) -> Path:
    for folder in (path, path / "sae"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ManifestError(
        f"load_sae: {path} must be a RUN folder or a SAELens directory, it has neither {CONFIG_FILE} nor "
        f"sae/{CONFIG_FILE}; finish the training of that run or pass another path"
    )


def _read_config(path: Path) -> dict[str, Any]:
    """cfg.json, checked to be of an SAE that `SAE` computes."""
    try:
        cfg = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ManifestError(f"load_sae: {path} must be readable JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise ManifestError(f"load_sae: {path} must be a JSON object with an object `metadata`")
    cfg = {**cfg, "metadata": cfg.get("metadata", {})}
    _check_version(path, cfg)
    _check_fields(path, cfg)
    _check_stream(path, cfg)
    return cfg


def _check_version(path: Path, cfg: dict[str, Any]) -> None:
    version = cfg.get("sae_lens_version") or cfg["metadata"].get("sae_lens_version")
    major = str(version).partition(".")[0]
    if not major.isdecimal() or int(major) < 6:
        raise ManifestError(
            f"load_sae: {path} must be written by SAELens 6.0.0 or later, got sae_lens_version={version!r}; "
            "load it with sae_lens and save it again with save_model"
        )


def _check_fields(path: Path, cfg: dict[str, Any]) -> None:
    if cfg.get("architecture") not in ARCHITECTURES:
        raise ManifestError(
            f"load_sae: {path}: architecture must be one of {', '.join(ARCHITECTURES)}, got {cfg.get('architecture')!r}"
        )
    more = {"k": RANKED, "d_out": TRANSCODERS}
    for name in ("d_in", "d_sae", *(name for name, users in more.items() if cfg["architecture"] in users)):
        if type(cfg.get(name)) is not int or cfg[name] < 1:
            raise ManifestError(f"load_sae: {path}: {name} must be a positive integer, got {cfg.get(name)!r}")
    if cfg["architecture"] in RANKED and cfg["k"] > cfg["d_sae"]:
        raise ManifestError(f"load_sae: {path}: k must be at most d_sae={cfg['d_sae']}, got k={cfg['k']}")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if type(cfg.get(name, False)) is not bool:
            raise ManifestError(f"load_sae: {path}: {name} must be true or false, got {cfg[name]!r}")
    if _dtype_name(cfg) not in DTYPES:
        raise ManifestError(f"load_sae: {path}: dtype must be one of {', '.join(DTYPES)}, got {cfg.get('dtype')!r}")
    if not isinstance(cfg["metadata"].get("hook_name"), str):
        raise ManifestError(f"load_sae: {path}: metadata.hook_name must say where x comes from, got none")
    _check_hooks(path, cfg)


def _check_hooks(path: Path, cfg: dict[str, Any]) -> None:
    if cfg["architecture"] in TRANSCODERS and not isinstance(cfg["metadata"].get("hook_name_out"), str):
        raise ManifestError(f"load_sae: {path}: metadata.hook_name_out must say what x_hat is of, got none")
    names, widths = cfg.get("hook_names"), cfg.get("hook_widths")
    if cfg["architecture"] == "crosscoder" and not (
        isinstance(names, list)
        and isinstance(widths, list)
        and len(names) == len(widths)
        and all(isinstance(name, str) for name in names)
        and all(type(width) is int and width > 0 for width in widths)
        and sum(widths) == cfg["d_in"]
    ):
        raise ManifestError(
            f"load_sae: {path}: hook_names and hook_widths must say what x is of, d_in={cfg['d_in']} in all, got "
            f"{names} and {widths}"
        )


def _check_stream(path: Path, cfg: dict[str, Any]) -> None:
    """Refuse an SAE whose x is not the raw activation of one whole hook."""
    normalisation = cfg.get("normalize_activations", "none")
    if normalisation != "none":
        raise ManifestError(
            f"load_sae: {path}: normalize_activations must be 'none', got {normalisation!r}; "
            "fold the scale into the weights with sae_lens (fold_activation_norm_scaling_factor) and save again"
        )
    head = cfg["metadata"].get("hook_head_index")
    if head is not None:
        raise ManifestError(f"load_sae: {path}: the SAE must read a whole hook, got hook_head_index={head!r}")
    loading = cfg["metadata"].get("model_from_pretrained_kwargs") or {}
    if not isinstance(loading, dict) or loading.get("center_writing_weights", False):
        raise CacheMismatch(
            f"load_sae: {path} was trained on a centred residual stream (model_from_pretrained_kwargs={loading!r}), "
            "a cache holds the raw one; train an SAE on the cache"
        )


def _dtype_name(cfg: dict[str, Any]) -> str:
    return str(cfg.get("dtype")).removeprefix("torch.")


def _read_tensors(path: Path, cfg: dict[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"load_sae: {path} must be safetensors, got {type(error).__name__}: {error}") from error
    d_out = cfg["d_out"] if cfg["architecture"] in TRANSCODERS else cfg["d_in"]
    shapes = _shapes(cfg["architecture"], cfg["d_in"], cfg["d_sae"], d_out)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != shapes:
        raise ManifestError(f"load_sae: {path} of a {cfg['architecture']} SAE must hold {shapes}, got {got}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not math.isfinite(float(tensor.double().abs().max())):
            raise ManifestError(f"load_sae: {path}: {name} must be finite floats, got NaN, infinity or {tensor.dtype}")
    return {name: tensor.to(device, DTYPES[_dtype_name(cfg)]) for name, tensor in tensors.items()}


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_directory(out: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files aside, fsync, and rename the folder to `out`; a kill leaves either no `out` or a whole one."""
    aside, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, data in files.items():
        write_atomically(aside / name, [data])
    if out.exists():
        out.rename(old)
    aside.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
