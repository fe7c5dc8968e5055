"""Losses with an SAE in the model, against a loop by hand; what is kept of them below the cache, and what is not."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation_cases import (
    D_IN,
    HOOK,
    OTHER_HOOK,
    ROUNDING,
    counted,
    filled,
    make_sae,
    new_cache,
    validation_rows,
)
from support.tiny_models import make_model_dir
from support.tiny_saes import changed
from torch import Tensor

from actcache.errors import DatasetError
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model
from actcache.store.cache import Cache
from trainer.evaluation.evaluate import evaluate, evaluate_all
from trainer.evaluation.stored_losses import LOSSES
from trainer.sae.sae import SAE


@pytest.fixture
def cache(model: LanguageModel, tmp_path: Path) -> Cache:
    """A cache of which nothing is kept yet."""
    return new_cache(tmp_path / "cache", model)


def identity_sae() -> SAE:
    """ReLU(x) - ReLU(-x) = x, exactly."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    return changed(
        make_sae("standard"),
        W_enc=torch.cat([eye, -eye], 1),
        W_dec=torch.cat([eye, -eye]),
        b_enc=torch.zeros(2 * D_IN, dtype=torch.float64),
        b_dec=torch.zeros(D_IN, dtype=torch.float64),
    )


ABLATED = ("ce_sae", "ce_zero", "ce_mean", "kl_sae", "kl_zero", "kl_mean")


def by_hand(
    model: torch.nn.Module, sae: SAE, sequences: np.ndarray, special: tuple[int, ...], mean: Tensor
) -> dict[str, list[list[float]]]:
    """CE and KL of each pass, and whether the SAE keeps the likeliest token, at the tokens that count.

    A list for each position. `mean` is what mean ablation puts at these tokens.

    Token by token, one sequence at a time, hooks put on the transformers module here.
    """
    block, positions = model.transformer.h[1], range(sequences.shape[1])
    values = {name: [[] for _ in positions] for name in ("ce", *ABLATED, "top_sae")}
    for sequence in sequences.tolist():
        ids = torch.tensor([sequence])
        kept = [token not in special for token in sequence]

        def reconstruct(_module, _args, x, kept=kept):
            rows = [sae.decode(sae.encode(row[None]))[0] if keep else row for row, keep in zip(x[0], kept, strict=True)]
            return torch.stack(rows)[None]

        def average(_module, _args, x, kept=kept):
            return torch.stack([mean if keep else row for row, keep in zip(x[0], kept, strict=True)])[None]

        passes = {"": model(ids).logits}
        for name, hook in (("_sae", reconstruct), ("_zero", lambda _module, _args, x: x * 0), ("_mean", average)):
            handle = block.register_forward_hook(hook)
            passes[name] = model(ids).logits
            handle.remove()
        log_p = {name: logits[0].double().log_softmax(-1) for name, logits in passes.items()}
        for position, token in enumerate(sequence):
            if token in special:
                continue
            p = log_p[""][position]
            values["top_sae"][position].append(float(max_index(p) == max_index(log_p["_sae"][position])))
            for name in ("_sae", "_zero", "_mean"):
                values["kl" + name][position].append(float((p.exp() * (p - log_p[name][position])).sum()))
            for name in log_p:
                if position + 1 < len(sequence):
                    values["ce" + name][position].append(-float(log_p[name][position, sequence[position + 1]]))
    return values


def max_index(values: Tensor) -> int:
    listed = values.tolist()
    return listed.index(max(listed))


def overall(by_position: list[list[float]]) -> float:
    everything = [value for values in by_position for value in values]
    return math.fsum(everything) / len(everything)


