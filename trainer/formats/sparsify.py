"""SAEs of EleutherAI's sparsify: a folder for each hookpoint holds cfg.json and sae.safetensors.

config.json of the whole run lies one folder above; it names the language model.
"""

import re
from pathlib import Path

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.files import is_file
from actcache.models.hook_names import hooks_of
from trainer.formats.foreign import Names, foreign_sae, known_names, said_name, stored_tensor
from trainer.formats.saelens import sae_file, sae_tensors
from trainer.run_folder import read_json
from trainer.sae.sae import SAE

SPARSIFY_FILES = ("cfg.json", "sae.safetensors")


def sparsify_sae(folder: Path, names: Names) -> SAE:
    """Read a SparseCoder of sparsify from the folder of a hookpoint, as `save_to_disk` wrote it.

    f = ReLU(TopK_k((x - b_dec) W_enc + b_enc)), where a transcoder encodes x instead of x - b_dec. With the activation
    groupmax, f keeps the largest of each of k groups instead.
    x_hat = f W_dec + b_dec, to which W_skip x is added where there is a W_skip.

    Raises:
        ManifestError: a file is missing or malformed, or the activation is another.
        ConfigError: neither the folder nor `names` says the model, or neither says the hook.
    """
    cfg_file, weights_file = (sae_file(folder, name) for name in SPARSIFY_FILES)
    cfg, tensors = read_json(cfg_file), sae_tensors(weights_file)
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax") or cfg.get("signed", False):
        got = "signed" if cfg.get("signed", False) else activation
        raise ManifestError(
            f"import: {folder}: activation must be topk or groupmax, got {shown(got)}; no SAE here computes that"
        )
    weights = {ours: stored_tensor(tensors, theirs, folder) for ours, theirs in _SPARSIFY.items()}
    weights |= {name: tensor for name, tensor in tensors.items() if name == "W_skip"}
    transcodes, skips = cfg.get("transcode", False), "W_skip" in weights
    architecture = activation + ("_skip_transcoder" if skips else "_transcoder" if transcodes else "")
    own = {"architecture": architecture, "k": cfg.get("k"), "apply_b_dec_to_input": not transcodes}
    names = _sparsify_names(folder, transcodes, skips, names)
    return foreign_sae(own, weights, folder, names, {"training_architecture_details": cfg})


_SPARSIFY = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def _sparsify_names(folder: Path, transcodes: bool, skips: bool, names: Names) -> Names:
    """The names of the model and the hooks. The folder, or the one above a `seed0`, is named after the hookpoint."""
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    above = sae_file(hookpoint.absolute().parent, "config.json")
    model_name = names.model_name or (said_name(read_json(above), "model", above) if is_file(above) else None)
    source, target = hooks_of(hookpoint.resolve().name, model_name) or (None, None)
    hook_name = names.hook_name or (source if transcodes else target)
    found = Names(
        model_name=model_name,
        hook_name=hook_name,
        hook_name_out=names.hook_name_out or (target if transcodes else hook_name if skips else None),
    )
    return known_names(found, folder, f"hookpoint {hookpoint.resolve().name!r}", needs_out=transcodes or skips)
