"""What the readers of other libraries' folders share: the names that a folder may lack, and checks of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from actcache.arguments import shown, type_fields_
from actcache.errors import ConfigError, ManifestError
from trainer.formats.saelens import SAE_LENS_VERSION, sae_of
from trainer.formats.saelens_cfg import DTYPES
from trainer.sae.sae import SAE

Tensors = dict[str, Tensor]
PER_LATENT = ("b_enc", "b_gate", "b_mag", "r_mag")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names that the caller gives for an SAE, because its folder lacks them or says others. None keeps the folder's.

    Attributes:
        model_name: the model, as its caches name it.
        hook_name: the hook that the SAE reads.
        hook_name_out: the hook that a transcoder predicts.
    """

    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None

    def __post_init__(self) -> None:
        type_fields_("import", self)

    def over(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata, in which the names that the caller gave replace those that it held."""
        given = {name: getattr(self, name) for name in ("model_name", "hook_name", "hook_name_out")}
        return {**metadata, **{name: value for name, value in given.items() if value is not None}}


def known_names(names: Names, folder: Path, said: str, *, needs_out: bool = False) -> Names:
    """Return the names. Raises ConfigError if one of them is None.

    Args:
        names: what the caller and the folder say together.
        folder: named in the error.
        said: what the folder says of its hook, for the error.
        needs_out: whether hook_name_out is needed too.
    """
    wanted = {"model_name": "--model-name", "hook_name": "--hook-name"}
    wanted |= {"hook_name_out": "--hook-name-out"} if needs_out else {}
    unknown = [option for name, option in wanted.items() if getattr(names, name) is None]
    if unknown:
        raise ConfigError(
            f"import: {folder} must say which activation of which model it is of, it says {said}; pass "
            f"{', '.join(unknown)} (a hook is named like blocks.3.hook_resid_post)"
        )
    return names


def said_name(said: Mapping[str, Any], key: str, path: Path) -> str | None:
    """A name that a folder says; None where it says none. Raises ManifestError if it is no text."""
    name = said.get(key)
    if name is not None and not isinstance(name, str):
        raise ManifestError(f"import: {path} must say {key} as a text, got {shown(name)}; correct it")
    return name


def stored_tensor(stored: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    """A tensor of a state dict. The weight of torch's Linear, [out, in], is returned as [in, out].

    Raises ManifestError if there is no tensor of this name, or a weight is not a matrix.
    """
    is_linear = name in ("encoder.weight", "decoder.weight")
    if name not in stored or (stored[name].ndim != 2 and (is_linear or name.startswith("W_"))):
        got = tuple(stored[name].shape) if name in stored else ", ".join(stored)[:500] or "nothing"
        raise ManifestError(f"import: {folder} must hold {name}, a matrix if it is weights; got {got}")
    return stored[name].T.contiguous() if is_linear else stored[name]


def check_latents(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ManifestError unless W_enc, W_dec and what there is for each latent are floats of one number of latents.

    To be called before any arithmetic with two of them: tensors of other shapes could broadcast to one of any size.
    """
    shapes = {name: tuple(weights[name].shape) for name in ("W_enc", "W_dec", *PER_LATENT) if name in weights}
    d_sae = shapes["W_enc"][-1:]
    fits = all(shape == d_sae for name, shape in shapes.items() if name in PER_LATENT)
    are_matrices = len(shapes["W_enc"]) == len(shapes["W_dec"]) == 2
    if not fits or not are_matrices or shapes["W_dec"][:1] != d_sae:
        raise ManifestError(f"import: {folder} must hold tensors of one number of latents, got {shapes}")
    dtypes = {str(weights[name].dtype) for name in shapes if weights[name].dtype not in DTYPES.values()}
    if dtypes:
        raise ManifestError(f"import: {folder} must hold floats, {', '.join(DTYPES)}, got {', '.join(dtypes)}")


def foreign_sae(
    own: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path, names: Names, about: Mapping[str, Any]
) -> SAE:
    """Make an SAE by way of a cfg.json as SAELens writes it.

    Args:
        own: settings for cfg.json: the architecture, k, and whether x - b_dec is encoded.
        weights: the tensors by our names.
        folder: named in errors.
        names: the model and the hooks.
        about: more metadata.
    """
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    cfg = {
        **{"d_in": d_in, "d_sae": d_sae, "d_out": d_out},
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        **own,
        "metadata": names.over({"sae_lens_version": SAE_LENS_VERSION, **about}),
    }
    return sae_of(cfg, weights, folder)
