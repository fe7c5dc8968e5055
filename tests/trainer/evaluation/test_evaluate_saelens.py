"""Our evaluation against SAELens' own, sae_lens.evals, of SAEs that SAELens has saved, on the same tokens.

Its `explained_variance` is ours, of the variance over all batches; the mean over rows that it calls
`explained_variance_legacy` is neither computed here nor what it is compared with.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.evaluation_cases import D_IN, HOOK, ROUNDING, filled, make_sae, validation_rows
from support.tiny_models import make_model
from torch import Tensor
from transformers import AutoTokenizer

from actcache.store.cache import Cache
from trainer.evaluation.evaluate import evaluate
from trainer.formats.saelens import load_sae
from trainer.sae.sae import SAE

evals = pytest.importorskip("sae_lens.evals")

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
FROM_THE_MODEL = (
    *("ce_loss_score", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation"),
    *("kl_div_score", "kl_div_with_sae", "kl_div_with_ablation"),
)


@pytest.fixture(scope="module")
def bridge(tiny_gpt2_dir: Path) -> Any:
    """TransformerLens' bridge to the same float64 weights."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    hf_model = make_model("gpt2", len(tokenizer)).double()
    return TransformerBridge.boot_transformers("gpt2", hf_model=hf_model, tokenizer=tokenizer, dtype=torch.float64)


def their_sae(architecture: str) -> Any:
    """SAELens' SAE, float64, with the weights of `make_sae`; of gated a gate and a magnitude that differ."""
    from sae_lens import SAE as TheirSAE

    ours = make_sae(architecture)
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": ours.d_sae, "dtype": "float64"}
    if architecture == "topk":
        config |= {"k": ours.k, "rescale_acts_by_decoder_norm": False}
    theirs = TheirSAE.from_dict(
        config | {"apply_b_dec_to_input": architecture in ("topk", "gated"), "metadata": {"hook_name": HOOK}}
    )
    spread = torch.linspace(-0.3, 0.3, ours.d_sae, dtype=torch.float64)
    of_gated = {"b_gate": ours.b_enc, "b_mag": spread, "r_mag": spread.flip(0)}
    theirs.load_state_dict({name: of_gated.get(name, getattr(ours, name)) for name in theirs.state_dict()})
    return theirs


def their_store(cache: Cache) -> Any:
    """What SAELens' evals take tokens from: the whole validation split at once, in order."""
    sequences = torch.from_numpy(cache.sequences("validation")).long()
    return SimpleNamespace(
        get_batch_tokens=lambda _n: sequences,
        reset_input_dataset=lambda: None,
        context_size=cache.context_size,
        store_batch_size_prompts=len(sequences),
    )


