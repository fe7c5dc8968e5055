"""cfg.json of each version of SAELens, against what SAELens itself makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saelens_peers import D_IN, D_SAE, HOOK, K, equal_outputs, their_sae

from actcache.errors import ManifestError
from trainer.formats.saelens_cfg import ARCHITECTURES, checked_cfg, shapes_of, up_to_date
from trainer.sae.sae import SAE

sae_lens = pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
BASE: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "model_name": "tiny", "prepend_bos": True}
OLD: dict[str, tuple[str, dict[str, Any]]] = {  # version -> (class, cfg.json as it wrote it)
    "2": (
        "standard",
        {
            **BASE,
            "hook_point": HOOK,
            "hook_point_layer": 1,
            "hook_point_head_index": None,
            "dtype": "torch.float32",
            "activation_fn": "relu",
        },
    ),
    "3.9": (
        "standard",
        {
            **BASE,
            "hook_name": HOOK,
            "hook_layer": 1,
            "hook_head_index": None,
            "dtype": "float32",
            "activation_fn_str": "relu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "finetuning_scaling_factor": False,
            "sae_lens_training_version": "3.9.2",
        },
    ),
    "3.9 topk": (
        "topk",
        {
            **BASE,
            "hook_name": HOOK,
            "dtype": "float32",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "architecture": "standard",
        },
    ),
    "4 gated": (
        "gated",
        {
            **BASE,
            "hook_name": HOOK,
            "dtype": "torch.float32",
            "architecture": "gated",
            "normalize_activations": False,
            "context_size": 128,
        },
    ),
    "5 jumprelu": (
        "jumprelu",
        {
            **BASE,
            "hook_name": HOOK,
            "dtype": "float32",
            "architecture": "jumprelu",
            "activation_fn": "relu",
            "activation_fn_kwargs": {},
            "normalize_activations": None,
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "seqpos_slice": [None],
        },
    ),
    "5 topk": (
        "topk",
        {
            **BASE,
            "hook_name": HOOK,
            "dtype": "float32",
            "architecture": "topk",
            "activation_fn": "topk",
            "activation_fn_kwargs": {"k": K},
            "sae_lens_version": "5.3.1",
        },
    ),
    "5 layer_norm": (
        "standard",
        {
            **BASE,
            "hook_name": HOOK,
            "dtype": "float32",
            "architecture": "standard",
            "normalize_activations": "layer_norm",
            "sae_lens_version": "5.10.0",
        },
    ),
}


@pytest.mark.parametrize("version", OLD)
def test_an_old_folder_computes_what_saelens_computes(version: str, tmp_path: Path):
    architecture, cfg = OLD[version]
    their_sae(architecture).save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), SAE.load_from_disk(tmp_path)
    assert (ours.architecture, ours.hook_name, ours.cfg.model_name) == (architecture, HOOK, "tiny")
    if "layer_norm" in version:
        x = torch.randn(7, D_IN)
        assert torch.equal(theirs.encode(x), ours.encode(x))
        torch.testing.assert_close(theirs(x), ours(x))
    else:
        equal_outputs(theirs, ours)


def test_a_new_cfg_stays_as_it_is():
    cfg = {"architecture": "standard", "metadata": {"sae_lens_version": "6.54.12", "hook_name": HOOK}}
    assert up_to_date(cfg) == cfg
    assert up_to_date({**cfg, "sae_lens_version": "6.0.0-rc.1"})["metadata"] == cfg["metadata"]


def test_a_scale_of_training_is_not_forgotten():
    assert up_to_date({"normalize_activations": True})["normalize_activations"] == "expected_average_only_in"
    for strange in ([], {"none": 1}, 3, "other"):
        assert up_to_date({"normalize_activations": strange})["normalize_activations"] == strange


TEMPORAL = {"architecture": "temporal", "d_in": 16, "d_sae": 64, "dtype": "float32"}
TEMPORAL["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": HOOK}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_heads": 3}, r"d_sae must be a multiple of n_heads \* bottleneck_factor, got 64, 3 and 64"),
        ({"n_attn_layers": 1 << 39}, "n_attn_layers must be at most 1024"),
        ({"n_attn_layers": 0}, "n_attn_layers must be a positive integer"),
        ({"kval_topk": 65}, "kval_topk must be at most d_sae=64"),
        ({"sae_diff_type": "tanh"}, "sae_diff_type must be relu or topk, got 'tanh'"),
        ({"activation_normalization_factor": 0}, "must be a positive number, got 0"),
        ({"tied_weights": "no"}, "tied_weights must be true or false"),
        (
            {"normalize_activations": "covariance_whitening"},
            "must be one of none, layer_norm, constant_norm_rescale, constant_scalar_rescale, got",
        ),
    ],
    ids=str,
)
def test_an_unsound_temporal_cfg_is_refused(changes: dict[str, Any], says: str):
    with pytest.raises(ManifestError, match=says):
        checked_cfg(Path("cfg.json"), {**TEMPORAL, "n_heads": 1, **changes})


def test_shapes_are_those_of_saelens():
    cfg = checked_cfg(Path("cfg.json"), {**TEMPORAL, "n_heads": 1, "n_attn_layers": 2, "bottleneck_factor": 8})
    theirs = sae_lens.SAE.from_dict(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()} == shapes_of(cfg)
    assert "temporal" in ARCHITECTURES
