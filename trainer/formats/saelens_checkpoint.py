"""SAEs that SAELens saved, training checkpoints among them, read as SAEs for inference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.files import is_file
from actcache.models.hook_names import hooks_of
from trainer.config.settings import BATCH_FAMILY
from trainer.formats.foreign import Names, Tensors, check_latents, said_name
from trainer.formats.saelens import (
    CONFIG_FILE,
    SPARSITY_FILE,
    WEIGHTS_FILE,
    read_sae_config,
    sae_file,
    sae_of,
    sae_tensors,
)
from trainer.formats.saelens_cfg import PURSUIT_THRESHOLD, up_to_date
from trainer.run_folder import finite, read_json
from trainer.sae.sae import SAE

SCALE_FILE = "activation_scaler.json"  # beside a checkpoint of SAELens; it says by what the rows were multiplied
WHITENING_FILE = "activation_whitening.safetensors"  # as that, of an SAE whose rows were whitened
BESIDE = (SCALE_FILE, WHITENING_FILE, SPARSITY_FILE)
INVERSE = 0.1  # how far matrix @ inverse_matrix of a whitening may be from 1: both are float32
SMALLEST_NORM = 1e-8  # the least norm of a decoder row by which SAELens divides


def saelens_sae(folder: Path, names: Names) -> SAE:
    """Read an SAE that SAELens 6 saved (`save_model`, `save_inference_model`), or one of its training checkpoints.

    Raises:
        ManifestError: as `saelens.load_sae`, or the file with the scale of a checkpoint's rows is missing.
        CacheMismatch: as `saelens.load_sae`.
    """
    cfg, tensors = up_to_date(read_sae_config(folder)), sae_tensors(sae_file(folder, WEIGHTS_FILE))
    if cfg.get("normalize_activations") == "expected_average_only_in":
        cfg, tensors = _unscaled(cfg, tensors, sae_file(folder, SCALE_FILE))
    if cfg.get("normalize_activations") == "covariance_whitening" and is_file(sae_file(folder, WHITENING_FILE)):
        cfg, tensors = _unwhitened(cfg, tensors, folder)
    sae = saelens_sae_of(cfg, tensors, folder, names)
    if is_file(held := sae_file(folder, SPARSITY_FILE)):
        sparsity = sae_tensors(held).get("sparsity")
        if sparsity is None or sparsity.shape != (sae.d_sae,) or not sparsity.is_floating_point():
            raise ManifestError(
                f"import: {held} must hold sparsity, a float for each of {sae.d_sae} latents; remove it"
            )
        sae.log_sparsity = sparsity
    return sae


def saelens_sae_of(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, names: Names) -> SAE:
    """The SAE of SAELens' cfg and state dict, whether of inference or of training. Errors name `folder`."""
    cfg, tensors = _for_inference(cfg, tensors, folder)
    metadata = names.over(cfg["metadata"])
    module = hooks_of(str(metadata.get("hook_name")), said_name(metadata, "model_name", folder / CONFIG_FILE))
    if module is not None:  # the model's own name of a module, where SAELens ran it without TransformerLens
        metadata["hook_name"] = module[1]
    return sae_of({**cfg, "metadata": metadata}, tensors, folder)


def _unscaled(cfg: Mapping[str, Any], tensors: Tensors, path: Path) -> tuple[dict[str, Any], Tensors]:
    """Fold the scale s of training into the weights, so that they take raw rows.

    W_enc is multiplied by s; W_dec and b_dec are divided by it. A threshold on h ||d_i|| is divided too, and one on h
    stays. matching_pursuit has one matrix for encoder and decoder, which stays; its residual_threshold is divided by s.
    """
    said = read_json(path).get("scaling_factor") if is_file(path) else None
    scale, rest = finite(said), cfg.get("residual_threshold", PURSUIT_THRESHOLD)
    if not scale:
        raise ManifestError(
            f"import: {path} must say scaling_factor, by which the rows of a checkpoint with normalize_activations "
            f"'expected_average_only_in' were multiplied, got {shown(said)}; import the whole checkpoint folder, or "
            "what SAELens saves at the end of training"
        )
    cfg, shrinks = {**cfg, "normalize_activations": "none"}, ["b_dec"]
    if cfg.get("architecture") == "matching_pursuit":
        cfg["residual_threshold"] = rest if finite(rest) is None else rest / scale  # what is no number is refused later
    else:
        shrinks += ["W_dec", *(["topk_threshold"] if cfg.get("rescale_acts_by_decoder_norm") else [])]
    grown = {name: tensor * scale for name, tensor in tensors.items() if name == "W_enc"}
    return cfg, {**tensors, **grown, **{name: tensor / scale for name, tensor in tensors.items() if name in shrinks}}


