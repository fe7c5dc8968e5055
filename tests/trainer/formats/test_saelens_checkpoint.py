"""SAELens' training checkpoints become what SAELens saves for inference."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.saelens_peers import D_IN, D_SAE, METADATA, SCALE, K, equal_files, equal_outputs, fill_, rows
from support.surroundings import address_space
from torch import Tensor

from actcache.errors import ManifestError
from trainer.formats.foreign import Names
from trainer.formats.imports import import_sae
from trainer.formats.saelens import load_sae
from trainer.formats.saelens_checkpoint import saelens_sae_of

sae_lens = pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings(
    "ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning",
    "ignore:decoder_init_norm must be set to 1.0:UserWarning",
    "ignore:You are loading an SAE using the HuggingFace repo_id:UserWarning",
)
TRAINED = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "batchtopk", "matryoshka_batchtopk")


def training_sae(architecture: str, **changes: object) -> Any:
    from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

    cfg: dict[str, object] = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "metadata": METADATA}
    if architecture in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        cfg["k"] = K
    if architecture == "matryoshka_batchtopk":
        cfg["matryoshka_widths"] = [12, D_SAE]
    if architecture == "matching_pursuit":
        cfg["decoder_init_norm"] = 1.0
    config = TrainingSAEConfig.from_dict(cfg | changes)
    sae = TrainingSAE.get_sae_class_for_architecture(architecture)(config)
    fill_(sae)
    return sae


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("architecture", TRAINED)
def test_a_checkpoint_is_what_saelens_saves_at_the_end(architecture, scale, tmp_path):
    """Against fold_activation_norm_scaling_factor and save_inference_model of SAELens, as its trainer calls them."""
    from sae_lens.training.activation_scaler import ActivationScaler

    normalisation = "none" if scale is None else "expected_average_only_in"
    theirs = training_sae(architecture, normalize_activations=normalisation)
    theirs.save_model(tmp_path / "checkpoint")
    ActivationScaler(scaling_factor=scale).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    ours = load_sae(import_sae(tmp_path / "checkpoint", tmp_path / "run"))
    if scale is not None:
        theirs.fold_activation_norm_scaling_factor(scale)
    theirs.save_inference_model(tmp_path / "final")
    final = sae_lens.SAE.load_from_disk(tmp_path / "final")
    is_batch = architecture in ("batchtopk", "matryoshka_batchtopk")
    assert ours.architecture == final.cfg.architecture() == ("jumprelu" if is_batch else architecture)
    assert ours.metadata["training_architecture"] == architecture
    if architecture in ("topk", "abstopk"):  # there the decoder norms are folded; here they stay, for the same outputs
        x = rows()
        with torch.no_grad():
            f, theirs_f = ours.encode(x), theirs.encode(x)
            assert torch.equal(f, theirs_f), "as in training"
            assert torch.equal(ours.decode(f), theirs.decode(theirs_f))
        return
    if architecture == "matching_pursuit" and scale is not None:
        # its W_dec comes out as W_dec * s / s, two roundings away from ours, which stays; a row takes at most D_IN
        # steps, each with a product of D_IN terms that are no larger than the row
        x = rows()
        bound = D_IN * (D_IN + 4) * 2.0**-24 * x.norm(dim=1, keepdim=True)
        with torch.no_grad():
            assert ((final.encode(x) - ours.encode(x)).abs() <= bound).all()
        return
    equal_outputs(final, ours)
    equal_files(tmp_path / "final", tmp_path / "run" / "sae")


def test_an_older_checkpoint_has_the_logarithm_of_its_threshold(tmp_path):
    from safetensors.torch import save_file

    theirs = training_sae("jumprelu")
    theirs.save_model(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, path)
    ours = load_sae(import_sae(tmp_path / "checkpoint", tmp_path / "run"))
    assert torch.equal(ours.threshold, tensors["log_threshold"].exp())


def test_a_checkpoint_of_a_real_training_run_loads(tmp_path):
    """SAELens' SAETrainer writes it, with its scale and its own state beside it."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = training_sae("batchtopk", normalize_activations="expected_average_only_in")
    batches: Iterator[Tensor] = iter(lambda: rows(64), None)
    settings = SAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
        n_batches_for_norm_estimate=2,
        dead_feature_window=10,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=settings, sae=sae, data_provider=batches).fit()
    (checkpoint,) = (path for path in tmp_path.iterdir() if path.name.isdecimal())
    assert json.loads((checkpoint / "activation_scaler.json").read_text())["scaling_factor"] != 1
    ours = load_sae(import_sae(checkpoint, tmp_path / "run"))
    assert ours.architecture == "jumprelu"
    assert ours.threshold is not None
    assert 0 < float(ours.threshold.unique()) < 100


