"""The local cache of the Hugging Face hub after a download, and SAELens' registry with a release that is there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.saelens_peers import D_SAE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What a download of someone/saes leaves in the hub's local cache, and a registry entry that speaks of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self._snapshot = root / "models--someone--saes" / "snapshots" / COMMIT
        refs = root / "models--someone--saes" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(COMMIT)
        self._patch = monkeypatch
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))

    def folder(self, name: str) -> Path:
        folder = self._snapshot / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def link(self) -> None:
        """From now on the snapshot holds links to its files, as the hub's cache does."""
        blobs = self._snapshot.parent.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(p for p in self._snapshot.rglob("*") if p.is_file())):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))

    def register(self, release: str, folder: str, **more: Any) -> None:
        from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

        defaults = {name: {} for name in ("expected_var_explained", "expected_l0", "norm_scaling_factor")}
        entry = {
            **defaults,
            "conversion_func": None,
            "config_overrides": None,
            "neuronpedia_id": {},
            **more,
        }
        lookup = PretrainedSAELookup(
            release=release, repo_id="someone/saes", model="tiny", saes_map={"one": folder}, **entry
        )
        self._patch.setitem(get_pretrained_saes_directory(), release, lookup)


def save_sparsity(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"sparsity": torch.zeros(D_SAE)}, folder / "sparsity.safetensors")
