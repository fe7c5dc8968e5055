"""SAEs that others published, read from a folder, a repository of the Hugging Face hub, or a release of SAELens.

| folder holds                      | layout              | it is                                                 |
|-----------------------------------|---------------------|-------------------------------------------------------|
| cfg.json, sae_weights.safetensors | saelens             | an SAE for inference, or a checkpoint of training     |
| cfg.json, sae.safetensors         | sparsify            | one hookpoint of a run; config.json lies above it     |
| config.json, ae.pt                | dictionary_learning | a pickle, from which nothing but tensors is loaded    |

Of dictionary_learning a single state such as checkpoints/ae_1000.pt is taken too.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from actcache.arguments import device_of, local_path, refuse_address
from actcache.errors import ConfigError, ManifestError
from actcache.files import files_below, is_file, is_folder
from actcache.machine.installs import no_installs
from trainer.formats.dictionary_learning import DICTIONARY_LEARNING_FILES, dictionary_learning_sae
from trainer.formats.foreign import Names
from trainer.formats.saelens import CONFIG_FILE, SAE_LENS_VERSION, WEIGHTS_FILE, load_sae, sae_file
from trainer.formats.saelens_checkpoint import BESIDE, saelens_sae, saelens_sae_of
from trainer.formats.sparsify import SPARSIFY_FILES, sparsify_sae
from trainer.run_folder import CONFIG_FILE as RUN_CONFIG
from trainer.run_folder import SAE_FOLDER
from trainer.sae.sae import SAE

LAYOUTS: dict[str, tuple[tuple[str, str], Callable[[Path, Names], SAE]]] = {  # layout -> files, reader
    "saelens": ((CONFIG_FILE, WEIGHTS_FILE), saelens_sae),
    "sparsify": (SPARSIFY_FILES, sparsify_sae),
    "dictionary_learning": (DICTIONARY_LEARNING_FILES, dictionary_learning_sae),
}
FILES = {*BESIDE, *(name for files, _ in LAYOUTS.values() for name in files)}
HUB = "hf://"
NOT_THERE = (OSError, RuntimeError)  # errors of downloads; some of the hub's are ValueErrors too


def load_from_disk(path: Path | str, device: torch.device | str = "cpu", names: Names | None = None) -> SAE:
    """The SAE of a RUN folder, or of a folder in one of LAYOUTS.

    Args:
        path: the folder, or the file of one state of dictionary_learning.
        device: where the weights are put.
        names: the model and the hooks, where the folder lacks their names.

    Raises:
        ManifestError: the folder holds no such SAE, the SAE is malformed, or `SAE` cannot compute it.
        CacheMismatch: the SAE is of activations that no raw model has.
        ConfigError: neither the folder nor `names` says the model, or neither says the hook; or there is no such
            device.
    """
    where, folder = device_of("load_from_disk", device), local_path(path)
    if is_file(folder / RUN_CONFIG) and is_folder(folder / SAE_FOLDER):
        return load_sae(folder, device=where)
    return read_folder(folder, names or Names())[1].to(where)


def from_pretrained(release: str, sae_id: str, device: torch.device | str = "cpu", names: Names | None = None) -> SAE:
    """An SAE of SAELens' registry, or of a repository of the hub.

    Where the registry knows the scale of the SAE's rows, it is folded into the weights, which are float32 then.

    Args:
        release: a release of SAELens' registry, for which sae_lens must be installed; or owner/name or hf://owner/name
            of a repository of the hub.
        sae_id: an SAE of the release; or a folder of the repository in one of LAYOUTS, "." for the repository itself.
        device: where the weights are put.
        names: as `load_from_disk`.

    Raises:
        ConfigError: sae_lens is not installed, or there is no such release or id.
        ManifestError, CacheMismatch: as `load_from_disk`, or the files cannot be downloaded.
    """
    where = device_of("from_pretrained", device)
    repository = release.removeprefix(HUB)
    refuse_address(repository, "the name of a release, or hf://owner/name of a repository of the hub")
    read = _of_hub if "/" in repository else _of_release
    return read(repository, sae_id, names or Names()).to(where)


def read_folder(folder: Path, names: Names) -> tuple[str, SAE]:
    """(layout, SAE) of a folder. Raises as `load_from_disk`; the error names folders below it that hold an SAE."""
    found = _layout(folder)
    if found is not None:
        return found, LAYOUTS[found][1](folder, names)
    weights_files = {weights for (_, weights), _ in LAYOUTS.values()}
    below = [str(path.parent.relative_to(folder)) for path in files_below(folder) if path.name in weights_files]
    wanted = "; ".join(f"{' and '.join(files)} ({layout})" for layout, (files, _) in LAYOUTS.items())
    way_out = f"one of the folders in it: {', '.join(below[:5])}" if below else "a folder that an SAE was saved in"
    raise ManifestError(f"import: {folder} must hold {wanted}; pass {way_out}")


def _layout(folder: Path) -> str | None:
    if folder.suffix == ".pt" and is_file(sae_file(folder.parent, folder.name)):
        return "dictionary_learning"
    held = (layout for layout, (files, _) in LAYOUTS.items() if all(is_file(sae_file(folder, name)) for name in files))
    return next(held, None)


def _of_hub(repository: str, sae_id: str, names: Names) -> SAE:
    """The SAE of a folder of a repository. Only files that one of LAYOUTS has are downloaded."""
    place = PurePosixPath(sae_id)
    if place.is_absolute() or ".." in place.parts or {*"*?["} & {*sae_id}:
        raise ConfigError(f"import: an SAE of {repository} must be a folder of the repository, got {sae_id!r}")
    folders = [place, *place.parents][:3]  # config.json of sparsify and dictionary_learning may lie above
    wanted = {str(folder / name) for folder in folders for name in FILES}
    wanted |= {str(place)} if place.suffix == ".pt" else set()
    try:
        snapshot = snapshot_download(repository, allow_patterns=sorted(wanted))
    except HFValidationError as error:
        raise ConfigError(f"import: {repository!r} is no name of a repository of the hub: {error}") from error
    except NOT_THERE as error:
        raise ManifestError(_not_loaded(f"{HUB}{repository}", sae_id, error)) from error
    return read_folder(local_path(snapshot) / place, names)[1]


@no_installs("SAELens")
def _of_release(release: str, sae_id: str, names: Names) -> SAE:
    try:
        from sae_lens import SAE as TheirSAE
    except ImportError as error:
        raise ConfigError(
            f"import: {release} is a name in SAELens' registry, which needs sae_lens; pip install 'actcache[saelens]', "
            "or pass owner/name of a repository of the hub"
        ) from error
    try:
        theirs, _, log_sparsity = TheirSAE.from_pretrained_with_cfg_and_sparsity(release, sae_id)
    except NOT_THERE as error:
        raise ManifestError(_not_loaded(release, sae_id, error)) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"import: no SAE {sae_id!r} of release {release!r}: {error}") from error
    cfg = theirs.cfg.to_dict()
    cfg["metadata"] |= {"sae_lens_version": SAE_LENS_VERSION}  # an older cfg.json has been brought up to date
    tensors = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    sae = saelens_sae_of(cfg, tensors, Path(release, sae_id), names)
    sae.log_sparsity = log_sparsity
    return sae


def _not_loaded(source: str, sae_id: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return f"import: {source} {sae_id} cannot be loaded ({type(error).__name__}: {said})"
