"""What a cache remembers: `ModelOfCache` loads its model as it ran, `dataset_of_cache` tells where its text is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actcache.commands.named_sources import note_model, refuse_unnamed
from actcache.commands.terminal import require_room_for, resolved_device
from actcache.errors import ManifestError

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel
    from actcache.text.sources import DatasetSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfCache:
    """The model that a cache was harvested from, as the options of a command name it.

    Attributes:
        model: a Hugging Face name or local directory; None takes what the cache remembers.
        adapter: a LoRA adapter of the model, likewise; None takes what the cache remembers.
        device: the value of --device.
        trust_remote_code: as for `load_model`. It is asked anew, because the code may have changed since.
        allow_pickle: as for `load_model`.
    """

    model: str | None = None
    adapter: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def load(self, cache: Path | None, compute: Mapping[str, Any]) -> LanguageModel:
        """Load the model with the dtype and the backend that it ran with.

        The attention kernel is the same only on the same kind of device, because another kind may not have it.

        Args:
            cache: the folder of the cache; None where `model` is named and no cache is known.
            compute: how the activations were computed (`Cache.compute`); {} stands for the defaults of `load_model`.

        Raises:
            ManifestError: `model` is None, and the cache was harvested from a model in memory, or from one that this
                user has never named: what a cache names may be a stranger's. So may its adapter be.
            ModelError: the model cannot be loaded.
        """
        require_room_for("transformers")
        from actcache.models.load import load_model

        named = self._named(cache)
        same_device = resolved_device(self.device).split(":")[0] == compute.get("device")
        loaded = load_model(
            named["model"],
            revision=named["revision"],
            adapter=named["adapter"],
            adapter_revision=named["adapter_revision"],
            device=self.device,
            dtype=compute.get("model_dtype", "auto"),
            backend=compute.get("backend", "hf"),
            attention=compute.get("attention", "auto") if same_device else "auto",
            compile=compute.get("compiled", False),
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )
        note_model(loaded)
        return loaded

    def _named(self, cache: Path | None) -> dict[str, Any]:
        """What `read_origin` says, with what the options name in its place."""
        from actcache.store.cache import read_origin

        origin: dict[str, Any] = dict.fromkeys(("model", "revision", "adapter", "adapter_revision"))
        with suppress(*(() if self.model is None else (ManifestError,))):  # a named model needs no origin
            origin |= read_origin(cache) if cache is not None else {}
        if self.model is not None:
            origin |= {"model": self.model, "revision": None}
        elif not origin["model"]:
            raise ManifestError(
                f"{cache}: was harvested from a model in memory; save that model and its tokenizer by save_pretrained, "
                "and pass the folder as --model"
            )
        else:
            refuse_unnamed("model", origin["model"], origin["revision"], cast(Path, cache))
        if self.adapter is not None:
            origin |= {"adapter": self.adapter, "adapter_revision": None}
        elif origin["adapter"] is not None:
            refuse_unnamed("adapter", origin["adapter"], origin["adapter_revision"], cast(Path, cache))
        return origin


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
