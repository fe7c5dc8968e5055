"""Folders of dictionary_learning against the formulas in float64, and against the library itself."""

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign_formulas import check, peer, rows
from support.foreign_saes import DICTIONARIES, K, dictionary_folder, dictionary_tensors
from support.surroundings import FailingCalls, address_space

from actcache.errors import ConfigError, ManifestError
from trainer.formats.dictionary_learning import dictionary_learning_sae
from trainer.formats.foreign import Names
from trainer.sae.sae import SAE


@pytest.mark.parametrize("dict_class", DICTIONARIES)
def test_a_dictionary_computes_the_formula(dict_class, tmp_path):
    sae = dictionary_learning_sae(dictionary_folder(tmp_path, dict_class), Names())
    check(sae, dictionary_tensors(dict_class), dict_class)
    assert (sae.hook_name, sae.metadata["model_name"]) == ("blocks.3.hook_resid_post", "EleutherAI/pythia-70m")
    trained_as = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}
    assert sae.metadata["training_architecture"] == trained_as.get(dict_class, sae.architecture)
    assert sae.metadata["training_architecture_details"]["k"] == K


@pytest.mark.parametrize("dict_class", DICTIONARIES)
def test_dictionary_learning_itself_computes_the_same(dict_class, tmp_path):
    utils = peer("dictionary_learning.utils")
    folder = dictionary_folder(tmp_path, dict_class)
    dictionary, _ = utils.load_dictionary(str(folder), device="cpu")
    with torch.no_grad():
        f = dictionary.encode(rows())
        theirs = f, dictionary.decode(f)
    check(dictionary_learning_sae(folder, Names()), dictionary_tensors(dict_class), dict_class, theirs)