def their_metrics(theirs: Any, cache: Cache, bridge: Any, special: tuple[int, ...]) -> tuple[dict, dict]:
    """Every metric that run_evals has, and the feature-wise ones."""
    from sae_lens.training.activation_scaler import ActivationScaler

    config = evals.EvalConfig(
        batch_size_prompts=cache.n_rows("validation") // cache.context_size,
        n_eval_reconstruction_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    grouped, features = evals.run_evals(
        theirs, their_store(cache), bridge, ActivationScaler(), config, exclude_special_tokens=list(special)
    )
    return {name: value for group in grouped.values() for name, value in group.items()}, features


def tolerances(sae: SAE, x: Tensor) -> dict[str, float]:
    """How far each metric can move when every element of x moves by u = 2^-24 of itself, to the first order in u.

    So far do the float32 rows of the cache lie from the float64 activations that SAELens computes anew. A row of length
    |x| moves by u|x|; with E and D the largest singular values of encoder (the magnitude's, of gated) and decoder, its
    activations by E u|x| and x_hat by E D u|x|, as long as the same latents are active, which l0 tells. Means over rows
    are bounded by Cauchy and Schwarz. l0 is a sum of small integers, and SAELens divides it in float32: one rounding.
    """
    u, (f, x_hat) = 2.0**-24, sae.reconstruct(x)
    stretch = 1.0 if sae.r_mag is None else float(sae.r_mag.exp().max())
    encoder, decoder = (float(torch.linalg.matrix_norm(w, 2)) for w in (sae.W_enc, sae.W_dec))
    gain = stretch * encoder * decoder
    norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
    square, square_hat, dot = (float(each.mean()) for each in (norm**2, norm_hat**2, (x * x_hat).sum(1)))
    mse = float((x - x_hat).square().sum(1).mean())
    variance = float((x - x.mean(0)).square().sum(1).mean())
    moved_mse = 2 * (1 + gain) * u * (mse * square) ** 0.5
    moved_hat, moved_dot = (
        2 * gain * u * (square_hat * square) ** 0.5,
        u * ((square_hat * square) ** 0.5 + gain * square),
    )
    first_order = {
        "l0": u * float((f != 0).double().sum(1).mean()),
        "l1": stretch * encoder * u * sae.d_sae**0.5 * float(norm.mean()),
        "mse": moved_mse,
        "explained_variance": moved_mse / variance + mse / variance**2 * 4 * u * square,
        "cossim": 2 * u * float((1 + gain * norm / norm_hat).mean()),
        "l2_ratio": u * float((gain + norm_hat / norm).mean()),
        "relative_reconstruction_bias": moved_hat / abs(dot) + square_hat / dot**2 * moved_dot,
    }
    return {name: 1.01 * bound for name, bound in first_order.items()}


@torch.no_grad()
@pytest.mark.parametrize("exclude_special_tokens", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_that_saelens_saved_has_the_metrics_that_saelens_gives_it(
    architecture, exclude_special_tokens, cache, model, bridge, tmp_path
):
    """CE and KL are float64 on both sides."""
    theirs = their_sae(architecture)
    theirs.save_model(tmp_path)
    special = cache.special_token_ids if exclude_special_tokens else ()
    expected, features = their_metrics(theirs, cache, bridge, special)
    got = evaluate(tmp_path, cache, model, exclude_special_tokens=exclude_special_tokens)

    for name in FROM_THE_MODEL:
        assert got[name] == pytest.approx(expected[name], rel=ROUNDING), name
    x = validation_rows(cache, HOOK, exclude_special_tokens=exclude_special_tokens)
    for name, tolerance in tolerances(load_sae(tmp_path), x).items():
        assert got[name] == pytest.approx(expected[name], rel=0, abs=tolerance), name
    assert got["feature_density"]["never_fired"] == sum(density == 0 for density in features["feature_density"])
    assert abs(got["explained_variance"] - expected["explained_variance_legacy"]) > 1e-3, "the two are told apart"


@torch.no_grad()
@pytest.mark.parametrize("exclude_special_tokens", [True, False])
def test_losses_by_position_are_the_means_of_those_that_saelens_has_for_each_token(
    exclude_special_tokens, cache, model, bridge, tmp_path
):
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs, token_ids = their_sae("jumprelu"), torch.from_numpy(cache.sequences("validation")).long()
    theirs.save_model(tmp_path)
    special = list(cache.special_token_ids) if exclude_special_tokens else []
    how = {"compute_kl": False, "compute_ce_loss": True, "ignore_tokens": special}
    of_each = evals.get_recons_loss(theirs, bridge, ActivationScaler(), token_ids, **how)
    got = evaluate(tmp_path, cache, model, exclude_special_tokens=exclude_special_tokens)["ce_loss_by_position"]
    kept = ~torch.isin(token_ids[:, :-1], torch.tensor(special, dtype=torch.long))
    assert got["n_sequences"] == kept.sum(0).tolist()
    for name in ("without_sae", "with_sae", "with_ablation"):
        columns = zip(of_each[f"ce_loss_{name}"].T, kept.T, strict=True)
        means = [float(losses[keep].mean()) for losses, keep in columns]  # NaN of none
        assert filled(got[name]) == pytest.approx(means, rel=ROUNDING, nan_ok=True), name
