"""Evaluation against definitions written out by hand, against SAELens' own evaluation, and of its refusals."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tiny_models import TEXT, make_model, make_tokenizer
from tiny_saes import make_config, make_run
from torch import Tensor
from transformers import AutoTokenizer

from actcache.cache import Cache
from actcache.errors import CacheMismatch, DatasetError, ManifestError
from actcache.harvester import harvest
from actcache.models import LanguageModel, wrap_model
from actcache.plan import HarvestConfig
from actcache.tokens import LoadedDataset
from trainer.evaluate import MODEL_METRICS, evaluate, evaluate_all, evaluate_runs
from trainer.pca import PCA, fit_pca
from trainer.saelens import SAE, load_sae

HOOK, OTHER_HOOK = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
D_IN = 32
# The model and the SAEs here compute in float64, so that two orders of summation differ by rounding alone: 2^-53 times
# the terms of the longest sum (under 10^6), times 10 for the condition of the scores, which are ratios of differences.
ROUNDING = 10 * 1e6 * 2.0**-53


def new_cache(out: Path, model: LanguageModel, **changes: object) -> Cache:
    documents = [line for line in TEXT.splitlines() if line] * 6
    config = HarvestConfig(
        hook_names=(HOOK, OTHER_HOOK), tokens=2048, context_size=32, dtype="float32", holdout=0.4, batch_size=16
    )
    source = LoadedDataset(datasets.Dataset.from_dict({"text": documents}))
    return harvest(model, source, dataclasses.replace(config, **changes), out)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = make_tokenizer()
    return wrap_model(make_model("gpt2", len(tokenizer)).double(), tokenizer, "tiny")


@pytest.fixture(scope="module")
def cache(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return new_cache(tmp_path_factory.mktemp("caches") / "cache", model)


def make_sae(architecture: str = "jumprelu", hook_name: str = HOOK, seed: int = 0) -> SAE:
    """A random float64 SAE near the identity, so that its reconstruction is bad but not nonsense."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3 * D_IN, D_IN, generator=generator, dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    return SAE(
        architecture=architecture,
        hook_name=hook_name,
        W_enc=w.T.contiguous(),
        W_dec=w / 2,
        b_enc=torch.full((3 * D_IN,), -0.1, dtype=torch.float64),
        b_dec=torch.randn(D_IN, generator=generator, dtype=torch.float64) / 10,
        threshold=torch.full((3 * D_IN,), 0.2, dtype=torch.float64) if architecture == "jumprelu" else None,
        k=6 if architecture == "topk" else None,
        subtracts_b_dec=architecture == "topk",
        metadata={},
    )


