"""Losses with an SAE in the model, against a loop by hand; what is kept of them below the cache, and what is not."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation_cases import D_IN, HOOK, OTHER_HOOK, ROUNDING, filled, make_sae, new_cache, new_model
from support.tiny_caches import promised_files
from support.tiny_models import make_model_dir
from support.tiny_saes import changed
from torch import Tensor

from actcache.errors import DatasetError, ManifestError
from actcache.format.seal import seal, unseal
from actcache.integrity.verify import verify
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model
from actcache.store.cache import Cache
from trainer.evaluation.downstream_loss import LOSSES
from trainer.evaluation.evaluate import evaluate, evaluate_all
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


def by_hand(
    model: torch.nn.Module, sae: SAE, sequences: np.ndarray, special: tuple[int, ...]
) -> dict[str, list[list[float]]]:
    """CE and KL of each pass, a list for each position of the values at the tokens that count.

    Token by token, one sequence at a time, hooks put on the transformers module here.
    """
    block, positions = model.transformer.h[1], range(sequences.shape[1])
    values = {name: [[] for _ in positions] for name in ("ce", "ce_sae", "ce_zero", "kl_sae", "kl_zero")}
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
                values["kl" + name][position].append(float((p.exp() * (p - log_p[name][position])).sum()))
            for name in log_p:
                if position + 1 < len(sequence):
                    values["ce" + name][position].append(-float(log_p[name][position, sequence[position + 1]]))
    return values


def mean(by_position: list[list[float]]) -> float:
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
    by_position = by_hand(model._model, sae, cache.sequences("validation")[:n], special)
    expected = {name: mean(values) for name, values in by_position.items()}
    assert got["n_model_tokens"] == sum(map(len, by_position["kl_sae"]))
    assert (got["n_model_tokens"] < n * cache.context_size) == exclude_special_tokens
    keys = {
        "ce_loss_without_sae": "ce",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_with_ablation": "ce_zero",
        "kl_div_with_sae": "kl_sae",
        "kl_div_with_ablation": "kl_zero",
    }
    for key, name in keys.items():
        assert got[key] == pytest.approx(expected[name], rel=ROUNDING), key
    score = (expected["ce_zero"] - expected["ce_sae"]) / (expected["ce_zero"] - expected["ce"])
    assert got["ce_loss_score"] == pytest.approx(score, rel=ROUNDING)
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
    assert got["n_model_tokens"] == got["n_tokens"], "the whole split is shorter than the default"


class Counted:
    """A model that counts its passes: whole ones, and by hook those that replace an activation."""

    def __init__(self, model: LanguageModel):
        self.model, self.identity, self.device, self.passes = model, model.identity, model.device, Counter[str]()
        self.backend, self.attention_kernel, self.compiled = model.backend, model.attention_kernel, model.compiled
        self.vocab_size, self.differences, self.probe = model.vocab_size, model.differences, model.probe

    def logits(self, token_ids: Tensor, **options: object) -> Tensor:
        self.passes["whole"] += 1
        return self.model.logits(token_ids, **options)

    def logits_with(self, token_ids: Tensor, hook_name: str, replace: Callable[[Tensor], Tensor]) -> Tensor:
        self.passes[f"whole, with {hook_name}"] += 1
        return self.model.logits_with(token_ids, hook_name, replace)

    def logits_from(
        self, token_ids: Tensor, start: Tensor, hook_name: str, replace: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.passes[hook_name] += 1
        return self.model.logits_from(token_ids, start, hook_name, replace)

    def stream_before(self, hook_name: str) -> str | None:
        return self.model.stream_before(hook_name)


def counted(saes: list[SAE], cache: Cache, model: LanguageModel, **options: object) -> tuple[list[dict], Counter[str]]:
    watched = Counted(model)
    return evaluate_all(saes, cache, watched, **{"model_tokens": 96, **options}), watched.passes


def test_zero_ablation_is_run_once_a_cache(cache, model):
    """96 tokens are one batch: the original pass, one with zeros, and one for each SAE; then no more zeros."""
    sae, another = make_sae("topk"), make_sae("jumprelu", seed=1)
    first, passes = counted([sae], cache, model)
    assert passes == {"whole": 1, HOOK: 2}
    again, passes = counted([sae], cache, model)
    assert passes == {"whole": 1, HOOK: 1}
    assert again == first
    both, passes = counted([another, sae, make_sae("standard", OTHER_HOOK)], cache, model)
    assert passes == {"whole": 1, HOOK: 2, OTHER_HOOK: 2}, "the other hook's zeros are new"
    assert both[1] == first[0]
    for path in (cache.path / LOSSES).iterdir():
        path.unlink()
    assert counted([another, sae], cache, model)[0] == both[:2], "what is kept is what is computed"


def test_kept_losses_are_no_part_of_the_cache(cache, model):
    before = promised_files(cache.path)
    evaluate_all([make_sae()], cache, model, model_tokens=96)
    assert sorted(path.name.rpartition("-")[0] for path in (cache.path / LOSSES).iterdir()) == [HOOK, "original"]
    assert promised_files(cache.path) == before
    assert not verify(cache.path).problems


def test_losses_of_something_else_are_not_taken(cache, model, tmp_path):
    """Of fewer tokens, of special ones too, of a copy that says another name: their passes are made."""
    counted([make_sae()], cache, model)
    for options in ({"model_tokens": 64}, {"exclude_special_tokens": False}):
        assert counted([make_sae()], cache, model, **options)[1] == {"whole": 1, HOOK: 2}
    renamed = new_model()
    renamed.identity["name"] = "a copy of tiny"
    assert counted([make_sae()], cache, renamed)[1] == {"whole": 1, HOOK: 2}
    grown = new_cache(tmp_path / "grown", model, tokens=2560)
    (cache.path / LOSSES).rename(grown.path / LOSSES)
    assert counted([make_sae()], grown, model)[1] == {"whole": 1, HOOK: 2}
    assert counted([make_sae()], grown, model)[1] == {"whole": 1, HOOK: 1}


WRONG = ["", "{", "[]", '{"ce": [1.0], "kl": 0.0}', '{"ce": "no", "kl": null}']


@pytest.mark.parametrize("damage", [*WRONG, "other key", "digit", "larger than a float"])
def test_damaged_losses_are_made_anew(damage, cache, model):
    rows, _ = counted([make_sae()], cache, model)
    (path,) = (cache.path / LOSSES).glob(f"{HOOK}-*")
    sound = path.read_text()
    other = {"other key": sound.replace('"tiny"', '"tony"'), "digit": re.sub(r'("kl":\d+\.)\d', r"\g<1>7", sound)}
    values = unseal(sound.encode(), path)
    other["larger than a float"] = seal({"ce": [10**400], "kl": 0, "key": values["key"]}).decode()
    assert sound not in other.values()
    path.write_text(other.get(damage, damage))
    again, passes = counted([make_sae()], cache, model)
    assert (again, passes) == (rows, {"whole": 1, HOOK: 2})
    assert path.read_text() == sound


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only file system")])
def test_a_cache_that_may_not_be_written_to_keeps_nothing(error, cache, model, monkeypatch):
    def refuse(*_: object) -> None:
        raise error

    expected, _ = counted([make_sae()], cache, model)
    for path in (cache.path / LOSSES).iterdir():
        path.unlink()
    # the superuser, who may run this, may write anything
    monkeypatch.setattr("trainer.evaluation.downstream_loss.write_atomically", refuse)
    assert counted([make_sae()], cache, model) == (expected, {"whole": 1, HOOK: 2})
    error.errno = 28
    with pytest.raises(OSError, match=r"denied|read-only"):
        counted([make_sae()], cache, model)


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
    assert passes == {"whole": 1, f"whole, with {HOOK}": 2}, "what the fast path has kept is not taken"
    for name in ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score", "kl_div_score"):
        assert got[0][name] == pytest.approx(expected[0][name], rel=1e-4), name


def test_sequences_without_a_next_token_are_an_error(model, tmp_path):
    short = new_cache(tmp_path / "cache", model, context_size=2)  # BOS, and a token that is the last
    with pytest.raises(DatasetError, match=r"of the first 64 validation tokens none that counts has a next one; raise"):
        evaluate_all([make_sae()], short, model, model_tokens=64)


def test_losses_are_kept_through_no_link(cache, model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (cache.path / LOSSES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match=r"log/losses: is a link to .*, and nothing is read or written"):
        evaluate_all([make_sae()], cache, model, model_tokens=96)
    assert list((tmp_path / "elsewhere").iterdir()) == []
