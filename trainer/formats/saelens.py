"""SAEs for inference in SAELens' directory format, written and read without sae_lens.

A directory holds cfg.json and sae_weights.safetensors. Runs keep their trained SAE in this format too, in RUN/sae/.
RUN/sae.crc32c.json holds its checksums.

The SAE that is written takes raw activations, because the input scale is folded into the weights. With s the scale of
training, h = (s x - b_dec) W_enc + b_enc = (x - b_dec / s) (s W_enc) + b_enc. So W_enc is multiplied by s, and W_dec
and b_dec are divided by it. Pre-activations, b_enc and thresholds stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from actcache.arguments import device_of, local_path
from actcache.errors import CacheMismatch, ManifestError
from actcache.files import NoFile, contents, contents_of_any_size, is_file, listed, new_folder, write_atomically
from actcache.machine.limits import require_memory_for_array
from trainer.checksums import CHECKSUMS_FILE, check_file, checksums_of, read_checksums, sealed, unless_changed
from trainer.config.settings import BATCH_FAMILY, SAEConfig, ScaledHook, subtracts_b_dec
from trainer.formats.saelens_cfg import DTYPES, SAELENS_ARCHITECTURES, checked_cfg, dtype_name, shapes_of
from trainer.formats.state_dict import uncompiled
from trainer.run_folder import CONFIG_FILE as RUN_CONFIG
from trainer.run_folder import SAE_FOLDER, json_bytes, json_values
from trainer.sae.sae import PURSUIT, RANKED, RESCALED, SAE, is_transcoder
from trainer.sae.temporal import OWN_SETTINGS, TemporalSAE, temporal_parts
from trainer.tensor_file import read_tensors

SAE_LENS_VERSION = "6.54.12"  # the version whose format is written; readers drop the metadata of versions below 6.0.0
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"  # beside them in some folders: log10 of how often each latent fires


def save_inference_sae(
    config: SAEConfig, weights: Mapping[str, Tensor], out: Path | str, *, metadata: Mapping[str, Any]
) -> Path:
    """Write a trained SAE as a SAELens directory at `out`, whole or not at all. An older one is replaced.

    Arguments and errors are those of `inference_sae`. Returns `out`.
    """
    files = sae_files(inference_sae(config, weights, metadata=metadata))
    return write_directory(local_path(out), files, replace=True)


def write_run_sae(run: Path, sae: SAE) -> None:
    """Write the checksums of RUN/sae/, and then the folder, whole or not at all. An older one is replaced."""
    files = sae_files(sae)
    write_atomically(_checksums_file(run / SAE_FOLDER), [sealed(checksums_of(files))])
    write_directory(run / SAE_FOLDER, files, replace=True)


def inference_sae(config: SAEConfig, weights: Mapping[str, Tensor], *, metadata: Mapping[str, Any]) -> SAE:
    """A trained SAE as it is saved.

    Args:
        config: the SAE's config. Its scales are folded into the weights, and all of it goes into cfg.json under
            metadata.actcache.
        weights: the training weights, which take scaled activations; `architectures` gives their shapes. batchtopk and
            matryoshka_batchtopk need a threshold on pre-activations too, [d_sae] or a scalar; they are written as
            jumprelu.
        metadata: what else the metadata in cfg.json should say (model_name, context_size, ...), as plain JSON values.

    Raises:
        ValueError: the weights are not those of the config, or not finite.
    """
    architecture = "jumprelu" if config.architecture in BATCH_FAMILY else config.architecture
    tensors: dict[str, Any] = _folded(config, architecture, weights)
    return SAE(
        architecture=architecture,
        hook_name=config.hook_name,
        hook_name_out=config.hook_name_out,
        hook_names=None if config.hook_names is None else tuple(config.hook_names),
        hook_widths=None if config.hook_widths is None else tuple(config.hook_widths),
        k=config.k if architecture in RANKED else None,
        subtracts_b_dec=subtracts_b_dec(config.architecture),
        metadata={
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            **metadata,
            "sae_lens_training_version": None,
            "training_architecture": config.architecture,
            "actcache": asdict(config),
        },
        **tensors,
    )


def sae_files(sae: SAE) -> dict[str, bytes]:
    """Name -> bytes of the two files of a SAELens directory. Tensors keep their dtype."""
    cfg = sae.cfg.to_dict()
    cfg |= {"device": "cpu", "metadata": {**cfg["metadata"], "sae_lens_version": SAE_LENS_VERSION}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    return {CONFIG_FILE: json_bytes(cfg), WEIGHTS_FILE: save(tensors)}


def load_sae(path: Path | str, *, device: torch.device | str = "cpu") -> SAE:
    """Read the SAE of a RUN folder, of its sae/, or of a directory of SAELens, if it is in ARCHITECTURES.

    Raises:
        ConfigError: `device` is no device of this machine.
        ManifestError: a file is missing or malformed; a tensor is missing, unknown, of a wrong shape or not finite; or
            the SAE is not supported (another architecture, a scale of its rows that its weights lack).
        CacheMismatch: the SAE is of activations that no raw model has, and so no cache (fold_value_biases and others).
    """
    where, folder = device_of("load_sae", device), _sae_folder(local_path(path))
    check_sae(folder)
    return sae_of(read_sae_config(folder), sae_tensors(sae_file(folder, WEIGHTS_FILE)), folder, device=where)


def check_sae(folder: Path) -> None:
    """Raise ManifestError unless the files of RUN/sae/ are as they were written, where their checksums are there.

    That a RUN has none is logged. A SAELens directory is not expected to have any.
    """
    held = _checksums_file(folder)
    checksums = read_checksums(held, warns=_is_of_run(folder))
    for name in checksums:
        check_file(folder / name, checksums, unless_changed(held))


def sae_file(folder: Path, name: str) -> Path:
    """The path of a file of an SAE folder.

    The cache of the Hugging Face hub holds links to its files, and such a link is followed. In a run none is.
    """
    return folder / name if _is_of_run(folder) else local_path(folder / name)


def _is_of_run(folder: Path) -> bool:
    folder = folder.absolute()
    return folder.name == SAE_FOLDER and is_file(folder.with_name(RUN_CONFIG))


def _checksums_file(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.{CHECKSUMS_FILE}")


def sae_of(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, *, device: torch.device | str = "cpu"
) -> SAE:
    """The SAE of a cfg.json and its tensors, in cfg's dtype. Errors name `folder`. Raises as `load_sae`."""
    cfg = checked_cfg(folder / CONFIG_FILE, cfg)
    architecture, metadata = cfg["architecture"], cfg["metadata"]
    known: dict[str, Any] = {**_checked_tensors(folder / WEIGHTS_FILE, cfg, tensors, device)}
    if architecture == "matching_pursuit":
        known |= {name: cfg[name] for name in PURSUIT}
    if architecture == "temporal":
        known = temporal_parts(known) | {name: cfg[name] for name in OWN_SETTINGS}
    return (TemporalSAE if architecture == "temporal" else SAE)(
        architecture=architecture,
        hook_name=metadata["hook_name"],
        hook_name_out=metadata["hook_name_out"] if is_transcoder(architecture) else None,
        hook_names=tuple(cfg["hook_names"]) if architecture == "crosscoder" else None,
        hook_widths=tuple(cfg["hook_widths"]) if architecture == "crosscoder" else None,
        k=cfg["k"] if architecture in RANKED else None,
        rescale_acts_by_decoder_norm=architecture in RESCALED and cfg.get("rescale_acts_by_decoder_norm", False),
        normalize_activations=cfg.get("normalize_activations", "none"),
        subtracts_b_dec=cfg.get("apply_b_dec_to_input", not is_transcoder(architecture)),
        metadata=metadata,
        **known,
    )


