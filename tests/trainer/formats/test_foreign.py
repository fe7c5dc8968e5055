"""What readers of foreign folders share: names that are said win, missing ones are asked for, tensors come as ours."""

from pathlib import Path

import pytest
import torch

from actcache.errors import ConfigError, ManifestError
from trainer.formats.foreign import Names, foreign_sae, known_names, stored_tensor

FOLDER = Path("runs/theirs")
HOOK = "blocks.3.hook_resid_post"


def test_names_that_are_said_stand_over_those_of_the_folder() -> None:
    held = {"model_name": "theirs", "hook_name": "layers.3", "context_size": 32}
    assert Names().over(held) == held
    assert Names(hook_name=HOOK, hook_name_out="blocks.3.hook_mlp_out").over(held) == {
        **{"model_name": "theirs", "hook_name": HOOK, "hook_name_out": "blocks.3.hook_mlp_out"},
        "context_size": 32,
    }


def test_names_that_nobody_says_are_asked_for() -> None:
    known = Names(model_name="gpt2", hook_name=HOOK)
    assert known_names(known, FOLDER, "nothing") is known
    with pytest.raises(ConfigError, match=r"it says layer 3; pass --hook-name-out \(a hook is named like blocks\.3"):
        known_names(known, FOLDER, "layer 3", needs_out=True)
    with pytest.raises(ConfigError, match=r"runs/theirs must say .*; pass --model-name, --hook-name \(a hook"):
        known_names(Names(), FOLDER, "nothing")


def test_a_linear_is_stored_the_other_way_round() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    stored = {"encoder.weight": matrix, "decoder.weight": matrix, "W_dec": matrix, "b_dec": torch.zeros(3)}
    for name in ("encoder.weight", "decoder.weight"):
        got = stored_tensor(stored, name, FOLDER)
        assert got.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert got.is_contiguous(), "safetensors saves no other"
    assert stored_tensor(stored, "W_dec", FOLDER) is matrix
    assert stored_tensor(stored, "b_dec", FOLDER) is stored["b_dec"]


def test_a_tensor_that_is_not_there_or_no_matrix_is_named() -> None:
    for stored, name, got in (
        ({}, "b_dec", "nothing"),
        ({"bias": torch.zeros(3)}, "b_dec", "bias"),
        ({"W_dec": torch.zeros(3)}, "W_dec", r"\(3,\)"),
        ({"encoder.weight": torch.zeros(3)}, "encoder.weight", r"\(3,\)"),
    ):
        with pytest.raises(ManifestError, match=rf"runs/theirs must hold {name}, a matrix if it is weights; got {got}"):
            stored_tensor(stored, name, FOLDER)


def test_an_sae_in_the_words_of_saelens() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(4, 6, generator=generator), "W_dec": torch.randn(6, 4, generator=generator)}
    weights |= {"b_enc": torch.randn(6, generator=generator), "b_dec": torch.randn(4, generator=generator)}
    own = {"architecture": "topk", "k": 2, "apply_b_dec_to_input": True}
    about = {"model_name": "theirs", "hook_name": HOOK, "training_architecture": "batchtopk"}
    sae = foreign_sae(own, weights, FOLDER, Names(model_name="mine"), about)
    assert (sae.architecture, sae.k, sae.hook_name, sae.subtracts_b_dec) == ("topk", 2, HOOK, True)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (4, 6, 4)
    assert (sae.metadata["model_name"], sae.metadata["training_architecture"]) == ("mine", "batchtopk")
    assert all(torch.equal(getattr(sae, name), weight) for name, weight in weights.items())
