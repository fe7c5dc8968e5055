"""SAEs of the hub and of SAELens' registry, from the hub's own local cache."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.foreign_saes import dictionary_folder, sparsify_folder
from support.hub import Hub
from support.saelens_peers import D_IN, D_SAE, HOOK, METADATA, equal_outputs, rows, their_sae
from support.tiny_saes import make_config, make_run

from actcache.errors import CacheMismatch, ConfigError, ManifestError
from trainer.formats.foreign import Names
from trainer.formats.imports import import_release
from trainer.formats.pretrained import from_pretrained, load_from_disk
from trainer.formats.saelens import load_sae
from trainer.sae.sae import SAE

pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_the_three_values_of_saelens_before_6(hub):
    """A release as gpt2-small-res-jb is: an old cfg.json, its sparsity, and centring that the registry alone says."""
    theirs, folder = their_sae("standard"), hub.folder("blocks.1.hook_resid_post")
    theirs.save_model(folder)
    save_file({"sparsity": torch.linspace(-9, -1, D_SAE)}, folder / "sparsity.safetensors")
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "hook_point": HOOK, "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps(old))
    overrides = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    hub.register("res-jb", "blocks.1.hook_resid_post", config_overrides=overrides)
    sae, cfg_dict, sparsity = SAE.from_pretrained("res-jb", "one")
    assert isinstance(sae, SAE)
    assert cfg_dict["hook_name"] == HOOK == sae.cfg.metadata.hook_name
    assert (cfg_dict["d_sae"], cfg_dict["model_name"]) == (D_SAE, "gpt2-small")
    assert torch.equal(sparsity, torch.linspace(-9, -1, D_SAE))
    assert SAE.load_from_disk(sae.save(hub.folder("saved"))).log_sparsity.equal(sparsity)
    x = rows()
    assert torch.equal(sae.encode(x), theirs.encode(x - x.mean(-1, keepdim=True))), "the centred stream"
    assert sae.is_centred
    assert sae.to("meta").log_sparsity.device.type == "meta"


@pytest.mark.parametrize("release", ["someone/saes", "hf://someone/saes"])
def test_a_repository_in_each_layout_needs_no_registry(release, hub, tmp_path, monkeypatch):
    theirs = their_sae("jumprelu")
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # as if it were not installed
    theirs.save_model(hub.folder("a/layer_1"))
    shutil.copytree(sparsify_folder(tmp_path), hub.folder("layers.3"), dirs_exist_ok=True)
    shutil.copy(tmp_path / "run" / "config.json", hub.folder("b").parent)
    shutil.copytree(dictionary_folder(tmp_path, "AutoEncoderTopK"), hub.folder("c/trainer_0"), dirs_exist_ok=True)
    (hub.folder("c/trainer_0") / "checkpoints").mkdir()
    shutil.copy(tmp_path / "trainer_0" / "ae.pt", hub.folder("c/trainer_0") / "checkpoints" / "ae_100.pt")
    hub.link()
    equal_outputs(theirs, from_pretrained(release, "a/layer_1"))
    x = rows()
    assert torch.equal(
        from_pretrained(release, "c/trainer_0/checkpoints/ae_100.pt")(x), load_from_disk(tmp_path / "trainer_0")(x)
    )
    for sae_id, folder in (("layers.3", tmp_path / "run" / "layers.3"), ("c/trainer_0", tmp_path / "trainer_0")):
        ours, here = from_pretrained(release, sae_id), load_from_disk(folder)
        assert torch.equal(ours(x), here(x))
        assert (ours.hook_name, ours.cfg.model_name) == (here.hook_name, here.cfg.model_name)
    run = import_release(release, "a/layer_1", tmp_path / "imported")
    equal_outputs(theirs, load_sae(run))
    with pytest.raises(ConfigError, match="res-jb is a name in SAELens' registry, which needs sae_lens; pip install"):
        from_pretrained("res-jb", "one")


def test_what_is_not_to_be_had_says_why(hub):
    their_sae("topk").save_model(hub.folder("a"))
    for sae_id in ("../../secret", "/etc", "*", "layer_[1]"):
        with pytest.raises(ConfigError, match="must be a folder of the repository, got"):
            from_pretrained("someone/saes", sae_id)
    with pytest.raises(ManifestError, match=r"must hold cfg\.json and sae_weights\.safetensors .*; pass a folder"):
        from_pretrained("someone/saes", "b")
    with pytest.raises(ManifestError, match=r"pass one of the folders in it: a$"):
        from_pretrained("someone/saes", ".")
    with pytest.raises(ManifestError, match=r"hf://someone/nothing a cannot be loaded \(\w+: [^\n]*$"):
        from_pretrained("someone/nothing", "a")
    with pytest.raises(ConfigError, match="is no name of a repository"):
        from_pretrained("some one/saes", "a")
    with pytest.raises(ConfigError, match="no address is read"):
        from_pretrained("s3://bucket/saes", "a")


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(D_SAE, dtype=torch.int64)], ids=["short", "whole"])
def test_a_sparsity_of_something_else_is_refused(wrong, tmp_path):
    their_sae("topk").save_model(tmp_path)
    save_file({"sparsity": wrong}, tmp_path / "sparsity.safetensors")
    with pytest.raises(ManifestError, match="must hold sparsity, a float for each of 48 latents"):
        load_from_disk(tmp_path)


def test_a_run_a_folder_and_what_was_saved_are_one(tmp_path):
    run = make_run(tmp_path / "runs", make_config("topk"), {"name": "tiny", "revision": None})
    sae, x = load_sae(run), rows()
    for path in (run, run / "sae", sae.save(tmp_path / "saved"), sae.save(tmp_path / "saved")):
        assert torch.equal(SAE.load_from_disk(path)(x), sae(x))
    other = their_sae("jumprelu")
    other.save_model(tmp_path / "theirs")
    with pytest.raises(CacheMismatch, match="must be new or empty"):
        sae.save(tmp_path / "theirs")
    equal_outputs(other, SAE.load_from_disk(tmp_path / "theirs"))
    (tmp_path / "theirs" / "cfg.json").write_text(
        json.dumps(
            {
                **other.cfg.to_dict(),
                "metadata": {**METADATA, "sae_lens_version": "6.0.0", "hook_name": "transformer.h.4"},
            }
        )
    )
    assert load_from_disk(tmp_path / "theirs", names=Names(hook_name=HOOK)).hook_name == HOOK
