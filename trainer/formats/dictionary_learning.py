"""SAEs of dictionary_learning: a folder holds config.json and ae.pt, a pickle from which only tensors are loaded.

Its checkpoints/ holds earlier states, such as ae_1000.pt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.files import is_file
from actcache.models.hook_names import hooks_of
from trainer.formats.foreign import Names, Tensors, check_latents, foreign_sae, known_names, said_name, stored_tensor
from trainer.formats.saelens import sae_file
from trainer.formats.state_dict import read_state_dict
from trainer.run_folder import read_json
from trainer.sae.sae import SAE

DICTIONARY_LEARNING_FILES = ("config.json", "ae.pt")
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_TOPK = {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_GATED = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_DICTIONARIES: dict[str, tuple[str, str, bool, dict[str, str]]] = {
    # class -> architecture here, architecture of its training, whether x - b_dec is encoded, our tensor -> theirs
    "AutoEncoder": ("standard", "standard", True, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": ("standard", "standard", False, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": ("gated", "gated", True, {**_LINEAR, **_GATED}),
    "AutoEncoderTopK": ("topk", "topk", True, _TOPK),
    "BatchTopKSAE": ("jumprelu", "batchtopk", True, {**_TOPK, "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", "matryoshka_batchtopk", True, _PLAIN),
    "JumpReluAutoEncoder": ("jumprelu", "jumprelu", False, _PLAIN),
}


def dictionary_learning_sae(path: Path, names: Names) -> SAE:
    """Read a Dictionary of dictionary_learning. The SAE computes what their `load_dictionary` computes.

    Args:
        path: its folder, or the file of one of its states, whose config.json lies beside it or one folder above.
        names: the names that it may lack.

    Raises:
        ManifestError: a file is missing or malformed, or the class is not one of _DICTIONARIES.
        ConfigError: neither the folder nor `names` says the model, or neither says the hook.
    """
    config_file, weights_file = DICTIONARY_LEARNING_FILES
    folder, held = path, sae_file(path, weights_file)
    if path.suffix == ".pt":
        folder, held = path.parent, sae_file(path.parent, path.name)
        folder = folder if is_file(sae_file(folder, config_file)) else folder.parent
    config = read_json(sae_file(folder, config_file))
    trainer = config.get("trainer")
    dict_class = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(dict_class, str) or dict_class not in _DICTIONARIES:
        classes = ", ".join(_DICTIONARIES)
        raise ManifestError(f"import: {folder}: dict_class must be one of {classes}, got {shown(dict_class)}")
    architecture, trained_as, subtracts, tensor_names = _DICTIONARIES[dict_class]
    stored = read_state_dict(held)
    weights = {ours: stored_tensor(stored, theirs, folder) for ours, theirs in tensor_names.items()}
    check_latents(weights, folder)
    if dict_class == "AutoEncoder":
        weights |= _of_norm_one(weights)
    if "threshold" in weights and weights["threshold"].ndim == 0:
        weights["threshold"] = weights["threshold"].expand(len(weights["b_enc"]))
    own = {"architecture": architecture, "k": trainer.get("k"), "apply_b_dec_to_input": subtracts}
    about = {"training_architecture": trained_as, "training_architecture_details": trainer}
    return foreign_sae(own, weights, folder, _dictionary_learning_names(folder, config, names), about)


def _of_norm_one(weights: Mapping[str, Tensor]) -> Tensors:
    """The weights with decoder rows of norm 1, as `AutoEncoder.from_pretrained` makes them; {} if they have norm 1."""
    norm = weights["W_dec"].norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm)):
        return {}
    folded = {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
    return {**folded, "W_dec": weights["W_dec"] / norm[:, None]}


def _dictionary_learning_names(folder: Path, config: Mapping[str, Any], names: Names) -> Names:
    """The names of the model and the hook. submodule_name says the hook, as `resid_post_layer_3` or a module's name.

    The number of the layer alone does not say which of its activations was taken.
    """
    trainer, buffer = config["trainer"], config.get("buffer")
    submodule = str(trainer.get("submodule_name"))
    model_name = names.model_name or said_name(trainer, "lm_name", folder / DICTIONARY_LEARNING_FILES[0])
    stream = re.fullmatch(r"resid_post_layer_(\d+)", submodule)
    is_output = not isinstance(buffer, dict) or buffer.get("io", "out") == "out"
    hooks = hooks_of(submodule if stream is None else f"layers.{stream[1]}", model_name) if is_output else None
    found = Names(model_name=model_name, hook_name=names.hook_name or (hooks and hooks[1]))
    return known_names(
        found, folder, f"submodule_name {shown(trainer.get('submodule_name'))} of layer {shown(trainer.get('layer'))}"
    )
