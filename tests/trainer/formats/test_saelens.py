"""SAEs in SAELens' directory format: equal to the training definition and to sae_lens, refused when not sound."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hostile_json import TEXTS
from support.saelens_cases import D_IN, D_SAE, SCALE, K, raw_activations, save
from support.surroundings import FailingCalls, address_space, descriptors
from support.tiny_saes import (
    ARCHITECTURES,
    BATCH_FAMILY,
    TOPK_FAMILY,
    TRANSCODERS,
    WEIGHS_NORMS,
    make_config,
    make_run,
    make_weights,
)
from torch import Tensor

from actcache.errors import CacheMismatch, ManifestError
from trainer.config.settings import SAEConfig, ScaledHook
from trainer.formats.saelens import export_sae, inference_sae, load_sae, save_inference_sae, write_run_sae


def trained_reconstruction(config: SAEConfig, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre_acts, feature_acts and x_hat of raw x as in training, in float64: scale, encode, decode, unscale."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    scaled = x.double() * scales(config.inputs, config)
    centred = scaled - w["b_dec"] if config.architecture in (*TOPK_FAMILY, "gated") else scaled
    pre_acts = centred @ w["W_enc"].T + w.get("b_enc", 0.0)
    if config.architecture == "gated":
        feature_acts = (pre_acts * w["r_mag"].exp() + w["b_mag"]).relu() * (pre_acts + w["b_gate"] > 0)
    elif config.architecture == "abstopk":
        top = pre_acts.abs().topk(config.k, dim=1)
        feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, pre_acts.gather(1, top.indices))
    elif config.architecture in WEIGHS_NORMS:
        feature_acts = pre_acts.relu()
    elif config.architecture == "topk":
        top = pre_acts.topk(config.k, dim=1)
        feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    else:
        feature_acts = torch.where(pre_acts > w["threshold"], pre_acts, 0.0).relu()
    skipped = scaled @ w["W_skip"].T if "W_skip" in w else 0.0
    x_hat = (feature_acts @ w["W_dec"] + w["b_dec"] + skipped) / scales(config.outputs, config)
    return pre_acts, feature_acts, x_hat


def scales(hooks: tuple[ScaledHook, ...], config: SAEConfig) -> Tensor:
    """What each channel is multiplied by; one number for one hook."""
    each = [torch.full((width,), hook.scale) for hook, width in zip(hooks, config.hook_widths or (1,), strict=True)]
    return torch.cat(each).double()


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of cfg.json; a value of None takes the key out, a dict `metadata` is merged."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = changes.pop("metadata", {})
    cfg = {key: value for key, value in (cfg | changes).items() if value is not None}
    cfg["metadata"] = {key: value for key, value in (cfg["metadata"] | metadata).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_computes_what_training_did_on_scaled_activations(architecture, tmp_path):
    """Bounds: a float32 dot product of n terms errs by at most (n + 2) u sum |a||b|, u = 2^-24; folding rounds every
    weight once more. A latent whose pre-activation is within the bound of the decision may differ; here none is."""
    config, weights, x = make_config(architecture), make_weights(architecture), raw_activations(60)
    sae = load_sae(save(tmp_path, architecture))
    pre_acts, feature_acts, x_hat = trained_reconstruction(config, weights, x)

    u = 2.0**-24
    b_dec = weights["b_dec"].abs().double() if config.architecture not in TRANSCODERS else 0.0
    scaled = x.double().abs() * scales(config.inputs, config)
    size = (scaled + b_dec) @ weights["W_enc"].double().abs().T
    biases = [weights[name].double().abs() for name in ("b_enc", "b_gate", "b_mag") if name in weights]
    bound = (D_IN + 6) * u * (size + torch.stack(biases).amax(0))
    got = sae.encode(x)
    ranked = pre_acts.abs() if architecture == "abstopk" else pre_acts + weights.get("b_gate", torch.tensor(0.0))
    between = ranked.topk(K + 1, dim=1).values[:, K - 1 :].mean(1, keepdim=True)
    edge = {"topk": between, "abstopk": between} | dict.fromkeys((*WEIGHS_NORMS, "gated"), torch.tensor(0.0))
    decision = edge.get(architecture, weights.get("threshold", torch.tensor(0.0)).double())
    assert ((ranked - decision).abs() > bound).all(), "the data must leave no doubt which latents are active"
    if architecture == "gated":  # exp(r_mag) stretches the error, and rounds by a few units itself
        bound = bound * weights["r_mag"].double().exp().clamp_min(1) + 4 * u * feature_acts
    assert ((got.double() - feature_acts).abs() <= bound).all()

    through = bound.mul(feature_acts != 0) + (D_SAE + 6) * u * feature_acts.abs()
    allowed = through @ weights["W_dec"].double().abs() + (D_SAE + 6) * u * weights["b_dec"].double().abs()
    if "W_skip" in weights:
        allowed = allowed + (D_IN + 6) * u * (scaled @ weights["W_skip"].double().abs().T)
    allowed = allowed / scales(config.outputs, config)
    assert ((sae.reconstruct(x)[1].double() - x_hat).abs() <= allowed).all()


@pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "crosscoder"])
def test_sae_lens_loads_it_with_equal_outputs(architecture, tmp_path):
    """Bit for bit: the same operations in the same order on the same shapes."""
    sae_lens = pytest.importorskip("sae_lens")
    folder = save(tmp_path, architecture)
    theirs, ours, x = sae_lens.SAE.load_from_disk(folder), load_sae(folder), raw_activations()
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        assert torch.equal(feature_acts, ours.encode(x))
        assert torch.equal(theirs.decode(feature_acts), ours.decode(feature_acts))
        assert torch.equal(theirs(x), ours.reconstruct(x)[1])
    assert theirs.cfg.architecture() == ours.architecture
    assert theirs.cfg.metadata.hook_name == ours.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.training_architecture == architecture
    assert theirs.cfg.metadata.model_name == "tiny"
    assert theirs.cfg.metadata.actcache["input_scale"] == SCALE


@pytest.mark.parametrize("subtracts_b_dec", [True, False])
@pytest.mark.parametrize(
    "architecture", ["standard", "topk", "topk rescaled", "abstopk", "abstopk rescaled", "jumprelu", "gated"]
)
def test_what_sae_lens_saves_loads_with_equal_outputs(architecture, subtracts_b_dec, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    name = architecture.split()[0]
    config = {
        "architecture": name,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": subtracts_b_dec,
        "metadata": {"hook_name": "blocks.0.hook_mlp_out"},
    }
    if name in ("topk", "abstopk"):
        config |= {"k": K, "rescale_acts_by_decoder_norm": architecture.endswith("rescaled")}
    theirs = sae_lens.SAE.from_dict(config)
    generator = torch.Generator().manual_seed(3)
    theirs.load_state_dict({n: torch.randn(t.shape, generator=generator) for n, t in theirs.state_dict().items()})
    theirs.save_model(tmp_path)
    ours, x = load_sae(tmp_path), raw_activations()
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        assert torch.equal(feature_acts, ours.encode(x))
        assert torch.equal(theirs.decode(feature_acts), ours.decode(feature_acts))
    assert (ours.subtracts_b_dec, ours.d_in, ours.d_sae) == (subtracts_b_dec, D_IN, D_SAE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_are_what_saelens_documents(architecture, tmp_path):
    folder = save(tmp_path, architecture)
    cfg, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert cfg["architecture"] == ("jumprelu" if architecture in BATCH_FAMILY else architecture)
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"], cfg["normalize_activations"]) == (D_IN, D_SAE, "float32", "none")
    assert cfg["apply_b_dec_to_input"] is (architecture not in (*WEIGHS_NORMS, "jumprelu"))
    assert cfg.get("k") == (K if architecture in ("topk", "abstopk") else None)
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": False}
    own = {"jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}
    own["skip_transcoder"] = {"b_enc", "W_skip"}
    assert cfg.get("d_out") == (12 if architecture in TRANSCODERS else None)
    assert set(tensors) == {"W_enc", "W_dec", "b_dec"} | own.get(cfg["architecture"], {"b_enc"})
    assert tensors["W_enc"].shape == (D_IN, D_SAE)
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sae"], "nothing is left aside"


def test_a_crosscoder_says_its_hooks_and_is_not_for_saelens(tmp_path):
    folder = save(tmp_path, "crosscoder")
    sae = load_sae(folder)
    assert sae.input_hooks == sae.output_hooks == ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    with pytest.raises(ManifestError, match="is a crosscoder; load it with load_sae"):
        export_sae(folder, tmp_path / "out")
    for wrong in ({"hook_names": None}, {"hook_widths": [10, 7]}, {"hook_names": ["a"]}, {"hook_widths": [10, "6"]}):
        save(tmp_path, "crosscoder")
        edit_config(folder, **wrong)
        with pytest.raises(ManifestError, match="hook_names and hook_widths must say what x is of, d_in=16"):
            load_sae(folder)


def test_a_transcoder_says_what_it_predicts(tmp_path):
    folder = save(tmp_path, "transcoder")
    assert load_sae(folder).output_hooks == ("blocks.1.hook_mlp_out",)
    edit_config(folder, metadata={"hook_name_out": None})
    with pytest.raises(ManifestError, match=r"metadata\.hook_name_out must say what x_hat is of"):
        load_sae(folder)


def test_saving_again_replaces_and_is_byte_identical(tmp_path):
    folder = save(tmp_path, "jumprelu")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save(tmp_path, "jumprelu")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save(tmp_path, "topk")
    assert load_sae(folder).architecture == "topk"


def test_a_killed_save_leaves_no_torn_directory(tmp_path):
    (tmp_path / "run" / f".sae.{'1f' * 16}.partial").mkdir(parents=True)  # what a kill before the rename leaves
    (tmp_path / "run" / f".sae.{'1f' * 16}.partial" / "cfg.json").write_text("{")
    with pytest.raises(ManifestError, match="finish the training"):
        load_sae(tmp_path / "run")
    assert load_sae(save(tmp_path, "standard")).architecture == "standard"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["sae"]


def test_a_run_its_sae_and_a_str_are_the_same(tmp_path):
    folder, x = save(tmp_path, "topk"), raw_activations()
    acts = load_sae(folder).encode(x)
    assert torch.equal(acts, load_sae(folder.parent).encode(x))
    assert torch.equal(acts, load_sae(str(folder.parent)).encode(x))
    assert ((acts != 0).sum(1) <= K).all()


def test_the_smallest_config_loads_and_defaults_as_saelens(tmp_path):
    folder = save(tmp_path, "standard")
    keys = {"architecture", "d_in", "d_sae", "dtype", "metadata"}
    cfg = {key: value for key, value in json.loads((folder / "cfg.json").read_text()).items() if key in keys}
    cfg["metadata"] = {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_pre", "model_name": "m"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    sae = load_sae(folder)
    assert (sae.hook_name, sae.subtracts_b_dec) == ("blocks.0.hook_resid_pre", True)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"architecture": "gates"},
            ManifestError,
            "architecture must be one of standard, topk, abstopk, jumprelu,",
        ),
        ({"d_sae": "many"}, ManifestError, "d_sae must be a positive integer up to 1099511627776, got 'many'"),
        ({"d_in": D_IN + 1}, ManifestError, "must hold .*got .*W_enc"),
        ({"dtype": "int8"}, ManifestError, "dtype must be one of"),
        ({"dtype": None}, ManifestError, "dtype must be one of"),
        ({"k": None}, ManifestError, "k must be a positive integer up to 1099511627776, got None"),
        ({"k": D_SAE + 1}, ManifestError, "k must be at most d_sae=48"),
        ({"apply_b_dec_to_input": "yes"}, ManifestError, "apply_b_dec_to_input must be true or false"),
        (
            {"normalize_activations": "covariance_whitening"},
            ManifestError,
            "'covariance_whitening'; fold the scale",
        ),
        ({"normalize_activations": "constant_scalar_rescale"}, ManifestError, "got 'constant_scalar_rescale'"),
        ({"metadata": {"hook_name": None}}, ManifestError, r"metadata\.hook_name"),
        ({"metadata": {"hook_head_index": "3"}}, ManifestError, "hook_head_index must be the number of a head"),
        ({"metadata": {"hook_head_index": -1}}, ManifestError, "of an SAE's one hook, got -1"),
        ({"activation_fn": "tanh-relu"}, ManifestError, "activation_fn must be relu or topk, got 'tanh-relu'"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, ManifestError, "metadata.hook_name must say"),
        ({"metadata": {"sae_lens_version": None}}, ManifestError, "metadata.hook_name must say"),
        ({"metadata": {"model_from_pretrained_kwargs": "yes"}}, ManifestError, "must be settings of TransformerLens"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.1.attn.hook_z",
                    "model_from_pretrained_kwargs": {"fold_value_biases": 1},
                }
            },
            CacheMismatch,
            "of a model with fold_value_biases, which is another activation",
        ),
        (
            {
                "metadata": {
                    "hook_name": "L.hook_result",
                    "model_from_pretrained_kwargs": {"center_writing_weights": True},
                }
            },
            CacheMismatch,
            "L.hook_result of a model with center_writing_weights",
        ),
    ],
    ids=str,
)
def test_an_unsound_config_is_refused(changes, error, says, tmp_path):
    folder = save(tmp_path, "topk")
    edit_config(folder, **changes)
    with pytest.raises(error, match=says):
        load_sae(folder)


def test_unsound_files_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="must be a RUN folder or a SAELens directory"):
        load_sae(tmp_path / "nowhere")
    folder = save(tmp_path, "jumprelu")
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    for wrong in (
        {name: t for name, t in tensors.items() if name != "threshold"},
        tensors | {"b_gate": tensors["b_enc"].clone()},
        tensors | {"threshold": tensors["threshold"][:1]},
    ):
        save_file(wrong, weights)
        with pytest.raises(ManifestError, match=r"must hold \{.*'threshold': \(48,\)"):
            load_sae(folder)
    save_file(tensors | {"b_enc": tensors["b_enc"] / 0}, weights)
    with pytest.raises(ManifestError, match="b_enc must be finite"):
        load_sae(folder)
    for damage in (b"", b"not safetensors", weights.read_bytes()[:-10]):
        weights.write_bytes(damage)
        with pytest.raises(ManifestError, match="must be safetensors"):
            load_sae(folder)
    weights.unlink()
    with pytest.raises(ManifestError, match="must be safetensors"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ManifestError, match="must be readable JSON"):
        load_sae(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ManifestError, match="must be a JSON object"):
        load_sae(folder)


def test_an_sae_that_cannot_be_read_is_not_malformed(tmp_path):
    folder = save(tmp_path, "jumprelu")
    with descriptors(3), pytest.raises(OSError, match="ulimit -n"):
        load_sae(folder)
    for name in ("cfg.json", "sae_weights.safetensors"):
        with FailingCalls(folder / name)() as calls:
            load_sae(folder)
        assert calls.n_calls > 2
        for number in range(calls.n_calls):
            with FailingCalls(folder / name, number)(), pytest.raises(OSError, match=r"check the disk.*: '.*sae"):
                load_sae(folder)


def test_weights_may_be_larger_than_a_file_that_is_read_as_a_whole(tmp_path, monkeypatch):
    folder = save(tmp_path, "jumprelu")
    monkeypatch.setattr("actcache.files.MOST_BYTES", (folder / "sae_weights.safetensors").stat().st_size - 1)
    for _ in range(2):
        assert load_sae(export_sae(folder, tmp_path / "out")).architecture == "jumprelu"


def test_that_an_sae_of_a_run_is_read_unchecked_is_said(tmp_path, caplog):
    """But of a SAELens directory nobody expects checksums."""
    config = make_config("topk")
    run = make_run(tmp_path, config, {"name": "tiny", "revision": None})
    load_sae(run)
    load_sae(Path(shutil.copytree(run / "sae", tmp_path / "elsewhere")))
    assert caplog.messages == []
    (run / "sae.crc32c.json").unlink()
    load_sae(run)
    assert [str(run / "sae.crc32c.json") in each for each in caplog.messages] == [True]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_config_that_is_no_json_is_one_line(text, tmp_path):
    folder = save(tmp_path, "topk")
    (folder / "cfg.json").write_bytes(text)
    (tmp_path / "run" / "sae.crc32c.json").unlink(missing_ok=True)
    with pytest.raises(ManifestError, match=r"cfg\.json must be (readable JSON|a JSON object)") as raised:
        load_sae(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("key", ["architecture", "d_in", "k", "dtype", "normalize_activations", "metadata"])
def test_a_value_of_a_stranger_is_refused_in_a_short_line(key, tmp_path):
    folder = save(tmp_path, "topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    for lie in (10**4000, "A" * 10**6, ["x" * 10**6], [10**4000] * 1000):
        (folder / "cfg.json").write_text(json.dumps(cfg | {key: lie}))
        with pytest.raises(ManifestError, match=key) as raised:
            load_sae(folder)
        assert len(str(raised.value)) < 1000


def test_weights_take_the_memory_that_they_are_read_into(tmp_path):
    """They are looked at in place. In a wider dtype they take more, which is asked for."""
    d_in, d_sae = 1024, 16384
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    save_file({n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.0.hook_resid_post", "sae_lens_version": "6.0.0"}
    cfg = {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": 1, "dtype": "bfloat16", "metadata": metadata}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with address_space(160 << 20):
        assert load_sae(tmp_path).W_enc.shape == (d_in, d_sae)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"dtype": "float64"}))
    with (
        address_space(160 << 20),
        pytest.raises(MemoryError, match=r"weights of .* in torch\.float64 may take 0\."),
    ):
        load_sae(tmp_path)


def test_a_version_of_many_digits_is_refused(tmp_path):
    folder = save(tmp_path, "topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"sae_lens_version": "9" * 5000}))
    (folder.parent / "sae.crc32c.json").unlink(missing_ok=True)
    with pytest.raises(ManifestError, match=r"metadata\.hook_name must say where x comes from") as raised:
        load_sae(folder)
    assert len(str(raised.value)) < 1000


def test_wrong_weights_are_not_saved(tmp_path):
    weights = make_weights("jumprelu")
    config = make_config("jumprelu")
    with pytest.raises(ValueError, match="jumprelu has W_enc, W_dec, b_dec, b_enc, threshold; got"):
        save_inference_sae(config, make_weights("topk"), tmp_path / "sae", metadata={})
    with pytest.raises(ValueError, match=r"W_enc must be finite of shape \(16, 48\), got \(48, 16\)"):
        save_inference_sae(config, weights | {"W_enc": weights["W_enc"].T}, tmp_path / "sae", metadata={})
    with pytest.raises(ValueError, match="b_dec must be finite"):
        save_inference_sae(config, weights | {"b_dec": weights["b_dec"] / 0}, tmp_path / "sae", metadata={})
    assert not (tmp_path / "sae").exists()


def test_export_copies_once_and_never_over_something_else(tmp_path):
    folder, out = save(tmp_path, "batchtopk"), tmp_path / "out" / "sae"
    assert export_sae(folder.parent, out) == out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert export_sae(folder.parent, out) == out, "the same SAE is there: nothing to do"
    other = tmp_path / "other"
    other.mkdir()
    assert load_sae(export_sae(folder, other)).architecture == "jumprelu", "an empty directory is fine"
    save(tmp_path, "topk")
    with pytest.raises(CacheMismatch, match=r"must be new or empty, it holds cfg\.json, sae_weights\.safetensors"):
        export_sae(folder, out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(CacheMismatch, match=r"it holds diary\.txt"):
        export_sae(folder, tmp_path / "notes")
    with pytest.raises(CacheMismatch, match="must be a directory, got a file"):
        export_sae(folder, tmp_path / "notes" / "diary.txt")
    with pytest.raises(ManifestError, match="must be a RUN folder"):
        export_sae(tmp_path / "notes", tmp_path / "new")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_changed_byte_of_a_run_is_named(name: str, tmp_path: Path) -> None:
    """Old runs have no checksums, and an SAE that somebody changed is read without them."""
    config = make_config("topk")
    write_run_sae(tmp_path, inference_sae(config, make_weights("topk"), metadata={"model_name": "tiny"}))
    before = load_sae(tmp_path)
    path = tmp_path / "sae" / name
    data = path.read_bytes()
    path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    for where in (tmp_path, tmp_path / "sae"):
        with pytest.raises(ManifestError, match=rf"{name}: is damaged: .* restore it; if you .*sae\.crc32c\.json"):
            load_sae(where)
    path.write_bytes(data)
    (tmp_path / "sae.crc32c.json").unlink()
    assert torch.equal(load_sae(tmp_path).W_dec, before.W_dec)
