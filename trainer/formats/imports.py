"""Imports: SAEs that others trained become RUN folders with config.json and sae/, like a finished run.

`pretrained` says what is read. Hooks get TransformerLens' names. A block's name, such as `layers.3` or
`transformer.h.3`, stands for its output `blocks.3.hook_resid_post`. In config.json of the run, settings of training
such as the learning rate are null, the block `imported` says where the SAE came from, and no cache is named.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from actcache.arguments import local_path
from actcache.errors import CacheMismatch, ConfigError, ManifestError
from actcache.files import contents_of_any_size, is_file, listed
from trainer.checksums import CHECKSUMS_FILE, checksums_of, sealed
from trainer.config.settings import SAEConfig
from trainer.formats.foreign import Names
from trainer.formats.pretrained import from_pretrained, read_folder
from trainer.formats.saelens import sae_files, write_directory
from trainer.run_folder import CONFIG_FILE as RUN_CONFIG
from trainer.run_folder import SAE_FOLDER, json_bytes
from trainer.sae.sae import SAE


def import_sae(folder: Path | str, out: Path | str, names: Names | None = None) -> Path:
    """Make a RUN folder at `out` of an SAE that SAELens, sparsify or dictionary_learning saved.

    The SAE computes what theirs computes, within the rounding of its dtype. The same call again does nothing.

    Args:
        folder: holds the two files of one of LAYOUTS. Of a sparsify run it is the folder of one hookpoint. Or the
            file of one state of dictionary_learning.
        out: the RUN folder to write.
        names: the model and the hooks, where the folder lacks their names, or names them otherwise than the cache.

    Returns:
        `out`.

    Raises:
        ManifestError: the folder holds no such SAE, the SAE is malformed, or `SAE` cannot compute it.
        CacheMismatch: the SAE is of activations that no raw model has, or `out` holds something else.
        CacheLocked: another process is writing `out`.
        ConfigError: neither the folder nor `names` says the model, or neither says the hook.
    """
    folder, out = local_path(folder), local_path(out)
    layout, sae = read_folder(folder, names or Names())
    return _write_run(sae, out, {"format": layout, "path": str(folder.absolute())})


def import_release(release: str, sae_id: str, out: Path | str, names: Names | None = None) -> Path:
    """Make a RUN folder at `out` of a published SAE.

    Args:
        release, sae_id: as `from_pretrained`: of SAELens' registry, or of a repository of the hub.
        out: the RUN folder to write.
        names: as `import_sae`.

    Returns:
        `out`.

    Raises:
        ConfigError, ManifestError, CacheMismatch: as `from_pretrained` and `import_sae`.
        CacheLocked: another process is writing `out`.
    """
    out = local_path(out)
    sae = from_pretrained(release, sae_id, names=names)
    return _write_run(sae, out, {"format": "saelens", "release": release, "sae_id": sae_id})


def _write_run(sae: SAE, out: Path, source: dict[str, Any]) -> Path:
    """Write the RUN folder, whole or not at all. Where it is written already, do nothing."""
    if not sae.metadata.get("model_name"):
        raise ConfigError(f"import: {_said(source)} does not say which model it is of; pass --model-name")
    try:
        sae_folder = sae_files(sae)
    except ValueError as error:  # 1e999 is a number of JSON, and infinite
        raise ManifestError(
            f"import: {_said(source)} must say finite numbers, got {error}; correct its JSON"
        ) from error
    files = {f"{SAE_FOLDER}/{name}": data for name, data in sae_folder.items()}
    files[RUN_CONFIG] = json_bytes(_description(sae, out, source))
    if is_file(out):
        raise CacheMismatch(f"import: {out} must be a folder, is a file; choose another --out")
    held = [path.name for path in listed(out)]
    if held and all(is_file(out / name) and contents_of_any_size(out / name) == data for name, data in files.items()):
        return out
    if held:
        raise CacheMismatch(f"import: {out} must be new or empty, it holds {', '.join(held[:5])}; choose another --out")
    files[f"{SAE_FOLDER}.{CHECKSUMS_FILE}"] = sealed(checksums_of(sae_folder))
    files[CHECKSUMS_FILE] = sealed(checksums_of({RUN_CONFIG: files[RUN_CONFIG]}))
    return write_directory(out, files)


def _description(sae: SAE, out: Path, source: dict[str, Any]) -> dict[str, Any]:
    """config.json of the run: every setting of an SAEConfig, null where the SAE alone does not say it."""
    details = sae.metadata.get("training_architecture_details")
    k = sae.k if sae.k is not None else details.get("k") if isinstance(details, dict) else None
    known = {
        "name": out.resolve().name,
        "architecture": sae.metadata.get("training_architecture") or sae.architecture,
        **{name: getattr(sae, name) for name in ("hook_name", "hook_name_out", "d_in", "d_out", "d_sae")},
        "k": k if type(k) is int else None,
    }
    return {
        "sae": {**dict.fromkeys(field.name for field in fields(SAEConfig)), **known},
        "model": {"name": sae.metadata["model_name"], "revision": None},
        "imported": source,
    }


def _said(source: dict[str, Any]) -> str:
    return source.get("path") or f"{source['release']} {source['sae_id']}"
