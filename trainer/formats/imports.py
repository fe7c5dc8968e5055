"""Imports: SAEs that others trained become RUN folders with config.json and sae/, like a finished run.

| folder holds                      | format              | it is                                                 |
|-----------------------------------|---------------------|-------------------------------------------------------|
| cfg.json, sae_weights.safetensors | saelens             | an SAE for inference, or a checkpoint of training     |
| cfg.json, sae.safetensors         | sparsify            | one hookpoint of a run; config.json lies above it     |
| config.json, ae.pt                | dictionary_learning | a pickle, from which nothing but tensors is loaded    |

Hooks get TransformerLens' names. A block's name, such as `layers.3` or `transformer.h.3`, stands for its output
`blocks.3.hook_resid_post`. In config.json of the run, settings of training such as the learning rate are null, the
block `imported` says where the SAE came from, and no cache is named.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from actcache.arguments import local_path, refuse_address
from actcache.errors import CacheMismatch, ConfigError, ManifestError
from actcache.files import contents_of_any_size, files_below, is_file, listed
from actcache.machine.installs import no_installs
from trainer.checksums import CHECKSUMS_FILE, checksums_of, sealed
from trainer.config.settings import SAEConfig
from trainer.formats.dictionary_learning import DICTIONARY_LEARNING_FILES, dictionary_learning_sae
from trainer.formats.foreign import Names
from trainer.formats.saelens import (
    CONFIG_FILE,
    SAE_LENS_VERSION,
    WEIGHTS_FILE,
    sae_file,
    sae_files,
    write_directory,
)
from trainer.formats.saelens_checkpoint import saelens_sae, saelens_sae_of
from trainer.formats.sparsify import SPARSIFY_FILES, sparsify_sae
from trainer.run_folder import CONFIG_FILE as RUN_CONFIG
from trainer.run_folder import SAE_FOLDER, json_bytes
from trainer.sae.sae import SAE

READERS: dict[str, tuple[tuple[str, str], Callable[[Path, Names], SAE]]] = {  # format -> files, reader
    "saelens": ((CONFIG_FILE, WEIGHTS_FILE), saelens_sae),
    "sparsify": (SPARSIFY_FILES, sparsify_sae),
    "dictionary_learning": (DICTIONARY_LEARNING_FILES, dictionary_learning_sae),
}


def import_sae(folder: Path | str, out: Path | str, names: Names | None = None) -> Path:
    """Make a RUN folder at `out` of an SAE that SAELens, sparsify or dictionary_learning saved.

    The SAE computes what theirs computes, within the rounding of its dtype. The same call again does nothing.

    Args:
        folder: holds the two files of one of READERS. Of a sparsify run it is the folder of one hookpoint.
        out: the RUN folder to write.
        names: the model and the hooks, where the folder lacks their names, or names them otherwise than the cache.

    Returns:
        `out`.

    Raises:
        ManifestError: the folder holds no such SAE, the SAE is malformed, or `SAE` cannot compute it.
        CacheMismatch: the SAE was trained on a centred stream, or `out` holds something else.
        CacheLocked: another process is writing `out`.
        ConfigError: neither the folder nor `names` says the model, or neither says the hook.
    """
    folder, out = local_path(folder), local_path(out)
    layout, read = _reader(folder)
    source = {"format": layout, "path": str(folder.absolute())}
    return _write_run(read(folder, names or Names()), out, source)


@no_installs("SAELens")
def import_release(release: str, sae_id: str, out: Path | str, names: Names | None = None) -> Path:
    """Make a RUN folder at `out` of a pretrained SAE that `sae_lens.SAE.from_pretrained` finds and loads.

    The weights are float32. Where SAELens' registry knows the scale of their inputs, it is folded into them.

    Args:
        release: a release of SAELens' registry.
        sae_id: an SAE of the release.
        out: the RUN folder to write.
        names: as `import_sae`.

    Returns:
        `out`.

    Raises:
        ConfigError: sae_lens is not installed, or there is no such release or id.
        ManifestError, CacheMismatch, CacheLocked: as `import_sae`, or the files cannot be downloaded.
    """
    refuse_address(release, "the name of a release, or its folder as DIR")
    out = local_path(out)
    try:
        from sae_lens import SAE as TheirSAE
    except ImportError as error:
        raise ConfigError("import: --release needs sae_lens; pip install 'actcache[saelens]'") from error
    try:
        theirs = TheirSAE.from_pretrained(release, sae_id)
    except (OSError, RuntimeError) as error:  # some errors of the hub are ValueErrors too
        raise ManifestError(
            f"import: {release} {sae_id} cannot be loaded by sae_lens ({type(error).__name__}: {error})"
        ) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"import: no SAE {sae_id!r} of release {release!r}: {error}") from error
    cfg = theirs.cfg.to_dict()
    cfg["metadata"] |= {"sae_lens_version": SAE_LENS_VERSION}  # an older cfg.json has been brought up to date
    tensors = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    sae = saelens_sae_of(cfg, tensors, Path(release, sae_id), names or Names())
    return _write_run(sae, out, {"format": "saelens", "release": release, "sae_id": sae_id})


def _reader(folder: Path) -> tuple[str, Callable[[Path, Names], SAE]]:
    """(format, reader) of a folder.

    Raises ManifestError if no reader takes it. The error names folders below it that hold an SAE.
    """
    found = _layout(folder)
    if found is not None:
        return found, READERS[found][1]
    below = [str(path.parent.relative_to(folder)) for path in files_below(folder) if path.name in _weights_files()]
    wanted = "; ".join(f"{' and '.join(files)} ({layout})" for layout, (files, _) in READERS.items())
    way_out = f"one of the folders in it: {', '.join(below[:5])}" if below else "a folder that an SAE was saved in"
    raise ManifestError(f"import: {folder} must hold {wanted}; pass {way_out}")


def _layout(folder: Path) -> str | None:
    held = (layout for layout, (files, _) in READERS.items() if all(is_file(sae_file(folder, name)) for name in files))
    return next(held, None)


def _weights_files() -> set[str]:
    return {weights for (_, weights), _ in READERS.values()}


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
