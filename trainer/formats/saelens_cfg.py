"""cfg.json of an SAE in SAELens' format: brought up to date, and checked before an SAE is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actcache.arguments import shown
from actcache.errors import CacheMismatch, ManifestError
from trainer.sae.normalisation import NORMALISATIONS
from trainer.sae.sae import PURSUIT, RANKED, is_transcoder
from trainer.sae.temporal import SCALAR, temporal_shapes

SAELENS_ARCHITECTURES = (
    *("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit", "temporal"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
# SAELens cannot read the rest, though they are stored in the same two files
ARCHITECTURES = (
    *(*SAELENS_ARCHITECTURES, "crosscoder", "topk_transcoder", "topk_skip_transcoder"),
    *("groupmax", "groupmax_transcoder", "groupmax_skip_transcoder"),
)
PURSUIT_THRESHOLD = 1e-2  # SAELens' default of residual_threshold
MOST = 1 << 40  # of any width or count: no file holds more
MOST_LAYERS = 1 << 10  # of the attention of a temporal SAE
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMER_NAMES = {  # of settings, in versions of SAELens before 6
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
OF_METADATA = (  # settings that lie in metadata since 6.0
    *("model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos"),
    *("exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version"),
    *("sae_lens_training_version", "hook_name_out", "hook_head_index_out"),
)
# TransformerLens changes these activations of a model if it is told to; where it is, no raw model has them
PROCESSED = {
    "fold_ln": ("hook_normalized", "ln1.hook_out", "ln2.hook_out"),
    "fold_value_biases": ("hook_v", "hook_z", "hook_result"),
    "refactor_factored_attn_matrices": ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result"),
    # each of these has several streams for a token, and the mean of each is another
    "center_writing_weights": ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input"),
}
TEMPORAL = {  # settings of temporal SAEs alone, with SAELens' defaults
    **{"n_heads": 8, "n_attn_layers": 1, "bottleneck_factor": 64, "sae_diff_type": "topk", "kval_topk": None},
    **{"tied_weights": True, "activation_normalization_factor": 1.0},
}


def checked_cfg(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json in the manner of SAELens 6, once `SAE` is known to compute it. What it lacks gets SAELens' defaults.

    Raises:
        ManifestError: it is malformed, or no SAE here computes it.
        CacheMismatch: the SAE is of activations that no raw model has.
    """
    cfg = up_to_date(cfg)
    if cfg.get("architecture") == "matching_pursuit":
        cfg = {**dict(zip(PURSUIT, (PURSUIT_THRESHOLD, None, True), strict=True)), **cfg}
    if cfg.get("architecture") == "temporal":
        cfg = {**TEMPORAL, **cfg}
    if cfg.get("architecture") not in ARCHITECTURES:
        got = shown(cfg.get("architecture"))
        raise ManifestError(f"load_sae: {path}: architecture must be one of {', '.join(ARCHITECTURES)}, got {got}")
    _check_sizes(path, cfg)
    _check_settings(path, cfg)
    _check_hooks(path, cfg)
    if cfg["architecture"] == "temporal":
        _check_temporal(path, cfg)
    _check_stream(path, cfg)
    return cfg