def _unwhitened(cfg: Mapping[str, Any], tensors: Tensors, folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Fold the whitening z = (x - mean) M of training into the weights, so that they take raw rows.

    W_enc becomes M W_enc, W_dec becomes W_dec M^-1, and b_dec becomes b_dec M^-1 + mean. Where b_dec is not subtracted
    from the rows, the biases of the encoder lose mean M W_enc; that of a gated SAE's magnitude loses exp(r_mag) times
    as much. Norms of decoder rows are folded before, because they change.
    """
    path = sae_file(folder, WHITENING_FILE)
    stored = sae_tensors(path)
    b_dec, is_whole = tensors.get("b_dec"), {"W_enc", "W_dec"} <= {*tensors}
    d_in = 0 if b_dec is None else b_dec.numel()
    shapes = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
    got = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if is_whole:
        check_latents(tensors, folder)
        is_whole = tensors["W_enc"].shape[0] == tensors["W_dec"].shape[1] == d_in
    if got != shapes or not is_whole or (cfg.get("rescale_acts_by_decoder_norm") and "b_enc" not in tensors):
        raise ManifestError(
            f"import: {path} must hold {shapes} beside an SAE with W_enc, W_dec and b_dec, got {got}; import what "
            "SAELens saves at the end of training"
        )
    product = stored["matrix"].double() @ stored["inverse_matrix"].double()
    if not (product - torch.eye(d_in)).abs().max() < INVERSE:
        raise ManifestError(f"import: {path}: inverse_matrix must be the inverse of matrix; get the folder again")
    cfg, tensors = _norms_folded(cfg, tensors) if cfg.get("rescale_acts_by_decoder_norm") else (dict(cfg), tensors)
    mean, matrix, inverse = (stored[name].double() for name in shapes)
    W_enc = matrix @ tensors["W_enc"].double()
    folded = {"W_enc": W_enc, "W_dec": tensors["W_dec"].double() @ inverse}
    folded |= {"b_dec": tensors["b_dec"].double() @ inverse + mean}
    if not cfg.get("apply_b_dec_to_input", True):
        factors = {"b_enc": 1.0, "b_gate": 1.0, "b_mag": tensors["r_mag"].double().exp() if "r_mag" in tensors else 1.0}
        biases = {name: factor for name, factor in factors.items() if name in tensors}
        folded |= {name: tensors[name].double() - mean @ W_enc * factor for name, factor in biases.items()}
    kept = {name: tensor.to(tensors[name].dtype) for name, tensor in folded.items()}
    return cfg | {"normalize_activations": "none"}, tensors | kept


def _norms_folded(cfg: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The same SAE with decoder rows of norm 1, which need not be looked at any more."""
    norm = tensors["W_dec"].norm(dim=-1).clamp(min=SMALLEST_NORM)
    folded = {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm}
    folded |= {"W_dec": tensors["W_dec"] / norm[:, None]}
    return {**cfg, "rescale_acts_by_decoder_norm": False}, tensors | folded


def _for_inference(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], Tensors]:
    """What SAELens makes of a training state when it saves it for inference. A state of inference stays as it is.

    batchtopk and matryoshka_batchtopk become jumprelu with one threshold for all latents. Where that threshold is on
    h ||d_i||, decoder rows are brought to norm 1 first.
    """
    cfg, tensors = dict(cfg), dict(tensors)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if cfg.get("architecture") not in BATCH_FAMILY or not {"topk_threshold", "W_enc", "b_enc", "W_dec"} <= {*tensors}:
        return cfg, tensors
    check_latents(tensors, folder)
    if tensors["topk_threshold"].numel() != 1:
        got = tuple(tensors["topk_threshold"].shape)
        raise ManifestError(f"import: {folder} must hold one topk_threshold for all latents, got shape {got}")
    cfg["metadata"] = {**cfg["metadata"], "training_architecture": cfg["architecture"]}
    cfg["architecture"] = "jumprelu"
    if cfg.get("rescale_acts_by_decoder_norm"):
        cfg, tensors = _norms_folded(cfg, tensors)
    tensors["threshold"] = torch.ones_like(tensors["b_enc"]) * tensors.pop("topk_threshold").item()
    return cfg, tensors