def identity_sae() -> SAE:
    """ReLU(x) - ReLU(-x) = x, exactly."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    return dataclasses.replace(
        make_sae("standard"),
        W_enc=torch.cat([eye, -eye], 1),
        W_dec=torch.cat([eye, -eye]),
        b_enc=torch.zeros(2 * D_IN, dtype=torch.float64),
        b_dec=torch.zeros(D_IN, dtype=torch.float64),
    )


def validation_rows(cache: Cache, hook_name: str) -> Tensor:
    """Every stored validation row that is not of a special token, float64, in stored order."""
    x = cache.hook_reader("validation", hook_name).read(0, cache.n_rows("validation"))
    ids = cache.token_reader("validation", "id").read(0, cache.n_rows("validation"))
    return x[torch.from_numpy(~np.isin(ids, cache.special_token_ids))].double()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_metrics_of_the_cache_equal_the_definitions_over_the_whole_split(architecture, cache):
    sae, x = make_sae(architecture), validation_rows(cache, HOOK)
    got = evaluate(sae, cache)
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
    assert got["n_tokens"] == len(x) < cache.n_rows("validation"), "special tokens are left out"
    assert (got["architecture"], got["hook_name"], got["d_in"], got["d_sae"]) == (architecture, HOOK, D_IN, 3 * D_IN)

    density, histogram = (f != 0).double().mean(0), got["feature_density"]
    assert histogram["never_fired"] == int((density == 0).sum())
    assert sum(histogram["counts"]) + histogram["never_fired"] == sae.d_sae
    edges = histogram["log10_edges"]
    log10 = density[density > 0].log10()
    assert histogram["counts"][-1] == int((log10 >= edges[-2]).sum()), "a density of 1 is in the last bin"
    assert all(got[name] is None for name in ("ce_loss_score", "kl_div_score", "ce_loss_with_sae", "n_model_tokens"))
    json.dumps(got, allow_nan=False)


def by_hand(model: torch.nn.Module, sae: SAE, sequences: np.ndarray, special: tuple[int, ...]) -> dict[str, float]:
    """CE and KL token by token: one sequence at a time, hooks put on the transformers module here."""
    block = model.transformer.h[1]
    sums: dict[str, list[float]] = {"ce": [], "ce_sae": [], "ce_zero": [], "kl_sae": [], "kl_zero": []}
    for sequence in sequences.tolist():
        ids = torch.tensor([sequence])
        kept = [token not in special for token in sequence]

        def reconstruct(_module, _args, x, kept=kept):
            rows = [sae.decode(sae.encode(row[None]))[0] if keep else row for row, keep in zip(x[0], kept, strict=True)]
            return torch.stack(rows)[None]

        passes = {"": model(ids).logits}
        for name, hook in (("_sae", reconstruct), ("_zero", lambda _module, _args, x: x * 0)):
            handle = block.register_forward_hook(hook)
            passes[name] = model(ids).logits
            handle.remove()
        log_p = {name: logits[0].double().log_softmax(-1) for name, logits in passes.items()}
        for position, token in enumerate(sequence):
            if token in special:
                continue
            p = log_p[""][position]
            for name in ("_sae", "_zero"):
                sums["kl" + name].append(float((p.exp() * (p - log_p[name][position])).sum()))
            for name in log_p:
                if position + 1 < len(sequence):
                    sums["ce" + name].append(-float(log_p[name][position, sequence[position + 1]]))
    return {name: math.fsum(values) / len(values) for name, values in sums.items()} | {"n": len(sums["kl_sae"])}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_losses_with_the_model_equal_a_loop_by_hand(architecture, cache, model):
    sae, n = make_sae(architecture), 5
    got = evaluate_all([sae], cache, model, model_tokens=n * cache.context_size)[0]
    expected = by_hand(model._model, sae, cache.sequences("validation")[:n], cache.special_token_ids)
    assert got["n_model_tokens"] == expected["n"] < n * cache.context_size
    assert got["ce_loss_without_sae"] == pytest.approx(expected["ce"], rel=ROUNDING)
    assert got["ce_loss_with_sae"] == pytest.approx(expected["ce_sae"], rel=ROUNDING)
    assert got["ce_loss_with_ablation"] == pytest.approx(expected["ce_zero"], rel=ROUNDING)
    assert got["kl_div_with_sae"] == pytest.approx(expected["kl_sae"], rel=ROUNDING)
    assert got["kl_div_with_ablation"] == pytest.approx(expected["kl_zero"], rel=ROUNDING)
    score = (expected["ce_zero"] - expected["ce_sae"]) / (expected["ce_zero"] - expected["ce"])
    assert got["ce_loss_score"] == pytest.approx(score, rel=ROUNDING)
    assert got["kl_div_score"] == pytest.approx(1 - expected["kl_sae"] / expected["kl_zero"], rel=ROUNDING)


def test_the_identity_recovers_everything(cache, model):
    got = evaluate(identity_sae(), cache, model)
    assert got["explained_variance"] == 1.0
    assert (got["mse"], got["ce_loss_score"], got["kl_div_score"], got["kl_div_with_sae"]) == (0.0, 1.0, 1.0, 0.0)
    assert got["ce_loss_with_sae"] == got["ce_loss_without_sae"]
    assert got["n_model_tokens"] == got["n_tokens"], "the whole split is shorter than the default"


@torch.no_grad()
def test_saelens_own_evaluation_agrees_on_the_same_tokens(cache, model, tiny_gpt2_dir):
    """sae_lens.evals on the bridge to the same weights and on the same sequences.

    CE and KL: float64 on both sides. The rest is computed from float32 rows of the cache here and from fresh float64
    activations there: an error of 2^-24 ||x|| passes through encoder and decoder, and against the residual it counts
    ||x|| / ||x - x_hat|| times more.
    """
    evals = pytest.importorskip("sae_lens.evals")
    from sae_lens import SAE as TheirSAE
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge

    ours = make_sae("jumprelu")
    theirs = TheirSAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": D_IN,
            "d_sae": ours.d_sae,
            "dtype": "float64",
            "apply_b_dec_to_input": False,
            "metadata": {"hook_name": HOOK},
        }
    )
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    theirs.load_state_dict({name: getattr(ours, name) for name in names})
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    hf = make_model("gpt2", len(tokenizer)).double()
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, dtype=torch.float64)
    sequences = torch.from_numpy(cache.sequences("validation")).long()
    store = SimpleNamespace(
        get_batch_tokens=lambda _n: sequences,
        reset_input_dataset=lambda: None,
        context_size=cache.context_size,
        store_batch_size_prompts=len(sequences),
    )
    config = evals.EvalConfig(
        batch_size_prompts=len(sequences),
        n_eval_reconstruction_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    grouped, features = evals.run_evals(
        theirs, store, bridge, ActivationScaler(), config, exclude_special_tokens=cache.special_token_ids
    )
    expected = {name: value for group in grouped.values() for name, value in group.items()}
    got = evaluate(ours, cache, model)

    for name in ("ce_loss_score", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation"):
        assert got[name] == pytest.approx(expected[name], rel=ROUNDING), name
    for name in ("kl_div_score", "kl_div_with_sae", "kl_div_with_ablation"):
        assert got[name] == pytest.approx(expected[name], rel=ROUNDING), name
    gain = 1 + float(torch.linalg.matrix_norm(ours.W_enc, 2) * torch.linalg.matrix_norm(ours.W_dec, 2))
    x = validation_rows(cache, HOOK)
    stored = 2 * 2.0**-24 * gain * math.sqrt(float(x.square().sum(1).mean()) / got["mse"])
    for name in ("l0", "l1", "explained_variance", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias"):
        assert got[name] == pytest.approx(expected[name], rel=stored), name
    assert got["feature_density"]["never_fired"] == sum(density == 0 for density in features["feature_density"])


def test_several_saes_share_a_pass_and_equal_each_alone(cache, model):
    saes = [make_sae("topk"), make_sae("jumprelu", seed=1), make_sae("standard", OTHER_HOOK)]
    calls: list[tuple[int, int]] = []
    together = evaluate_all(saes, cache, model, model_tokens=96, progress=lambda *call: calls.append(call))
    assert together == [evaluate_all([sae], cache, model, model_tokens=96)[0] for sae in saes]
    assert calls == sorted(calls)
    assert calls[-1] == (together[0]["n_tokens"] + 96,) * 2
    assert {total for _, total in calls} == {together[0]["n_tokens"] + 96}


def test_pca_equals_the_singular_vectors(cache):
    from actcache.loader import Loader

    with Loader(cache, HOOK, batch_tokens=100) as loader:
        pca = fit_pca(loader, HOOK, 5)
    x = cache.hook_reader("train", HOOK).read(0, cache.n_rows())
    ids = cache.token_reader("train", "id").read(0, cache.n_rows())
    x = x[torch.from_numpy(~np.isin(ids, cache.special_token_ids))].double()
    centred = x - x.mean(0)
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vh[:5] + x.mean(0)
    x_hat = pca.decode(pca.encode(x.float())).double()
    # float32 arithmetic on vectors of d_in terms; the components' own rounding turns the subspace by as little
    assert ((x_hat - best).norm(dim=1) <= 8 * D_IN * 2.0**-24 * x.norm(dim=1)).all()
    assert (pca.n_rows, pca.d_sae, pca.d_in) == (len(x), 5, D_IN)
    first = pca.leading(2)
    torch.testing.assert_close(first.encode(x.float()), pca.encode(x.float())[:, :2], rtol=1e-5, atol=1e-4)
    for wrong in (0, 33):
        with pytest.raises(ValueError, match=rf"n_components must be in \[1, 32\], got {wrong}"):
            fit_pca(Loader(cache, HOOK), HOOK, wrong)
    with pytest.raises(ValueError, match="needs at least one batch"):
        fit_pca([], HOOK, 3)


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
    names = ["a-batch", "b-topk", "c-jump", "d-wide", "e-full", f"pca-k2-{HOOK}", f"pca-k4-{HOOK}"]
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
    with pytest.raises(CacheMismatch, match=r"harvested from 'tiny' \(weights_sha256 .*the model is 'other' \(weights"):
        evaluate(make_sae(), cache, other)
    renamed = wrap_model(make_model("gpt2", len(tokenizer)).double(), tokenizer, "a copy of tiny")
    assert evaluate_all([make_sae()], cache, renamed, model_tokens=32)[0]["ce_loss_score"] is not None
    run = make_run(tmp_path, config_of("run"), {"name": "elsewhere", "revision": None})
    with pytest.raises(CacheMismatch, match=r"run was trained on activations of 'elsewhere', .* holds those of 'tiny'"):
        evaluate(run, cache)


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
    with pytest.raises(ManifestError, match=r"half/config\.json is not that of a run"):
        evaluate_runs(tmp_path, cache)
    (tmp_path / "half" / "config.json").write_text("{")
    with pytest.raises(ManifestError, match="must be readable JSON"):
        evaluate_runs(tmp_path, cache)


def test_a_run_is_never_overwritten_by_a_baseline(cache, model, tmp_path):
    make_run(tmp_path, config_of(f"pca-k5-{HOOK}"), model.identity)
    with pytest.raises(CacheMismatch, match="give the run another name"):
        evaluate_runs(tmp_path, cache)


def make_transcoder() -> SAE:
    """From the MLP of block 0 to the stream after block 1, with a skip."""
    sae = make_sae("standard", hook_name=OTHER_HOOK)
    W_skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 10
    return dataclasses.replace(sae, architecture="skip_transcoder", hook_name_out=HOOK, W_skip=W_skip)


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
    sae = dataclasses.replace(
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