def up_to_date(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json as SAELens 6 would write it: those of versions 3 to 5 are flat, with other names for some settings.

    As SAELens does, a cfg.json without a version counts as old, and of an old one nothing in `metadata` is read.
    """
    version = cfg.get("sae_lens_version") or cfg.get("metadata", {}).get("sae_lens_version")
    major = str(version).partition(".")[0]
    if major.isdecimal() and len(major) < 9 and int(major) >= 6:
        return {**cfg, "metadata": cfg.get("metadata", {})}
    flat = {FORMER_NAMES.get(name, name): value for name, value in cfg.items()}
    kwargs, normalises = flat.get("activation_fn_kwargs"), flat.get("normalize_activations")
    now = {
        **{"apply_b_dec_to_input": True, "architecture": "standard", "prepend_bos": True},
        **{name: value for name, value in flat.items() if name != "metadata"},
        "normalize_activations": {None: "none", False: "none", True: "expected_average_only_in"}.get(
            normalises if normalises is None or type(normalises) is bool else (), normalises
        ),
    }
    if flat.get("activation_fn") == "topk":
        now |= {"architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    now["metadata"] = {name: now[name] for name in OF_METADATA if now.get(name) is not None}
    return now


def _check_sizes(path: Path, cfg: dict[str, Any]) -> None:
    """Raise ManifestError for a size that is no count, or that others exclude."""
    architecture = cfg["architecture"]
    names = ["d_in", "d_sae"]
    names += ["k"] if architecture in RANKED else []
    names += ["d_out"] if is_transcoder(architecture) else []
    names += ["max_iterations"] if cfg.get("max_iterations") is not None else []
    names += ["n_heads", "n_attn_layers", "bottleneck_factor"] if architecture == "temporal" else []
    names += ["kval_topk"] if architecture == "temporal" and cfg["kval_topk"] is not None else []
    for name in names:
        if type(cfg.get(name)) is not int or not 1 <= cfg[name] <= MOST:
            raise ManifestError(
                f"load_sae: {path}: {name} must be a positive integer up to {MOST}, got {shown(cfg.get(name))}"
            )
    for name in {"k", "kval_topk"} & {*names}:
        if cfg[name] > cfg["d_sae"]:
            raise ManifestError(f"load_sae: {path}: {name} must be at most d_sae={cfg['d_sae']}, got k={cfg[name]}")
    if architecture.startswith("groupmax") and cfg["d_sae"] % cfg["k"]:
        raise ManifestError(f"load_sae: {path}: d_sae={cfg['d_sae']} must be k groups of one size, got k={cfg['k']}")
    most = max(cfg["d_in"], cfg["d_sae"])
    if (cfg.get("max_iterations") or 1) > most:
        got = cfg["max_iterations"]
        raise ManifestError(f"load_sae: {path}: max_iterations must be at most d_in and d_sae, {most}, got {got}")


def _check_settings(path: Path, cfg: dict[str, Any]) -> None:
    """Raise ManifestError for a switch that is none, an unknown activation function, threshold or dtype."""
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "stop_on_duplicate_support", "tied_weights"):
        if type(cfg.get(name, False)) is not bool:
            raise ManifestError(f"load_sae: {path}: {name} must be true or false, got {shown(cfg[name])}")
    if cfg.get("activation_fn", "relu") not in ("relu", "topk"):
        got = shown(cfg["activation_fn"])
        raise ManifestError(f"load_sae: {path}: activation_fn must be relu or topk, got {got}; no SAE here computes it")
    rest = cfg.get("residual_threshold", 0.0)
    if type(rest) not in (int, float) or not 0 <= rest <= torch.finfo(torch.float32).max:
        raise ManifestError(f"load_sae: {path}: residual_threshold must be at least 0, got {shown(rest)}")
    if cfg.get("apply_b_dec_to_input", False) and cfg.get("d_out", cfg["d_in"]) != cfg["d_in"]:
        raise ManifestError(f"load_sae: {path}: b_dec is {cfg['d_out']} wide, x {cfg['d_in']}: it cannot be subtracted")
    if dtype_name(cfg) not in DTYPES:
        raise ManifestError(
            f"load_sae: {path}: dtype must be one of {', '.join(DTYPES)}, got {shown(cfg.get('dtype'))}"
        )


def _check_hooks(path: Path, cfg: dict[str, Any]) -> None:
    if not isinstance(cfg["metadata"].get("hook_name"), str):
        raise ManifestError(f"load_sae: {path}: metadata.hook_name must say where x comes from, got none")
    if is_transcoder(cfg["architecture"]) and not isinstance(cfg["metadata"].get("hook_name_out"), str):
        raise ManifestError(f"load_sae: {path}: metadata.hook_name_out must say what x_hat is of, got none")
    head = cfg["metadata"].get("hook_head_index")
    if head is not None and (type(head) is not int or head < 0 or is_transcoder(cfg["architecture"])):
        raise ManifestError(
            f"load_sae: {path}: hook_head_index must be the number of a head of an SAE's one hook, got {shown(head)}"
        )
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
            f"{shown(names)} and {shown(widths)}"
        )


def _check_temporal(path: Path, cfg: dict[str, Any]) -> None:
    factor, kind = cfg["activation_normalization_factor"], cfg["sae_diff_type"]
    if type(factor) not in (int, float) or not 0 < factor <= torch.finfo(torch.float32).max:
        raise ManifestError(
            f"load_sae: {path}: activation_normalization_factor must be a positive number, got {shown(factor)}"
        )
    if kind not in ("relu", "topk"):
        raise ManifestError(f"load_sae: {path}: sae_diff_type must be relu or topk, got {shown(kind)}")
    if cfg["n_attn_layers"] > MOST_LAYERS:
        got = cfg["n_attn_layers"]
        raise ManifestError(f"load_sae: {path}: n_attn_layers must be at most {MOST_LAYERS}, got {got}")
    if cfg["d_sae"] % (cfg["n_heads"] * cfg["bottleneck_factor"]):
        raise ManifestError(
            f"load_sae: {path}: d_sae must be a multiple of n_heads * bottleneck_factor, got {cfg['d_sae']}, "
            f"{cfg['n_heads']} and {cfg['bottleneck_factor']}"
        )


def _check_stream(path: Path, cfg: dict[str, Any]) -> None:
    """Raise for an SAE of rows that cannot be made of a raw model's activations."""
    known = (*NORMALISATIONS, SCALAR) if cfg["architecture"] == "temporal" else NORMALISATIONS
    normalisation = cfg.get("normalize_activations", "none")
    if normalisation not in known:
        raise ManifestError(
            f"load_sae: {path}: normalize_activations must be one of {', '.join(known)}, got {shown(normalisation)}; "
            "fold the scale into the weights with sae_lens (fold_activation_norm_scaling_factor, "
            "fold_activation_whitening) and save again"
        )
    loading = cfg["metadata"].get("model_from_pretrained_kwargs") or {}
    if not isinstance(loading, dict) or type(loading.get("center_writing_weights", False)) is not bool:
        raise ManifestError(
            f"load_sae: {path}: model_from_pretrained_kwargs must be settings of TransformerLens, got {shown(loading)}"
        )
    hooks = [cfg["metadata"]["hook_name"], cfg["metadata"].get("hook_name_out"), *(cfg.get("hook_names") or ())]
    for setting, sites in PROCESSED.items():
        changed = [name for name in hooks if isinstance(name, str) and name.endswith(sites)]
        if loading.get(setting, False) and changed:
            raise CacheMismatch(
                f"load_sae: {path} was trained on {changed[0]} of a model with {setting}, which is "
                "another activation than the raw model's; train an SAE on a cache"
            )
    if loading.get("center_writing_weights", False) and cfg["architecture"] == "crosscoder":
        raise CacheMismatch(f"load_sae: {path}: a crosscoder is of the raw stream, not of a centred one; train it anew")


def dtype_name(cfg: Mapping[str, Any]) -> str:
    """The dtype of the weights by torch's name, without `torch.`, which older versions write."""
    return str(cfg.get("dtype")).removeprefix("torch.")


def shapes_of(cfg: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the folder of a checked cfg.json must hold. No other may be in it."""
    architecture, d_in, d_sae = cfg["architecture"], cfg["d_in"], cfg["d_sae"]
    d_out = cfg["d_out"] if is_transcoder(architecture) else d_in
    decoder: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture == "matching_pursuit":
        return decoder
    if architecture == "temporal":
        encoder = {} if cfg["tied_weights"] else {"W_enc": (d_in, d_sae)}
        return {**encoder, **decoder, **temporal_shapes(d_sae, cfg["n_attn_layers"], cfg["bottleneck_factor"])}
    per_latent = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    if architecture.startswith("jumprelu"):
        per_latent = (*per_latent, "threshold")
    skip = {"W_skip": (d_out, d_in)} if "skip" in architecture else {}
    return {"W_enc": (d_in, d_sae), **decoder, **skip, **dict.fromkeys(per_latent, (d_sae,))}