def export_sae(run: Path | str, out: Path | str) -> Path:
    """Copy the SAE of a RUN folder, or of a SAELens directory, to `out`, where SAELens can load it. Returns `out`.

    Raises:
        ManifestError: `load_sae` takes no SAE at `run`, or SAELens lacks its architecture.
        CacheMismatch: `out` exists and does not hold the same SAE.
        CacheLocked: another process is writing `out`.
    """
    if (architecture := load_sae(run).architecture) not in SAELENS_ARCHITECTURES:
        raise ManifestError(
            f"export: SAELens has {', '.join(SAELENS_ARCHITECTURES)}, {run} is a {architecture}; load it with load_sae"
        )
    source = _sae_folder(local_path(run))
    files = {name: contents_of_any_size(sae_file(source, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return _written_once(out, files)


def save_sae(sae: SAE, out: Path | str) -> Path:
    """Write an SAE as a SAELens directory at `out`. The same again does nothing. Returns `out`.

    Raises:
        CacheMismatch: `out` exists and holds something else.
        CacheLocked: another process is writing `out`.
    """
    files = sae_files(sae)
    if sae.log_sparsity is not None:
        files[SPARSITY_FILE] = save({"sparsity": sae.log_sparsity.cpu().contiguous()})
    return _written_once(out, files)


def _written_once(out: Path | str, files: Mapping[str, bytes]) -> Path:
    out = local_path(out).absolute()
    if is_file(out):
        raise CacheMismatch(f"export: {out} must be a directory, got a file; choose another --out")
    held = [path.name for path in listed(out)]
    if held == sorted(files) and all(contents_of_any_size(out / name) == data for name, data in files.items()):
        return out
    if held:
        raise CacheMismatch(f"export: {out} must be new or empty, it holds {_some(held)}; choose another --out")
    return write_directory(out, files)


def _folded(config: SAEConfig, architecture: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file, checked and on the CPU. The scales are folded in float64, and W_enc is transposed."""
    shapes = shapes_of({**asdict(config), "architecture": architecture})
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
    """The scale of each channel of the hooks side by side, float64. For a single hook it is one number."""
    widths = config.hook_widths or (1,)
    scales = torch.tensor([hook.scale for hook in hooks], dtype=torch.float64)
    return scales.repeat_interleave(torch.tensor(widths))


def _sae_folder(path: Path) -> Path:
    for folder in (path, path / SAE_FOLDER):
        if is_file(sae_file(folder, CONFIG_FILE)):
            return folder
    raise ManifestError(
        f"load_sae: {path} must be a RUN folder or a SAELens directory, it has neither {CONFIG_FILE} nor "
        f"sae/{CONFIG_FILE}; finish the training of that run or pass another path"
    )


def read_sae_config(folder: Path) -> dict[str, Any]:
    """cfg.json of a SAELens directory. Only this is checked: it is an object, and so is a `metadata` in it."""
    path = sae_file(folder, CONFIG_FILE)
    try:
        cfg = json_values(contents(path))  # SAELens writes NaN for an L0 without steps, here null
    except (NoFile, ValueError) as error:
        raise ManifestError(f"load_sae: {path} must be readable JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise ManifestError(f"load_sae: {path} must be a JSON object with an object `metadata`")
    return cfg


def sae_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises ManifestError if it is not one."""
    try:
        return uncompiled(read_tensors(path))
    except (NoFile, ValueError) as error:
        raise ManifestError(f"load_sae: {path} must be safetensors, got {type(error).__name__}: {error}") from error


def _checked_tensors(
    path: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors in cfg's dtype. Raises ManifestError if their names or shapes are wrong, or one is not finite."""
    shapes = shapes_of(cfg)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != shapes:
        raise ManifestError(f"load_sae: {path} of a {cfg['architecture']} SAE must hold {shapes}, got {str(got)[:500]}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not all(math.isfinite(end) for end in torch.aminmax(tensor)):
            raise ManifestError(f"load_sae: {path}: {name} must be finite floats, got NaN, infinity or {tensor.dtype}")
    dtype = DTYPES[dtype_name(cfg)]
    n_converted = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype != dtype)
    require_memory_for_array(n_converted * dtype.itemsize, f"the weights of {path} in {dtype}")
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def write_directory(out: Path, files: Mapping[str, bytes], *, replace: bool = False) -> Path:
    """Write the files as a folder, as `new_folder` does, which has the same errors. Returns `out`."""
    with new_folder(out, replace=replace) as aside:
        for name, data in files.items():
            write_atomically(aside / name, [data])
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