def test_a_checkpoint_without_its_scale_is_refused(tmp_path):
    training_sae("topk", normalize_activations="expected_average_only_in").save_model(tmp_path / "checkpoint")
    with pytest.raises(ManifestError, match=r"activation_scaler\.json must say scaling_factor"):
        import_sae(tmp_path / "checkpoint", tmp_path / "run")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("batchtopk", {}),
    ],
    ids=str,
)
def test_the_whitening_of_a_checkpoint_is_folded_as_saelens_folds_it(architecture, changes, tmp_path):
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    theirs = training_sae(architecture, normalize_activations="covariance_whitening", dtype="float64", **changes)
    theirs.save_model(tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(D_IN).double() + torch.randn(D_IN, D_IN, generator=generator).double() / 8
    whitening = ActivationWhitening(mean=rows()[0].double(), matrix=matrix, inverse_matrix=matrix.inverse())
    ActivationScaler(whitening=whitening).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    ours = load_sae(import_sae(tmp_path / "checkpoint", tmp_path / "run"))
    theirs.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    theirs.save_inference_model(tmp_path / "final")
    final, x = sae_lens.SAE.load_from_disk(tmp_path / "final"), rows().double()
    for one, other in ((final.encode(x), ours.encode(x)), (final(x), ours(x))):
        assert ((one - other).abs() <= 1e4 * 2.0**-53 * one.abs().max()).all()
    (tmp_path / "checkpoint" / "activation_whitening.safetensors").unlink()
    with pytest.raises(ManifestError, match="got 'covariance_whitening'; fold the scale into the weights"):
        import_sae(tmp_path / "checkpoint", tmp_path / "other")


def test_a_whitening_of_another_width_is_refused(tmp_path):
    training_sae("standard", normalize_activations="covariance_whitening").save_model(tmp_path / "checkpoint")
    square = torch.eye(D_IN + 1)
    tensors = {"mean": torch.zeros(D_IN + 1), "matrix": square, "inverse_matrix": square.clone()}
    save_file(tensors, tmp_path / "checkpoint" / "activation_whitening.safetensors")
    with pytest.raises(ManifestError, match=r"activation_whitening.safetensors must hold .*\(16, 16\).* got .*17"):
        import_sae(tmp_path / "checkpoint", tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    [
        {"W_enc": torch.tensor(1.0)},
        {"W_dec": torch.zeros(D_SAE, D_IN + 1)},
        {"b_dec": torch.zeros(3)},
        {"inverse_matrix": 5 * torch.eye(D_IN)},
        {"mean": torch.full((D_IN,), torch.nan)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_strangers_whitening_is_one_line(wrong, tmp_path):
    folder = tmp_path / "checkpoint"
    training_sae("standard", normalize_activations="covariance_whitening").save_model(folder)
    whitening = {"mean": torch.zeros(D_IN), "matrix": torch.eye(D_IN), "inverse_matrix": torch.eye(D_IN)}
    for name, tensors in (("activation_whitening", whitening), ("sae_weights", None)):
        path = folder / f"{name}.safetensors"
        held = load_file(path) if tensors is None else tensors
        save_file({**held, **{key: value for key, value in wrong.items() if key in held}}, path)
    with pytest.raises(ManifestError, match=r"^(import|load_sae): [^\n]*$"):
        import_sae(folder, tmp_path / "run")


def test_names_of_a_compiled_module_are_plain_names(tmp_path):
    theirs = training_sae("standard")
    theirs.save_model(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "sae_weights.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    equal_outputs(theirs, load_sae(import_sae(tmp_path / "theirs", tmp_path / "run")))


@pytest.mark.parametrize("said", [0, True, 10**400, "1", None, [1], float("nan")], ids=lambda said: str(said)[:9])
def test_a_scale_that_is_no_number_is_refused(said, tmp_path):
    training_sae("topk", normalize_activations="expected_average_only_in").save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": said}))
    with pytest.raises(ManifestError, match=r"activation_scaler\.json must say scaling_factor") as raised:
        import_sae(tmp_path / "checkpoint", tmp_path / "run")
    assert len(str(raised.value)) < 1000


def test_a_scale_that_no_float32_holds_leaves_no_finite_weights(tmp_path):
    training_sae("topk", normalize_activations="expected_average_only_in").save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 10**300}))
    with pytest.raises(ManifestError, match="must be finite floats"):
        import_sae(tmp_path / "checkpoint", tmp_path / "run")


def test_tensors_that_would_broadcast_are_refused(tmp_path):
    """Of 800 kB, the product of W_enc and the decoder's norms would be one of 40 GB."""
    n, one = 100_000, torch.zeros(1)
    cfg = {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": True, "metadata": METADATA}
    tensors = {"W_enc": torch.zeros(n, 1), "W_dec": torch.zeros(n, 1), "b_enc": one, "topk_threshold": one[0]}
    with address_space(256 << 20), pytest.raises(ManifestError, match="must hold tensors of one number of latents"):
        saelens_sae_of(cfg, tensors, tmp_path, Names())
    tensors |= {"W_enc": torch.zeros(1, n), "b_enc": torch.zeros(n), "topk_threshold": torch.zeros(2)}
    with pytest.raises(ManifestError, match=r"one topk_threshold for all latents, got shape \(2,\)"):
        saelens_sae_of(cfg, tensors, tmp_path, Names())
