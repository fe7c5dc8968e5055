"""SAEs of others become runs: folders and releases of SAELens and of others; evaluated, exported and refused."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.foreign_saes import dictionary_folder, sparsify_folder
from support.hub import Hub, save_sparsity
from support.saelens_peers import (
    D_IN,
    D_SAE,
    HOOK,
    METADATA,
    SCALE,
    VARIANTS,
    K,
    equal_files,
    equal_outputs,
    rows,
    their_sae,
)
from support.tiny_saes import make_config, make_run

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, ManifestError
from actcache.files import write_atomically
from actcache.store.cache import Cache
from trainer.config.settings import SAEConfig
from trainer.evaluation.evaluate import evaluate_runs
from trainer.features.build import build_features
from trainer.features.words import write_words
from trainer.formats.foreign import Names
from trainer.formats.imports import import_release, import_sae
from trainer.formats.saelens import export_sae, load_sae
from trainer.report.report import write_report

sae_lens = pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings(
    "ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning",
    "ignore:decoder_init_norm must be set to 1.0:UserWarning",
    "ignore:You are loading an SAE using the HuggingFace repo_id:UserWarning",
)


# --- SAELens ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_saelens_to_actcache_to_saelens(variant, tmp_path):
    """The weights stay equal to the bit, and so do the outputs."""
    theirs = their_sae(variant)
    theirs.save_model(tmp_path / "theirs")
    run = import_sae(tmp_path / "theirs", tmp_path / "run")
    equal_outputs(theirs, load_sae(run))
    exported = export_sae(run, tmp_path / "exported")
    equal_files(tmp_path / "theirs", exported)
    back = sae_lens.SAE.load_from_disk(exported)
    equal_outputs(back, load_sae(run))
    assert {name: tensor.dtype for name, tensor in back.state_dict().items()} == {
        name: tensor.dtype for name, tensor in theirs.state_dict().items()
    }
    ignored = ("sae_lens_version", "sae_lens_training_version", "device")
    first, second = (sae.cfg.to_dict() for sae in (theirs, back))
    for cfg in (first, second):
        cfg["metadata"] = {name: value for name, value in cfg["metadata"].items() if name not in ignored}
    assert first == second, "and so does every setting and what the metadata said"


def test_matching_pursuit_stops_where_saelens_stops(tmp_path):
    for number, changes in enumerate(
        (
            {"max_iterations": 3},
            {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 40},
            {"residual_threshold": 4.0},
            {"apply_b_dec_to_input": False},
        )
    ):
        theirs = their_sae("matching_pursuit", **changes)
        theirs.save_model(tmp_path / str(number))
        equal_outputs(theirs, load_sae(import_sae(tmp_path / str(number), tmp_path / f"run-{number}")))


def test_matching_pursuit_takes_no_more_iterations_than_latents(tmp_path):
    """2^40 of them would take for ever: each is a product with W_dec."""
    their_sae("matching_pursuit").save_model(tmp_path / "theirs")
    path = tmp_path / "theirs" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_iterations": 1 << 40}))
    with pytest.raises(ManifestError, match=r"max_iterations must be at most d_in and d_sae, \d+, got 1099511627776"):
        load_sae(tmp_path / "theirs")


def test_bfloat16_stays_bfloat16(tmp_path):
    theirs = their_sae("jumprelu").to(dtype=torch.bfloat16)
    theirs.save_model(tmp_path / "theirs")
    run = import_sae(tmp_path / "theirs", tmp_path / "run")
    equal_files(tmp_path / "theirs", run / "sae")
    assert load_sae(run).W_enc.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("variant", "changes", "error", "says"),
    [
        ("topk", {"normalize_activations": "covariance_whitening"}, ManifestError, "got 'covariance_whitening'; fold"),
        (
            "standard",
            {
                "metadata": {
                    **{"hook_name": "blocks.1.attn.hook_z", "model_name": "tiny"},
                    "model_from_pretrained_kwargs": {"fold_value_biases": True},
                }
            },
            CacheMismatch,
            "was trained on blocks.1.attn.hook_z of a model with fold_value_biases",
        ),
        ("standard", {"metadata": {"model_name": "tiny"}}, ManifestError, r"metadata\.hook_name"),
        ("standard", {"metadata": {"hook_name": HOOK}}, ConfigError, "does not say which model .* pass --model-name"),
    ],
    ids=str,
)
def test_what_a_cache_cannot_feed_is_refused(variant, changes, error, says, tmp_path):
    their_sae(variant, **changes).save_model(tmp_path / "theirs")
    with pytest.raises(error, match=says):
        import_sae(tmp_path / "theirs", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_given_win_and_modules_get_hook_names(tmp_path):
    module = {**METADATA, "hook_name": "transformer.h.4"}
    their_sae("standard", metadata=module).save_model(tmp_path / "theirs")
    assert load_sae(import_sae(tmp_path / "theirs", tmp_path / "1")).hook_name == "blocks.4.hook_resid_post"
    names = Names(model_name="openai-community/gpt2", hook_name="blocks.2.hook_mlp_out")
    run = import_sae(tmp_path / "theirs", tmp_path / "2", names)
    assert load_sae(run).hook_name == "blocks.2.hook_mlp_out"
    assert json.loads((run / "config.json").read_text())["model"]["name"] == "openai-community/gpt2"


def test_a_hook_z_sae_says_so_to_saelens(tmp_path):
    hook_z = {**METADATA, "hook_name": "blocks.1.attn.hook_z"}
    theirs = their_sae("standard", metadata=hook_z, reshape_activations="hook_z")
    theirs.save_model(tmp_path / "theirs")
    back = sae_lens.SAE.load_from_disk(export_sae(import_sae(tmp_path / "theirs", tmp_path / "run"), tmp_path / "out"))
    assert back.cfg.reshape_activations == "hook_z"
    x, ours = rows(), load_sae(tmp_path / "run")
    with torch.no_grad():
        heads = back(x.view(-1, 1, 4, 4))
    assert torch.equal(heads.view(-1, D_IN), ours.reconstruct(x)[1]), "four heads side by side"


# --- the run ---


@pytest.fixture
def imported(tmp_path: Path, tiny_cache: Cache) -> Path:
    """RUNS with one SAE from each format, for the tiny cache (32 wide), and one of ours."""
    runs, model_name = tmp_path / "runs", tiny_cache.identity["model"]["name"]
    theirs = their_sae("topk", d_in=32, metadata={**METADATA, "model_name": model_name})
    theirs.save_model(tmp_path / "saelens")
    import_sae(tmp_path / "saelens", runs / "saelens")
    config = make_config("topk", name="ours", hook_name=HOOK, d_in=32)
    make_run(runs, config, tiny_cache.identity["model"])
    return runs


def test_an_imported_run_is_evaluated_reported_and_exported_like_ours(imported, tiny_cache, tiny_model, tmp_path):
    rows_ = {row["name"]: row for row in evaluate_runs(imported, tiny_cache, tiny_model, model_tokens=64)}
    assert set(rows_) == {"saelens", "ours", f"pca-k{K}-{HOOK}", f"random-k{K}-{HOOK}"}
    assert rows_["saelens"]["l0"] <= K
    assert rows_["saelens"]["ce_loss_score"] is not None
    assert json.loads((imported / "saelens" / "eval.json").read_text())["architecture"] == "topk"
    assert "saelens" in write_report(imported, tmp_path / "report.html").read_text()
    assert sae_lens.SAE.load_from_disk(export_sae(imported / "saelens", tmp_path / "out")).cfg.k == K


def test_the_features_of_an_imported_run_are_what_saelens_encodes(imported, tiny_cache, tiny_model, tmp_path):
    run = imported / "saelens"
    features = build_features(run, tiny_cache)
    x = tiny_cache.hook_reader("validation", HOOK).read(0, tiny_cache.n_rows("validation")).float()
    token_id = torch.from_numpy(tiny_cache.token_reader("validation", "id").read(0, len(x)))
    x = x[~torch.isin(token_id, torch.tensor(tiny_cache.special_token_ids))]
    with torch.no_grad():
        feature_acts = sae_lens.SAE.load_from_disk(tmp_path / "saelens").encode(x)
    assert features.n_tokens == len(x)
    assert features.n_fired.tolist() == (feature_acts > 0).sum(0).tolist()
    torch.testing.assert_close(torch.from_numpy(features.max_act.copy()), feature_acts.amax(0))
    write_words(run, tiny_cache, tiny_model)
    page = write_report(imported, tmp_path / "report.html").read_text()
    assert 'id="features-1"' in page, "runs by name: ours, saelens"
    assert 'id="features-0"' not in page


def test_config_json_of_an_imported_run_has_every_key_of_ours(imported):
    ours, theirs = (json.loads((imported / name / "config.json").read_text()) for name in ("ours", "saelens"))
    assert set(theirs["sae"]) == set(ours["sae"]) == set(SAEConfig.__slots__)
    assert theirs["sae"]["lr"] is None
    known = {"name": "saelens", "architecture": "topk", "hook_name": HOOK, "d_in": 32, "d_out": 32, "d_sae": 48, "k": K}
    assert {name: value for name, value in theirs["sae"].items() if value is not None} == known
    assert theirs["model"]["revision"] is None
    assert theirs["imported"]["format"] == "saelens"
    assert "cache" not in theirs


def test_an_imported_run_of_another_model_says_how_to_rename_it(imported, tiny_cache, tmp_path):
    run = import_sae(tmp_path / "saelens", tmp_path / "elsewhere", Names(model_name="elsewhere"))
    name = tiny_cache.identity["model"]["name"]
    with pytest.raises(CacheMismatch, match=rf"activations of 'elsewhere', .*import it again with --model-name {name}"):
        evaluate_runs(run, tiny_cache)


def test_the_other_formats_are_runs_too(tmp_path):
    coder = import_sae(sparsify_folder(tmp_path / "a", "skip transcoder", hookpoint="layers.1.mlp"), tmp_path / "coder")
    sae = load_sae(coder)
    assert (sae.architecture, sae.input_hooks) == ("topk_skip_transcoder", ("blocks.1.mlp.hook_in",))
    with pytest.raises(ManifestError, match="is a topk_skip_transcoder; load it with load_sae"):
        export_sae(coder, tmp_path / "out")
    batch = import_sae(dictionary_folder(tmp_path / "b", "BatchTopKSAE"), tmp_path / "batch")
    config = json.loads((batch / "config.json").read_text())
    assert (config["sae"]["architecture"], config["sae"]["k"]) == ("batchtopk", K)
    assert config["imported"]["format"] == "dictionary_learning"
    exported = sae_lens.SAE.load_from_disk(export_sae(batch, tmp_path / "out"))
    assert exported.cfg.architecture() == "jumprelu"
    assert exported.threshold.unique().tolist() == [4.0]


def test_a_number_that_is_infinite_is_not_written(tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoder")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"lr": 0.001', '"lr": 1e999'))
    with pytest.raises(
        ManifestError, match=r"config\.json: must be readable JSON, .*: a number that is larger than any float"
    ):
        import_sae(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (folder / "config.json").write_text(text.replace('"lr": 0.001', '"lr": NaN'))
    assert load_sae(import_sae(folder, tmp_path / "run")).metadata["training_architecture_details"]["lr"] is None


def test_the_same_import_again_does_nothing_and_another_is_refused(tmp_path):
    their_sae("standard").save_model(tmp_path / "theirs")
    run = import_sae(tmp_path / "theirs", tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (run / "eval.json").write_text("{}")
    assert import_sae(tmp_path / "theirs", tmp_path / "run") == run
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path in times and path.is_file()} == {
        path: time for path, time in times.items() if path.is_file()
    }
    with pytest.raises(CacheMismatch, match=r"must be new or empty, it holds config\.json, crc32c\.json, ev"):
        import_sae(tmp_path / "theirs", tmp_path / "run", Names(model_name="other"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheMismatch, match="must be a folder, is a file"):
        import_sae(tmp_path / "theirs", tmp_path / "file")


def test_a_killed_import_leaves_no_run(tmp_path, monkeypatch):
    their_sae("standard").save_model(tmp_path / "theirs")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            import_sae(tmp_path / "theirs", tmp_path / "runs" / "run")
    assert not (tmp_path / "runs" / "run").exists()
    assert import_sae(tmp_path / "theirs", tmp_path / "runs" / "run").is_dir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def test_an_import_and_an_export_into_one_folder_harm_nothing(tmp_path, monkeypatch):
    """The export begins while the import writes."""
    their_sae("standard").save_model(tmp_path / "theirs")
    run, written = import_sae(tmp_path / "theirs", tmp_path / "first"), []

    def write(path: Path, parts: Sequence[bytes]) -> int:
        monkeypatch.undo()
        with pytest.raises(CacheLocked, match=r"/run: another process is writing it; wait for it, or pass another"):
            export_sae(run, tmp_path / "run")
        written.append(path.name)
        return write_atomically(path, parts)

    monkeypatch.setattr("trainer.formats.saelens.write_atomically", write)
    import_sae(tmp_path / "theirs", tmp_path / "run")
    assert written
    assert load_sae(tmp_path / "run").W_dec.equal(load_sae(run).W_dec)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "first", "run"}


def test_a_folder_that_is_none_of_the_three_names_those_below_it(tmp_path):
    for hookpoint in ("layers.1", "layers.2"):
        sparsify_folder(tmp_path / hookpoint, hookpoint=hookpoint)
    with pytest.raises(
        ManifestError, match=r"sae\.safetensors \(sparsify\).*; pass one of the .*layers\.1/run/layers\.1"
    ):
        import_sae(tmp_path, tmp_path / "run")
    with pytest.raises(ManifestError, match="pass a folder that an SAE was saved in"):
        import_sae(tmp_path / "nowhere", tmp_path / "run")


# --- releases ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("variant", ["jumprelu", "topk rescaled", "skip_transcoder", "gated"])
def test_a_release_computes_what_saelens_loads(variant, hub, tmp_path):
    theirs, folder = their_sae(variant), hub.folder("layer_1")
    theirs.save_model(folder)
    save_sparsity(folder)
    hub.register("stand-in", "layer_1")
    run = import_release("stand-in", "one", tmp_path / "run")
    equal_outputs(theirs, load_sae(run))
    equal_files(folder, run / "sae")
    imported = json.loads((run / "config.json").read_text())["imported"]
    assert imported == {"format": "saelens", "release": "stand-in", "sae_id": "one"}
    by_repository = import_release("someone/saes", "layer_1", tmp_path / "other")
    equal_files(run / "sae", by_repository / "sae")


def test_an_old_release_is_brought_up_to_date_with_its_scale_folded(hub, tmp_path):
    """cfg.json from before SAELens 6: flat, with its names of then, and a scale that only the registry knows."""
    theirs, folder = their_sae("standard"), hub.folder("layer_1")
    theirs.save_model(folder)
    save_sparsity(folder)
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "hook_point": HOOK, "model_name": "tiny"}
    old |= {"normalize_activations": "expected_average_only_in", "sae_lens_version": "5.3.1"}
    (folder / "cfg.json").write_text(json.dumps(old))
    hub.register("stand-in", "layer_1", norm_scaling_factor={"one": SCALE})
    run = import_release("stand-in", "one", tmp_path / "run", Names(model_name="mine"))
    theirs.fold_activation_norm_scaling_factor(SCALE)
    equal_outputs(theirs, load_sae(run))
    assert load_sae(run).hook_name == HOOK


def test_a_release_of_dictionary_learning_goes_through_saelens_loader(hub, tmp_path):
    folder = dictionary_folder(tmp_path, "AutoEncoderTopK")
    there = hub.folder("trainer_0")
    for name in ("ae.pt", "config.json"):
        (there / name).write_bytes((folder / name).read_bytes())
    hub.register("stand-in", "trainer_0", conversion_func="dictionary_learning_1")
    by_release = load_sae(import_release("stand-in", "one", tmp_path / "run"))
    by_folder = load_sae(import_sae(folder, tmp_path / "own"))
    x = rows()
    assert torch.equal(by_release.encode(x), by_folder.encode(x)), "their reader and ours agree"
    assert (by_release.architecture, by_release.hook_name) == ("topk", "blocks.3.hook_resid_post")


def test_a_release_that_is_not_to_be_had_says_why(hub, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no SAE 'one' of release 'nowhere': Release nowhere not found"):
        import_release("nowhere", "one", tmp_path / "run")
    hub.register("stand-in", "layer_1")
    with pytest.raises(ConfigError, match="no SAE 'two' of release 'stand-in': ID two not found"):
        import_release("stand-in", "two", tmp_path / "run")
    with pytest.raises(ManifestError, match=r"stand-in one cannot be loaded \(LocalEntryNotFoundError"):
        import_release("stand-in", "one", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ConfigError, match=r"pip install 'actcache\[saelens\]'"):
        import_release("stand-in", "one", tmp_path / "run")
