"""Evaluation against definitions written out by hand, of SAEs that are loaded, of whole runs, and its refusals."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from support.adapters import activated, with_adapters
from support.evaluation_cases import D_IN, HOOK, OTHER_HOOK, ROUNDING, make_sae, new_cache, validation_rows
from support.places import CHILD, SUPPORT
from support.strangers import as_another_user, only_root
from support.tiny_models import make_model, make_tokenizer
from support.tiny_saes import changed, make_config, make_run
from torch import Tensor

from actcache.errors import CacheMismatch, ConfigError, DatasetError, ManifestError
from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from actcache.store.cache import Cache
from trainer.evaluation.downstream_loss import MODEL_METRICS
from trainer.evaluation.evaluate import evaluate, evaluate_all, evaluate_runs
from trainer.evaluation.pca import PCA
from trainer.formats.saelens import load_sae
from trainer.sae.sae import SAE

MIB = 1 << 20
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


# one thread, and an allocator that gives every freed block back
ALLOCATED_IS_RESIDENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.mark.parametrize("hook_name", [HOOK, OTHER_HOOK])
def test_a_centred_sae_is_judged_on_the_stream_without_its_mean(hook_name, cache, model):
    """The same SAE, given rows less their mean, is what it is compared with; in the model the mean is added again."""
    raw = make_sae("topk", hook_name)
    got = evaluate(changed(raw, metadata=CENTRED), cache, model)
    x = validation_rows(cache, hook_name)
    x = x - x.mean(1, keepdim=True)
    x_hat = raw(x)
    error = (x - x_hat).square().sum(1).mean()
    assert got["mse"] == pytest.approx(float(error), rel=ROUNDING)
    variance = (x - x.mean(0)).square().sum(1).mean()
    assert got["explained_variance"] == pytest.approx(float(1 - error / variance), rel=ROUNDING)

    ids = torch.from_numpy(cache.sequences("validation")).long()
    counts = ~torch.isin(ids, torch.tensor(cache.special_token_ids))

    def by_hand(y: Tensor) -> Tensor:
        mean = y.mean(-1, keepdim=True)
        return torch.where(counts[..., None], raw(y - mean) + mean, y)

    ce = -model.logits_with(ids, hook_name, by_hand).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert got["ce_loss_with_sae"] == pytest.approx(float(ce[counts[:, :-1]].mean()), rel=ROUNDING)
    assert evaluate(raw, cache, model)["ce_loss_with_sae"] != pytest.approx(got["ce_loss_with_sae"], rel=1e-6)


def test_an_sae_that_the_rows_or_the_model_cannot_feed_is_refused(cache, tmp_path):
    llama = wrap_model(make_model("llama", len(make_tokenizer())).double(), make_tokenizer(), "llama")
    of_llama = new_cache(tmp_path / "cache", llama, hook_names=(HOOK,), tokens=512)
    with pytest.raises(CacheMismatch, match="which llama cannot have: its norms are RMSNorms"):
        evaluate(changed(make_sae(), metadata=CENTRED), of_llama, llama)
    sequential = make_sae()
    sequential.reads_sequences = True
    with pytest.raises(ConfigError, match="reads whole sequences, and rows of a cache are read in any order"):
        evaluate(sequential, cache)


def test_no_baseline_is_set_beside_an_sae_of_other_rows(cache, tmp_path):
    """Of a centred stream, or of one head: PCA and random directions are fitted to whole rows."""
    run = make_run(tmp_path, make_config("topk", hook_name=HOOK, d_in=D_IN), {"name": "tiny", "revision": None})
    cfg = run / "sae" / "cfg.json"
    values = json.loads(cfg.read_text())
    cfg.write_text(json.dumps({**values, "metadata": {**values["metadata"], **CENTRED}}))
    (run / "sae.crc32c.json").unlink()
    assert [row["name"] for row in evaluate_runs(tmp_path, cache)] == [run.name]


@pytest.mark.parametrize("exclude_special_tokens", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_metrics_of_the_cache_equal_the_definitions_over_the_whole_split(architecture, exclude_special_tokens, cache):
    sae, tokens = make_sae(architecture), {"exclude_special_tokens": exclude_special_tokens}
    x, got = validation_rows(cache, HOOK, **tokens), evaluate(sae, cache, **tokens)
    f = sae.encode(x)
    x_hat = sae.decode(f)
    error = (x - x_hat).square().sum(1).mean()
    definitions = {
        "l0": (f != 0).double().sum(1).mean(),
        "l1": f.abs().sum(1).mean(),
        "mse": error,
        "explained_variance": 1 - error / (x - x.mean(0)).square().sum(1).mean(),
        "cossim": torch.cosine_similarity(x, x_hat).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        "dead_fraction": (f == 0).all(0).double().mean(),
    }
    for name, expected in definitions.items():
        assert got[name] == pytest.approx(float(expected), rel=ROUNDING), name
    assert got["n_tokens"] == len(x)
    assert (len(x) < cache.n_rows("validation")) == exclude_special_tokens == got["exclude_special_tokens"]
    assert (got["architecture"], got["hook_name"], got["d_in"], got["d_sae"]) == (architecture, HOOK, D_IN, 3 * D_IN)

    density, histogram = (f != 0).double().mean(0), got["feature_density"]
    assert histogram["never_fired"] == int((density == 0).sum())
    assert sum(histogram["counts"]) + histogram["never_fired"] == sae.d_sae
    edges = histogram["log10_edges"]
    log10 = density[density > 0].log10()
    assert histogram["counts"][-1] == int((log10 >= edges[-2]).sum()), "a density of 1 is in the last bin"
    assert all(got[name] is None for name in MODEL_METRICS)
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("piece_values", [1, 3 * D_IN * 7, 512 * 50])  # one row at a time; seven; 266, or 50 tokens
def test_pieces_change_nothing_but_the_order_of_sums(piece_values, cache, model, monkeypatch):
    saes = [make_sae("topk"), make_transcoder()]
    whole = evaluate_all(saes, cache, model, model_tokens=96)
    for name in ("PIECE_VALUES", "CPU_VOCAB_VALUES"):
        monkeypatch.setattr(f"trainer.evaluation.downstream_loss.{name}", piece_values)
    for got, expected in zip(evaluate_all(saes, cache, model, model_tokens=96), whole, strict=True):
        for name, value in expected.items():
            if isinstance(value, float):
                assert got[name] == pytest.approx(value, rel=ROUNDING), name
            elif name != "ce_loss_by_position":
                assert got[name] == value, name


def test_a_wide_sae_is_evaluated_in_bounded_memory(tmp_path):
    """32,768 latents and a vocabulary of 8,192, in pieces of 4 MiB; [rows, d_sae] of a whole batch is 256 MiB.

    At most six matrices of a piece are there at once (feature_acts, what it is made of, and sums over it in float64, of
    twice the size), and of the model's passes the log-probabilities and one more [tokens, vocab].
    """
    script = SUPPORT / "peak_memory_of_evaluation.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cache")],
        env={**CHILD, **ALLOCATED_IS_RESIDENT},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peaks = json.loads(done.stdout)
    piece, batch = 4 * peaks["piece_values"], 4 * peaks["batch_tokens"] * peaks["vocab"]
    assert peaks["cache"] < 6 * piece + MIB, f"{peaks['cache'] / MIB:.0f} MiB"
    assert peaks["model"] < 2 * batch + 6 * piece + MIB, f"{peaks['model'] / MIB:.0f} MiB"


def test_several_saes_share_a_pass_and_equal_each_alone(cache, model):
    saes = [make_sae("topk"), make_sae("jumprelu", seed=1), make_sae("standard", OTHER_HOOK)]
    calls: list[tuple[int, int]] = []
    together = evaluate_all(saes, cache, model, model_tokens=96, progress=lambda *call: calls.append(call))
    assert together == [evaluate_all([sae], cache, model, model_tokens=96)[0] for sae in saes]
    assert calls == sorted(calls)
    assert calls[-1] == (together[0]["n_tokens"] + 96,) * 2
    assert {total for _, total in calls} == {together[0]["n_tokens"] + 96}


def config_of(name: str, architecture: str = "topk", **changes: object):
    return make_config(architecture, name=name, hook_name=HOOK, d_in=D_IN, **changes)


def test_runs_are_evaluated_with_their_pca_baselines(cache, model, tmp_path):
    runs = tmp_path / "runs"
    for config in (
        config_of("b-topk", k=4),
        config_of("a-batch", "batchtopk", k=4),
        config_of("c-jump", "jumprelu"),
        config_of("d-wide", k=2),
        config_of("e-full", k=40),
    ):
        make_run(runs, config, model.identity)
    rows = evaluate_runs(runs, cache, model, model_tokens=64)
    names = ["a-batch", "b-topk", "c-jump", "d-wide", "e-full"]
    names += [f"{kind}-k{k}-{HOOK}" for kind in ("pca", "random") for k in (2, 4)]
    assert [row["name"] for row in rows] == names, "no baseline has more than d_in components"
    for row in rows:
        text = (runs / row["name"] / "eval.json").read_text()
        assert {"name": row["name"], **json.loads(text)} == row
        assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    pca = json.loads((runs / f"pca-k4-{HOOK}" / "config.json").read_text())
    assert (pca["architecture"], pca["hook_name"], pca["k"], pca["d_sae"]) == ("pca", HOOK, 4, 4)
    assert pca["cache_fingerprint"] == cache.fingerprint
    by_name = {row["name"]: row for row in rows}
    assert by_name[f"pca-k4-{HOOK}"]["explained_variance"] > by_name[f"pca-k2-{HOOK}"]["explained_variance"] > 0
    assert by_name[f"pca-k4-{HOOK}"]["l0"] == 4.0
    wide = json.loads((runs / f"random-k4-{HOOK}" / "config.json").read_text())
    assert (wide["architecture"], wide["hook_name"], wide["k"], wide["d_sae"]) == ("random", HOOK, 4, 48)
    random = by_name[f"random-k4-{HOOK}"]
    assert (random["architecture"], random["d_sae"]) == ("random", 48)
    assert 0 < random["explained_variance"] < by_name[f"pca-k4-{HOOK}"]["explained_variance"]
    assert random["ce_loss_score"] > 0
    alone = evaluate_all([load_sae(runs / "b-topk")], cache, model, model_tokens=64)[0]
    assert by_name["b-topk"] == {"name": "b-topk", **alone}

    before = {path: path.read_bytes() for path in runs.glob("*/*.json")}
    assert evaluate_runs(runs, cache, model, model_tokens=64) == rows, "baselines are not taken for runs"
    assert {path: path.read_bytes() for path in runs.glob("*/*.json")} == before
    assert [row["name"] for row in evaluate_runs(runs / "b-topk", cache)] == ["b-topk"], "one RUN brings no baseline"


def test_a_path_or_the_loaded_sae_are_the_same(cache, model, tmp_path):
    run = make_run(tmp_path, config_of("run"), model.identity)
    assert evaluate(run, cache) == evaluate(load_sae(run), cache) == evaluate(str(run / "sae"), cache)


def test_a_cache_of_another_model_says_both_sides(cache, model, tmp_path):
    tokenizer = make_tokenizer()
    other = wrap_model(make_model("gpt2", len(tokenizer), seed=1).double(), tokenizer, "other")
    with pytest.raises(CacheMismatch, match=r"harvested from 'tiny', the model is 'other': its weights are others"):
        evaluate(make_sae(), cache, other)
    renamed = wrap_model(make_model("gpt2", len(tokenizer)).double(), tokenizer, "a copy of tiny")
    assert evaluate_all([make_sae()], cache, renamed, model_tokens=32)[0]["ce_loss_score"] is not None
    run = make_run(tmp_path, config_of("run"), {"name": "elsewhere", "revision": None})
    with pytest.raises(CacheMismatch, match=r"run was trained on activations of 'elsewhere', .* holds those of 'tiny'"):
        evaluate(run, cache)


def test_a_model_that_runs_other_code_is_another_model(cache, model):
    identity = {**cache.identity, "model": {**cache.identity["model"], "code_sha256": "abc"}}
    plan = dataclasses.replace(cache.manifest.plan, identity=identity)
    brought = Cache(cache.path, dataclasses.replace(cache.manifest, plan=plan), cache.fingerprint)
    with pytest.raises(
        CacheMismatch, match=r"'tiny': it runs other code \(code_sha256 abc there, None here\).* --trust-remote-code"
    ):
        evaluate(make_sae(), brought, model)


def test_a_run_and_a_cache_under_two_names_of_one_model(cache, tmp_path):
    plan = dataclasses.replace(
        cache.manifest.plan, identity={**cache.identity, "model": {**cache.identity["model"], "name": "gpt2"}}
    )
    named = Cache(cache.path, dataclasses.replace(cache.manifest, plan=plan), cache.fingerprint)
    run = make_run(tmp_path, config_of("run"), {"name": "gpt2-small", "revision": None})
    assert evaluate(run, named)["model"] == "gpt2"


def test_an_adapter_that_is_switched_is_another_model(tmp_path):
    module = with_adapters().double()
    model = wrap_model(module, make_tokenizer(), "adapted")
    cache = new_cache(tmp_path / "c", model)
    expected = evaluate_all([make_sae()], cache, model, model_tokens=64)
    activated(module, "second")
    with pytest.raises(CacheMismatch, match="the model is 'adapted': its weights are others"):
        evaluate_all([make_sae()], cache, model, model_tokens=64)
    activated(module, "first")
    assert evaluate_all([make_sae()], cache, model, model_tokens=64) == expected


def test_a_wrong_hook_or_width_says_both_sides(cache):
    with pytest.raises(CacheMismatch, match=r"blocks\.7"):
        evaluate(make_sae(hook_name="blocks.7.hook_resid_post"), cache)
    narrow = PCA(hook_name=HOOK, mean=torch.zeros(8), components=torch.eye(8), n_rows=1)
    with pytest.raises(CacheMismatch, match=r"of width 8, .* holds 32"):
        evaluate(narrow, cache)


def test_an_empty_validation_split_is_an_error(model, tmp_path):
    empty = new_cache(tmp_path / "cache", model, holdout=0.0, tokens=256)
    with pytest.raises(DatasetError, match=r"empty validation split \(holdout 0.0\); harvest with a larger --holdout"):
        evaluate(make_sae(), empty)


def test_runs_that_are_not_there_or_not_finished(cache, model, tmp_path):
    with pytest.raises(ManifestError, match="must be a RUN or a folder of runs"):
        evaluate_runs(tmp_path / "nowhere", cache)
    make_run(tmp_path, config_of("done"), model.identity)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((tmp_path / "done" / "config.json").read_text())
    with pytest.raises(ManifestError, match=r"must have finished training, half of .* has no sae/"):
        evaluate_runs(tmp_path, cache)
    (tmp_path / "half" / "config.json").write_text('{"sae": {}}')
    (tmp_path / "half" / "sae").mkdir()
    with pytest.raises(
        ManifestError, match=r"half/config\.json: model must be an object with the name and the revision"
    ):
        evaluate_runs(tmp_path, cache)
    (tmp_path / "half" / "config.json").write_text("{")
    with pytest.raises(ManifestError, match="must be readable JSON"):
        evaluate_runs(tmp_path, cache)


@pytest.mark.parametrize(
    ("block", "lie"),
    [
        *(("model", lie) for lie in (None, "x", {"name": 3}, {"name": "tiny", "revision": []})),
        *(("sae", lie) for lie in (None, "x", {"k": 1}, {"k": 1, "hook_name": []})),
        *(("sae", {"k": lie, "hook_name": HOOK}) for lie in ("x", True, 0, 1.5, [])),
    ],
    ids=str,
)
def test_a_config_of_a_stranger_is_named(block, lie, cache, model, tmp_path):
    make_run(tmp_path, config_of("done"), model.identity)
    path = tmp_path / "done" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {block: lie}))
    (tmp_path / "done" / "crc32c.json").unlink(missing_ok=True)
    with pytest.raises(
        ManifestError, match=r"done/config\.json(: model must be|.* is not that of a run, it says hook_name)"
    ):
        evaluate_runs(tmp_path, cache)


def test_a_run_is_never_overwritten_by_a_baseline(cache, model, tmp_path):
    make_run(tmp_path, config_of(f"pca-k5-{HOOK}"), model.identity)
    with pytest.raises(CacheMismatch, match="give the run another name"):
        evaluate_runs(tmp_path, cache)


def make_transcoder() -> SAE:
    """From the MLP of block 0 to the stream after block 1, with a skip."""
    sae = make_sae("standard", hook_name=OTHER_HOOK)
    W_skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 10
    return changed(sae, architecture="skip_transcoder", hook_name_out=HOOK, W_skip=W_skip)


def test_a_transcoder_is_measured_on_what_it_predicts(cache: Cache, model: LanguageModel) -> None:
    sae, (x, y) = make_transcoder(), (validation_rows(cache, name) for name in (OTHER_HOOK, HOOK))
    got = evaluate(sae, cache, model)
    y_hat = sae.encode(x) @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
    error = (y - y_hat).square().sum(1).mean()
    assert got["mse"] == pytest.approx(float(error), rel=ROUNDING)
    variance = (y - y.mean(0)).square().sum(1).mean()
    assert got["explained_variance"] == pytest.approx(float(1 - error / variance), rel=ROUNDING)

    token_ids = torch.from_numpy(cache.sequences("validation")).long()
    kept = ~torch.isin(token_ids, torch.tensor(cache.special_token_ids))
    seen: list[Tensor] = []
    model.logits_with(token_ids, OTHER_HOOK, lambda x: seen.append(x) or x)
    predicted = sae.reconstruct(seen[0].flatten(0, 1))[1].view(seen[0].shape)
    logits = model.logits_with(token_ids, HOOK, lambda y: torch.where(kept[..., None], predicted, y))
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
    assert got["ce_loss_with_sae"] == pytest.approx(float(ce[kept[:, :-1].flatten()].mean()), rel=ROUNDING)
    assert got["ce_loss_with_ablation"] == evaluate(make_sae(), cache, model)["ce_loss_with_ablation"]


def test_a_crosscoder_is_measured_on_all_of_its_hooks(cache: Cache, model: LanguageModel) -> None:
    eye = torch.eye(2 * D_IN, dtype=torch.float64)
    sae = changed(
        make_sae("standard"),
        architecture="crosscoder",
        hook_names=(HOOK, OTHER_HOOK),
        W_enc=torch.cat([eye, -eye], 1),
        W_dec=torch.cat([eye, -eye]) * 0.5,
        b_enc=torch.zeros(4 * D_IN, dtype=torch.float64),
        b_dec=torch.zeros(2 * D_IN, dtype=torch.float64),
    )
    got, plain = evaluate_all([sae, make_sae()], cache, model)
    x = torch.cat([validation_rows(cache, name) for name in (HOOK, OTHER_HOOK)], dim=1)
    assert got["mse"] == pytest.approx(float(x.square().sum(1).mean()) / 4, rel=ROUNDING)
    assert all(got[name] is None for name in MODEL_METRICS)
    assert plain["ce_loss_score"] is not None
    calls: list[tuple[int, int]] = []
    assert evaluate_all([sae], cache, model, progress=lambda *call: calls.append(call)) == [got]
    assert calls[-1] == (got["n_tokens"],) * 2, "the model has nothing to do"


def test_an_sae_that_is_worse_than_none_says_so(cache, tmp_path):
    sae = make_sae("standard")
    calm = changed(sae, W_dec=sae.W_dec * 0, b_dec=sae.b_dec * 0)
    wild = changed(sae, W_dec=sae.W_dec * 1e16)
    found = evaluate_all([calm, wild], cache)
    assert [row.get("worse_than_zeros", False) for row in found] == [False, True]


@only_root
def test_a_folder_that_cannot_be_written_is_named_before_the_work(cache, tmp_path):
    run = make_run(tmp_path / "runs", make_config("topk", d_in=D_IN, hook_name=HOOK), cache.identity["model"])
    n_done = []
    with (
        as_another_user(run),
        pytest.raises(PermissionError, match=rf"eval\.json cannot be written; pass a copy .*: '{run}'$"),
    ):
        evaluate_runs(run, cache, progress=lambda *done: n_done.append(done))
    assert n_done == []
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