def test_a_threshold_that_was_never_set_lets_all_pass(tmp_path):
    folder = dictionary_folder(tmp_path, "BatchTopKSAE")
    tensors = dictionary_tensors("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    torch.save(tensors, folder / "ae.pt")
    check(dictionary_learning_sae(folder, Names()), tensors, "BatchTopKSAE")


def test_a_decoder_of_norm_one_is_left_as_it_is(tmp_path):
    folder, tensors = dictionary_folder(tmp_path, "AutoEncoder"), dictionary_tensors("AutoEncoder")
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    torch.save(tensors, folder / "ae.pt")
    sae = dictionary_learning_sae(folder, Names())
    assert torch.equal(sae.W_enc, tensors["encoder.weight"].T)
    assert torch.equal(sae.W_dec, tensors["decoder.weight"].T)


def test_one_state_among_the_checkpoints_is_read(tmp_path):
    """Its config.json lies one folder above; and a compiled module has other names."""
    folder = dictionary_folder(tmp_path, "AutoEncoderTopK")
    (folder / "checkpoints").mkdir()
    early = {f"_orig_mod.{name}": tensor * 2 for name, tensor in dictionary_tensors("AutoEncoderTopK").items()}
    torch.save(early, folder / "checkpoints" / "ae_1000.pt")
    last, first = dictionary_learning_sae(folder, Names()), SAE.load_from_disk(folder / "checkpoints" / "ae_1000.pt")
    assert torch.equal(first.W_enc, 2 * last.W_enc)
    assert (first.hook_name, first.k) == (last.hook_name, last.k)


def test_what_the_layer_alone_does_not_say_is_asked(tmp_path):
    unsaid = dictionary_folder(tmp_path / "1", "AutoEncoder", submodule_name=None)
    with pytest.raises(ConfigError, match="submodule_name None of layer 3; pass --hook-name"):
        dictionary_learning_sae(unsaid, Names())
    given = dictionary_learning_sae(unsaid, Names(hook_name="blocks.3.hook_mlp_out", model_name="mine"))
    assert (given.hook_name, given.metadata["model_name"]) == ("blocks.3.hook_mlp_out", "mine")
    module = dictionary_folder(tmp_path / "2", "AutoEncoder", submodule_name="gpt_neox.layers.3.mlp")
    assert dictionary_learning_sae(module, Names()).hook_name == "blocks.3.hook_mlp_out"
    fed_by = json.loads((module / "config.json").read_text())
    fed_by["buffer"]["io"] = "in"
    (module / "config.json").write_text(json.dumps(fed_by))
    with pytest.raises(ConfigError, match="pass --hook-name"):
        dictionary_learning_sae(module, Names())


class Payload:
    """What a hostile pickle does when it is loaded as pickles usually are."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    folder, touched = dictionary_folder(tmp_path, "AutoEncoder"), tmp_path / "touched"
    torch.save({"bias": Payload(touched)}, folder / "ae.pt")
    with pytest.raises(
        ManifestError, match="must be a state dict of tensors, got a pickle that holds more, and could run"
    ):
        dictionary_learning_sae(folder, Names())
    (folder / "ae.pt").write_bytes(pickle.dumps(Payload(touched), protocol=2))
    with pytest.raises(ManifestError, match="must be a state dict of tensors"):
        dictionary_learning_sae(folder, Names())
    assert not touched.exists()


def test_a_dictionary_that_cannot_be_read_is_not_malformed(tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoder")
    with FailingCalls(folder / "ae.pt", 0, errno.EIO)(), pytest.raises(OSError, match="check the disk") as raised:
        dictionary_learning_sae(folder, Names())
    assert (type(raised.value), raised.value.filename) == (OSError, str(folder / "ae.pt"))


def test_a_malformed_dictionary_is_refused(tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoder")
    for damage in (b"", b"not a pickle", (folder / "ae.pt").read_bytes()[:-50]):
        (folder / "ae.pt").write_bytes(damage)
        with pytest.raises(ManifestError, match="must be a state dict of tensors"):
            dictionary_learning_sae(folder, Names())
    torch.save([1, 2], folder / "ae.pt")
    with pytest.raises(ManifestError, match="must be a state dict of tensors, got ValueError: a list"):
        dictionary_learning_sae(folder, Names())
    torch.save({"bias": torch.zeros(3)}, folder / "ae.pt")
    with pytest.raises(ManifestError, match=r"must hold encoder\.weight, a matrix if it is weights; got bias"):
        dictionary_learning_sae(folder, Names())
    for config in ({"trainer": {"dict_class": "IdentityDict"}}, {"trainer": 3}, {}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ManifestError, match="dict_class must be one of AutoEncoder, AutoEncoderNew"):
            dictionary_learning_sae(folder, Names())


def test_tensors_that_would_broadcast_are_refused(tmp_path):
    """Of 800 kB, the product of W_enc and the decoder's norms would be one of 40 GB."""
    folder, n = dictionary_folder(tmp_path, "AutoEncoder"), 100_000
    tensors = {"encoder.weight": torch.zeros(1, n), "decoder.weight": torch.ones(1, n) * 2}
    torch.save({**tensors, "encoder.bias": torch.zeros(1), "bias": torch.zeros(1)}, folder / "ae.pt")
    with address_space(256 << 20), pytest.raises(ManifestError, match=r"must hold tensors of one number of latents"):
        dictionary_learning_sae(folder, Names())
    whole = {name: tensor.long() for name, tensor in dictionary_tensors("AutoEncoder").items()}
    torch.save(whole, folder / "ae.pt")
    with pytest.raises(ManifestError, match=r"must hold floats, float64, .*, got torch\.int64"):
        dictionary_learning_sae(folder, Names())


def test_a_config_of_a_stranger_is_one_line(tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoderTopK")
    config = json.loads((folder / "config.json").read_text())
    for key, lie, match in (
        ("dict_class", ["AutoEncoder"], "dict_class must be one of"),
        ("dict_class", "x" * 10**6, "dict_class must be one of"),
        ("k", 10**4000, "k must be a positive integer"),
        ("lm_name", [1], r"config\.json must say lm_name as a text, got \[1\]"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"trainer": config["trainer"] | {key: lie}}))
        with pytest.raises(ManifestError, match=match) as raised:
            dictionary_learning_sae(folder, Names())
        assert len(str(raised.value)) < 1000
