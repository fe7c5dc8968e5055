"""What a cache remembers: `model_of_cache` loads its model as it ran, `dataset_of_cache` tells where its text is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.commands.named_sources import note_named, refuse_unnamed
from actcache.commands.terminal import require_room_for, resolved_device
from actcache.errors import ManifestError

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel
    from actcache.text.sources import DatasetSource


def model_of_cache(
    cache: Path | None,
    compute: Mapping[str, Any],
    *,
    model: str | None,
    device: str,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> LanguageModel:
    """Load the model that a cache was harvested from, with the dtype and the backend that it ran with.

    The attention kernel is the same only on the same kind of device, because another kind may not have it.

    Args:
        cache: the folder of the cache; None where `model` is named and no cache is known.
        compute: how the activations were computed (`Cache.compute`); {} stands for the defaults of `load_model`.
        model: a Hugging Face name or local directory; None takes what the cache remembers.
        device: the value of --device.
        trust_remote_code: as for `load_model`. It is asked anew, because the code may have changed since.
        allow_pickle: as for `load_model`.

    Raises:
        ManifestError: `model` is None, and the cache was harvested from a model in memory, or from one that this user
            has never named: what a cache names may be a stranger's.
        ModelError: the model cannot be loaded.
    """
    require_room_for("transformers")
    from actcache.models.load import load_model
    from actcache.store.cache import read_origin

    origin: Mapping[str, Any] = {"model": model, "revision": None}
    if model is None:
        assert cache is not None, "the caller names a model or a cache"
        origin = read_origin(cache)
        if not origin["model"]:
            raise ManifestError(
                f"{cache}: was harvested from a model in memory; save that model and its tokenizer by save_pretrained, "
                "and pass the folder as --model"
            )
        refuse_unnamed("model", origin["model"], origin["revision"], cache)
    same_device = resolved_device(device).split(":")[0] == compute.get("device")
    loaded = load_model(
        origin["model"],
        revision=origin["revision"],
        device=device,
        dtype=compute.get("model_dtype", "auto"),
        backend=compute.get("backend", "hf"),
        attention=compute.get("attention", "auto") if same_device else "auto",
        compile=compute.get("compiled", False),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    note_named("model", loaded.source, loaded.identity["revision"])
    return loaded


def dataset_of_cache(cache: Path) -> DatasetSource:
    """Where the dataset of a cache is, as the cache remembers it.

    Raises:
        DatasetError: the cache does not remember it.
        ManifestError: the user has never named that dataset: what a cache names may be a stranger's.
    """
    from actcache.integrity.rebuild_sequences import remembered_dataset

    source = remembered_dataset(cache)
    refuse_unnamed("dataset", source.path, source.revision, cache)
    return source