@torch.no_grad()
@pytest.mark.parametrize("exclude_special_tokens", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_losses_with_the_model_equal_a_loop_by_hand(architecture, exclude_special_tokens, cache, model):
    sae, n = make_sae(architecture), 5
    special = cache.special_token_ids if exclude_special_tokens else ()
    tokens = {"model_tokens": n * cache.context_size, "exclude_special_tokens": exclude_special_tokens}
    (got,) = evaluate_all([sae], cache, model, **tokens)
    rows = validation_rows(cache, HOOK, exclude_special_tokens=exclude_special_tokens)
    by_position = by_hand(model._model, sae, cache.sequences("validation")[:n], special, rows.mean(0))
    expected = {name: overall(values) for name, values in by_position.items()}
    assert got["n_model_tokens"] == sum(map(len, by_position["kl_sae"]))
    assert (got["n_model_tokens"] < n * cache.context_size) == exclude_special_tokens
    keys = {
        "ce_loss_without_sae": "ce",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_mean_ablation": "ce_mean",
        "kl_div_with_sae": "kl_sae",
        "kl_div_with_ablation": "kl_zero",
        "kl_div_with_mean_ablation": "kl_mean",
        "top1_agreement": "top_sae",
    }
    for key, name in keys.items():
        assert got[key] == pytest.approx(expected[name], rel=ROUNDING), key
    score = (expected["ce_zero"] - expected["ce_sae"]) / (expected["ce_zero"] - expected["ce"])
    assert got["ce_loss_score"] == pytest.approx(score, rel=ROUNDING)
    score = (expected["ce_mean"] - expected["ce_sae"]) / (expected["ce_mean"] - expected["ce"])
    assert got["ce_loss_score_vs_mean"] == pytest.approx(score, rel=ROUNDING)
    assert got["ce_loss_increase"] == pytest.approx(expected["ce_sae"] - expected["ce"], rel=ROUNDING)
    assert 0 < got["top1_agreement"] < 1, "an SAE that keeps all or none would tell nothing"
    assert got["kl_div_score"] == pytest.approx(1 - expected["kl_sae"] / expected["kl_zero"], rel=ROUNDING)

    found = got["ce_loss_by_position"]
    assert found["n_sequences"] == [len(values) for values in by_position["ce"][:-1]]
    assert (found["n_sequences"][0] == 0) == exclude_special_tokens, "every sequence begins with BOS"
    for key, name in {"without_sae": "ce", "with_sae": "ce_sae", "with_ablation": "ce_zero"}.items():
        means = [math.fsum(values) / len(values) if values else math.nan for values in by_position[name][:-1]]
        assert filled(found[key]) == pytest.approx(means, rel=ROUNDING, nan_ok=True), key
    json.dumps(got, allow_nan=False)


def test_the_identity_recovers_everything(cache, model):
    got = evaluate(identity_sae(), cache, model)
    assert got["explained_variance"] == 1.0
    assert (got["mse"], got["ce_loss_score"], got["kl_div_score"], got["kl_div_with_sae"]) == (0.0, 1.0, 1.0, 0.0)
    assert got["ce_loss_with_sae"] == got["ce_loss_without_sae"]
    assert (got["ce_loss_increase"], got["ce_loss_score_vs_mean"], got["top1_agreement"]) == (0.0, 1.0, 1.0)
    assert got["n_model_tokens"] == got["n_tokens"], "the whole split is shorter than the default"


def test_mean_ablation_is_the_best_sae_without_latents(cache, model):
    """Its score is 0 by both measures."""
    sae = make_sae("standard")
    mean = torch.from_numpy(cache.statistics(HOOK, split="validation").mean)
    got = evaluate(changed(sae, W_dec=sae.W_dec * 0, b_dec=mean), cache, model)
    assert (got["ce_loss_score_vs_mean"], got["ce_loss_with_sae"]) == (0.0, got["ce_loss_with_mean_ablation"])
    assert got["explained_variance"] == pytest.approx(0.0, abs=ROUNDING)


def test_ablations_are_run_once_a_cache(cache, model):
    """96 tokens are one batch: the original pass, two ablations, and one for each SAE; then no more ablations."""
    sae, another = make_sae("topk"), make_sae("jumprelu", seed=1)
    first, passes = counted([sae], cache, model)
    assert passes == {"whole": 1, HOOK: 3}
    again, passes = counted([sae], cache, model)
    assert passes == {"whole": 1, HOOK: 1}
    assert again == first
    both, passes = counted([another, sae, make_sae("standard", OTHER_HOOK)], cache, model)
    assert passes == {"whole": 1, HOOK: 2, OTHER_HOOK: 3}, "the other hook's ablations are new"
    assert both[1] == first[0]
    for path in (cache.path / LOSSES).iterdir():
        path.unlink()
    assert counted([another, sae], cache, model)[0] == both[:2], "what is kept is what is computed"


def test_a_backend_whose_passes_begin_at_the_embedding(tmp_path):
    """TransformerLens' bridge: the same numbers, from whole passes.

    The bridge computes attention itself. Float32: a logit is a chain of some 3 x 5 products of 32 to 128 terms, so its
    rounding is about 2^-24 x sqrt(2000) of the largest, 30; the losses, a hundred times smaller, and their differences
    keep four digits.
    """
    folder = make_model_dir("gpt2", tmp_path / "model")
    fast, bridge = (load_model(folder, device="cpu", backend=name) for name in ("hf", "transformer_lens"))
    cache, sae = new_cache(tmp_path / "cache", fast), make_sae()
    expected, _ = counted([sae], cache, fast)
    got, passes = counted([sae], cache, bridge)
    assert passes == {"whole": 1, f"whole, with {HOOK}": 3}, "what the fast path has kept is not taken"
    for name in ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score", "kl_div_score"):
        assert got[0][name] == pytest.approx(expected[0][name], rel=1e-4), name


def test_an_sae_of_one_head_is_compared_with_that_head_ablated(tmp_path):
    """As SAELens does. The other heads stay as they are in every pass."""
    bridge = load_model(make_model_dir("gpt2", tmp_path / "model"), device="cpu", backend="transformer_lens")
    hook_z, d_head, head = "blocks.1.attn.hook_z", D_IN // 4, 2
    cache = new_cache(tmp_path / "cache", bridge, hook_names=(hook_z,))
    w = torch.randn(24, d_head, generator=torch.Generator().manual_seed(0))
    about = {"metadata": {"hook_head_index": head}, "b_enc": torch.zeros(24), "b_dec": torch.zeros(d_head)}
    sae = changed(make_sae("standard", hook_z), W_enc=w.T, W_dec=w / 9, **about)
    got = evaluate(sae, cache, bridge)
    x = validation_rows(cache, hook_z).float()[:, head * d_head : (head + 1) * d_head]
    assert got["mse"] == pytest.approx(float((x - sae(x)).square().sum(1).mean()), rel=1e-5)
    ids = torch.from_numpy(cache.sequences("validation")).long()
    counts = ~torch.isin(ids, torch.tensor(cache.special_token_ids))
    mean = torch.from_numpy(cache.statistics(hook_z, split="validation").mean).float()

    def loss(of_head: Callable[[Tensor], Tensor], where: Tensor) -> float:
        def replace(y: Tensor) -> Tensor:
            heads = y.unflatten(-1, (4, d_head)).clone()
            heads[:, :, head] = of_head(heads[:, :, head])
            return torch.where(where[..., None], heads.flatten(-2), y)

        ce = -bridge.logits_with(ids, hook_z, replace).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        return float(ce[counts[:, :-1]].mean())

    of_mean = mean.unflatten(-1, (4, d_head))[head]
    for name, expected in {
        "ce_loss_with_sae": loss(sae, counts),
        "ce_loss_with_ablation": loss(torch.zeros_like, torch.ones_like(counts)),
        "ce_loss_with_mean_ablation": loss(lambda y: of_mean.expand_as(y), counts),
    }.items():
        assert got[name] == pytest.approx(expected, rel=1e-5), name


def test_sequences_without_a_next_token_are_an_error(model, tmp_path):
    short = new_cache(tmp_path / "cache", model, context_size=2)  # BOS, and a token that is the last
    with pytest.raises(DatasetError, match=r"of the first 64 validation tokens none that counts has a next one; raise"):
        evaluate_all([make_sae()], short, model, model_tokens=64)
