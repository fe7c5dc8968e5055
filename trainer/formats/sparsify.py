"""SAEs as SAELens, sparsify and dictionary_learning save them, read as an `SAE`: equal outputs, another layout.

| folder holds                      | format              |                                                       |
|-----------------------------------|---------------------|-------------------------------------------------------|
| cfg.json, sae_weights.safetensors | saelens             | of inference, or a checkpoint of training             |
| cfg.json, sae.safetensors         | sparsify            | one folder a hookpoint; config.json lies above        |
| config.json, ae.pt                | dictionary_learning | a pickle, of which nothing but tensors is loaded      |

Hooks get TransformerLens' names: that of a block, `layers.3` or `transformer.h.3`, is its output
`blocks.3.hook_resid_post`.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import ConfigError, ManifestError
from actcache.models.hook_names import hooks_of
from trainer.config.settings import BATCH_FAMILY
from trainer.formats.saelens import (
    PURSUIT_THRESHOLD,
    SAE,
    SAE_LENS_VERSION,
    WEIGHTS_FILE,
    read_sae_config,
    read_tensors,
    sae_of,
)
from trainer.training.run import read_json

SPARSIFY_FILES = ("cfg.json", "sae.safetensors")
DICTIONARY_LEARNING_FILES = ("config.json", "ae.pt")
SCALE_FILE = "activation_scaler.json"  # beside SAELens' checkpoints: by what the rows were multiplied
SMALLEST_NORM = 1e-8  # of a decoder row that SAELens divides by

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the caller says of an SAE that its folder may not say, or may say otherwise; None: as the folder says."""

    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None

    def over(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata with what was said in the place of what it held."""
        said = {name: getattr(self, name) for name in ("model_name", "hook_name", "hook_name_out")}
        return {**metadata, **{name: value for name, value in said.items() if value is not None}}


# --- SAELens ---------------------------------------------------------------------------------------------------------


def saelens_sae(folder: Path, names: Names) -> SAE:
    """An SAE saved by SAELens 6 (`save_model`, `save_inference_model`), or one of its training checkpoints.

    Raises:
        ManifestError, CacheMismatch: as `trainer.saelens.load_sae`; or the scale of a checkpoint's rows is not there.
    """
    cfg, tensors = read_sae_config(folder), read_tensors(folder / WEIGHTS_FILE)
    if cfg.get("normalize_activations") == "expected_average_only_in":
        cfg, tensors = _unscaled(cfg, tensors, folder / SCALE_FILE)
    return saelens_sae_of(cfg, tensors, folder, names)


def saelens_sae_of(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, names: Names) -> SAE:
    """The SAE of SAELens' cfg and state dict, of inference or of training; `folder` is who errors name."""
    cfg, tensors = _for_inference(cfg, tensors)
    metadata = names.over(cfg["metadata"])
    module = hooks_of(str(metadata.get("hook_name")), metadata.get("model_name"))
    if module is not None:  # of a model that SAELens did not run through TransformerLens
        metadata["hook_name"] = module[1]
    return sae_of({**cfg, "metadata": metadata}, tensors, folder)


def _unscaled(cfg: Mapping[str, Any], tensors: Tensors, path: Path) -> tuple[dict[str, Any], Tensors]:
    """For raw rows: with s the scale of training, W_enc *= s, W_dec /= s and b_dec /= s.

    A threshold on h ||d_i|| shrinks with the decoder; one on h stays. matching_pursuit has one matrix for both, which
    stays: its activations, and the rest that it stops at, become those of the raw rows.
    """
    scale = read_json(path).get("scaling_factor") if path.is_file() else None
    if not isinstance(scale, float | int):
        raise ManifestError(
            f"import: {path} must say scaling_factor, by which the rows of a checkpoint with normalize_activations "
            f"'expected_average_only_in' were multiplied, got {scale!r}; import the whole checkpoint folder, or what "
            "SAELens saves at the end of training"
        )
    cfg, shrinks = {**cfg, "normalize_activations": "none"}, ["b_dec"]
    if cfg.get("architecture") == "matching_pursuit":
        cfg["residual_threshold"] = cfg.get("residual_threshold", PURSUIT_THRESHOLD) / scale
    else:
        shrinks += ["W_dec", *(["topk_threshold"] if cfg.get("rescale_acts_by_decoder_norm") else [])]
    grown = {name: tensor * scale for name, tensor in tensors.items() if name == "W_enc"}
    return cfg, {**tensors, **grown, **{name: tensor / scale for name, tensor in tensors.items() if name in shrinks}}


def _for_inference(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensors]:
    """What SAELens makes of a training state when it saves it for inference; inference states stay as they are.

    batchtopk and matryoshka_batchtopk become jumprelu, whose threshold is one number for all latents; where that is on
    h ||d_i||, decoder rows are brought to norm 1 first.
    """
    cfg, tensors = dict(cfg), dict(tensors)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if cfg.get("architecture") not in BATCH_FAMILY or not {"topk_threshold", "W_enc", "b_enc", "W_dec"} <= {*tensors}:
        return cfg, tensors
    cfg["metadata"] = {**cfg["metadata"], "training_architecture": cfg["architecture"]}
    cfg["architecture"] = "jumprelu"
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm = tensors["W_dec"].norm(dim=-1).clamp(min=SMALLEST_NORM)
        folded = {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm}
        tensors |= {**folded, "W_dec": tensors["W_dec"] / norm[:, None]}
    tensors["threshold"] = torch.ones_like(tensors["b_enc"]) * tensors.pop("topk_threshold").item()
    return cfg, tensors


# --- sparsify --------------------------------------------------------------------------------------------------------


def sparsify_sae(folder: Path, names: Names) -> SAE:
    """A SparseCoder of EleutherAI's sparsify, as `save_to_disk` leaves it in the folder of a hookpoint.

    f = ReLU(TopK_k((x - b_dec) W_enc + b_enc)); a transcoder's encoder sees x. x_hat = f W_dec + b_dec (+ W_skip x).

    Raises:
        ManifestError: a file is missing or malformed, or the activation is not topk.
        ConfigError: the folder does not say the model or the hook, and neither was given.
    """
    cfg, tensors = read_json(folder / SPARSIFY_FILES[0]), read_tensors(folder / SPARSIFY_FILES[1])
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed", False):
        got = "signed" if cfg.get("signed", False) else cfg["activation"]
        raise ManifestError(f"import: {folder}: activation must be topk, got {got!r}; no SAE here computes that")
    weights = {ours: _tensor(tensors, theirs, folder) for ours, theirs in _SPARSIFY.items()}
    weights |= {name: tensor for name, tensor in tensors.items() if name == "W_skip"}
    transcodes, skips = cfg.get("transcode", False), "W_skip" in weights
    architecture = "topk_skip_transcoder" if skips else "topk_transcoder" if transcodes else "topk"
    own = {"architecture": architecture, "k": cfg.get("k"), "apply_b_dec_to_input": not transcodes}
    names = _sparsify_names(folder, transcodes, skips, names)
    return _sae(own, weights, folder, names, {"training_architecture_details": cfg})


_SPARSIFY = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def _sparsify_names(folder: Path, transcodes: bool, skips: bool, names: Names) -> Names:
    """The hookpoint is the name of the folder (or of the one above `seed0`); config.json of the run is above it."""
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    above = hookpoint.resolve().parent / "config.json"
    model_name = names.model_name or (read_json(above).get("model") if above.is_file() else None)
    source, target = hooks_of(hookpoint.resolve().name, model_name) or (None, None)
    hook_name = names.hook_name or (source if transcodes else target)
    found = Names(
        model_name=model_name,
        hook_name=hook_name,
        hook_name_out=names.hook_name_out or (target if transcodes else hook_name if skips else None),
    )
    return _known(found, folder, f"hookpoint {hookpoint.resolve().name!r}", needs_out=transcodes or skips)


# --- dictionary_learning ---------------------------------------------------------------------------------------------


def dictionary_learning_sae(folder: Path, names: Names) -> SAE:
    """A Dictionary of dictionary_learning, computing what its `load_dictionary` computes.

    Raises:
        ManifestError: a file is missing or malformed, or the class is not one of _DICTIONARIES.
        ConfigError: the folder does not say the model or the hook, and neither was given.
    """
    config = read_json(folder / DICTIONARY_LEARNING_FILES[0])
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in _DICTIONARIES:
        got = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise ManifestError(f"import: {folder}: dict_class must be one of {', '.join(_DICTIONARIES)}, got {got!r}")
    architecture, trained_as, subtracts, tensor_names = _DICTIONARIES[trainer["dict_class"]]
    stored = _unpickled(folder / DICTIONARY_LEARNING_FILES[1])
    weights = {ours: _tensor(stored, theirs, folder) for ours, theirs in tensor_names.items()}
    if trainer["dict_class"] == "AutoEncoder":
        weights |= _of_norm_one(weights)
    if "threshold" in weights and weights["threshold"].ndim == 0:
        weights["threshold"] = weights["threshold"].expand(len(weights["b_enc"]))
    own = {"architecture": architecture, "k": trainer.get("k"), "apply_b_dec_to_input": subtracts}
    about = {"training_architecture": trained_as, "training_architecture_details": trainer}
    return _sae(own, weights, folder, _dictionary_learning_names(folder, config, names), about)


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_TOPK = {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_GATED = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_DICTIONARIES: dict[str, tuple[str, str, bool, dict[str, str]]] = {
    # class -> architecture, the one it was trained as, whether x - b_dec is encoded, our tensor -> theirs
    "AutoEncoder": ("standard", "standard", True, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": ("standard", "standard", False, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": ("gated", "gated", True, {**_LINEAR, **_GATED}),
    "AutoEncoderTopK": ("topk", "topk", True, _TOPK),
    "BatchTopKSAE": ("jumprelu", "batchtopk", True, {**_TOPK, "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", "matryoshka_batchtopk", True, _PLAIN),
    "JumpReluAutoEncoder": ("jumprelu", "jumprelu", False, _PLAIN),
}


def _of_norm_one(weights: Mapping[str, Tensor]) -> Tensors:
    """Decoder rows of norm 1 and the encoder in their units, where they are not, as `AutoEncoder.from_pretrained`."""
    norm = weights["W_dec"].norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm)):
        return {}
    folded = {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
    return {**folded, "W_dec": weights["W_dec"] / norm[:, None]}


def _unpickled(path: Path) -> Tensors:
    """The tensors of a state dict that torch.save wrote. Nothing else is unpickled: code in the file is not run."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise ManifestError(
            f"import: {path} must be a state dict of tensors, got {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(stored, dict):
        raise ManifestError(f"import: {path} must be a state dict of tensors, got {type(stored).__name__}")
    return {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}


def _dictionary_learning_names(folder: Path, config: Mapping[str, Any], names: Names) -> Names:
    """`resid_post_layer_3` or a module's name; the layer alone does not say which activation of it was taken."""
    trainer, buffer = config["trainer"], config.get("buffer")
    submodule = str(trainer.get("submodule_name"))
    model_name = names.model_name or trainer.get("lm_name")
    stream = re.fullmatch(r"resid_post_layer_(\d+)", submodule)
    is_output = not isinstance(buffer, dict) or buffer.get("io", "out") == "out"
    hooks = hooks_of(submodule if stream is None else f"layers.{stream[1]}", model_name) if is_output else None
    found = Names(model_name=model_name, hook_name=names.hook_name or (hooks and hooks[1]))
    return _known(found, folder, f"submodule_name {trainer.get('submodule_name')!r} of layer {trainer.get('layer')}")


# --- what the last two share -----------------------------------------------------------------------------------------


def _known(names: Names, folder: Path, said: str, *, needs_out: bool = False) -> Names:
    """The names, if they are all there."""
    wanted = {"model_name": "--model-name", "hook_name": "--hook-name"}
    wanted |= {"hook_name_out": "--hook-name-out"} if needs_out else {}
    unknown = [option for name, option in wanted.items() if getattr(names, name) is None]
    if unknown:
        raise ConfigError(
            f"import: {folder} must say which activation of which model it is of, it says {said}; pass "
            f"{', '.join(unknown)} (a hook is named like blocks.3.hook_resid_post)"
        )
    return names


def _tensor(stored: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    """A tensor of a state dict; a matrix of torch's Linear, [out, in], comes out as [in, out]."""
    is_linear = name in ("encoder.weight", "decoder.weight")
    if name not in stored or (stored[name].ndim != 2 and (is_linear or name.startswith("W_"))):
        got = tuple(stored[name].shape) if name in stored else ", ".join(stored) or "nothing"
        raise ManifestError(f"import: {folder} must hold {name}, a matrix if it is weights; got {got}")
    return stored[name].T.contiguous() if is_linear else stored[name]


def _sae(
    own: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path, names: Names, about: Mapping[str, Any]
) -> SAE:
    """The SAE in the words of SAELens' cfg.json: `own` are its settings, `about` is metadata."""
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    cfg = {
        **{"d_in": d_in, "d_sae": d_sae, "d_out": d_out},
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        **own,
        "metadata": names.over({"sae_lens_version": SAE_LENS_VERSION, **about}),
    }
    return sae_of(cfg, weights, folder)
