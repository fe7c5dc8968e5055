"""What commands say, of values made by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from support.sweep_cases import a_config

from trainer.commands.lines import (
    attribution_lines,
    context_line,
    evaluation_lines,
    feature_facts,
    feature_lines,
    features_facts,
    features_lines,
    plan_lines,
    similar_facts,
    similar_lines,
    stability_facts,
    stability_lines,
    text_lines,
)
from trainer.features.attribution import Contribution, LogitAttribution
from trainer.features.feature_acts import map_codes, write_codes
from trainer.features.read import Features
from trainer.features.similarity import SimilarFeatures
from trainer.features.text import TokenFeatures
from trainer.features.words import Lens, Words
from trainer.training.plan import SweepPlan, n_parameters

WORDS = Words(
    tokens={1: " the", 2: " cat", 3: "\n"},
    lens=(Lens(promoted=((1, 0.25), (3, 0.125)), suppressed=((2, -1.5),)), *[Lens(promoted=(), suppressed=())] * 2),
)


def features_by_hand(folder: Path) -> Features:
    """Two sequences of three tokens: latent 0 is 2 and 4 on two of them, 1 fires with the first, 2 never."""
    token_id = np.array([1, 2, 3, 1, 1, 9], dtype=np.int32)
    token, latent, act = torch.tensor([1, 1, 4]), torch.tensor([0, 1, 0]), torch.tensor([2.0, 0.5, 4.0])
    write_codes(folder / "codes", token_id, token, latent, act, 3)
    return Features(
        d_sae=3,
        n_tokens=5,
        context_size=3,
        cache_fingerprint="0123456789abcdef",
        n_fired=np.array([2, 1, 0]),
        max_act=np.array([4.0, 0.5, 0.0], dtype=np.float32),
        codes=(map_codes(folder / "codes", 0, {}),),
    )


def test_a_plan_is_one_line_and_one_for_each_pass() -> None:
    one, other = a_config("topk", name="one"), a_config("topk", name="other")
    sizes = {"batch_tokens": 64, "memory_bytes": 16 * 10**9, "needed_bytes": 7 * 10**8}
    (alone,) = plan_lines(SweepPlan(passes=((one, other),), **sizes))
    assert alone.startswith(f"to train: 2 SAEs of {2 * n_parameters(one):,} parameters in 1 pass(es) over the cache, ")
    assert "at most about 0.7 of 16 GB of memory, " in alone
    apart = plan_lines(SweepPlan(passes=((one,), (other,)), **sizes))
    assert apart[1:] == ["pass 1: one", "pass 2: other"]


def test_evaluations_stand_in_columns_with_a_dash_for_what_is_not_there() -> None:
    row = {"name": "a-long-name", "architecture": "topk", "l0": 4.0, "explained_variance": 0.81254}
    rows = [{**row, "ce_loss_score": None, "dead_fraction": 0.0}, {**dict.fromkeys(row, None), "name": "b"}]
    rows[1] |= {"ce_loss_score": 1.0, "dead_fraction": None}
    good, *lines = evaluation_lines(rows)
    assert good == "good: l0 50 to 200, explained_variance >= 0.9, ce_loss_score >= 0.8, dead_fraction <= 0.05"
    assert [line.split() for line in lines] == [
        ["name", "architecture", "l0", "explained_variance", "ce_loss_score", "dead_fraction"],
        ["a-long-name", "topk", "4.0", "low", "0.8125", "low", "-", "0.0000", "good"],
        ["b", "-", "-", "-", "1.0000", "good", "-"],
    ]
    assert {line.index(cell) for line, cell in zip(lines, ("architecture", "topk", "-     "), strict=True)} == {13}


def test_evaluations_say_on_how_many_tokens_and_do_not_judge_baselines() -> None:
    row = {"l0": 200.5, "explained_variance": 0.9, "ce_loss_score": 0.5, "dead_fraction": 0.25, "n_tokens": 12345}
    baselines = [{**row, "name": name, "architecture": name} for name in ("pca", "random")]
    measured, _, _, *lines = evaluation_lines([{**row, "name": "a", "architecture": "topk"}, *baselines])
    assert measured == "measured on 12,345 held-out tokens"
    judged = ["200.5", "high", "0.9000", "good", "0.5000", "low", "0.2500", "high"]
    assert [line.split() for line in lines] == [
        ["a", "topk", *judged],
        *([name, name, *judged[::2]] for name in ("pca", "random")),
    ]


def test_the_table_of_an_ordinary_run_fits_100_columns() -> None:
    row = {"architecture": "batchtopk", "l0": 1024.0, "explained_variance": -0.25, "ce_loss_score": -0.5}
    lines = evaluation_lines([{**row, "name": "topk-k16-d1024-lr0.002", "dead_fraction": 0.5, "n_tokens": 10**9}])
    assert max(map(len, lines)) <= 100


def test_a_long_name_does_not_widen_every_line() -> None:
    lines = evaluation_lines([{"name": "x" * 10**6, "architecture": "y" * 10**6}, {"name": "short"}])
    assert max(map(len, lines)) < 1000


def test_an_sae_that_diverged_says_so() -> None:
    row = {"name": "wild", "architecture": "standard", "l0": 4.0}
    row |= {"explained_variance": -2.4e32, "worse_than_zeros": True}
    failed = {"name": "nan", "architecture": "topk", "diverged": True}
    lines = evaluation_lines([{**row, "ce_loss_score": None, "dead_fraction": 0.0}, failed])[-2:]
    assert lines[0].split()[:7] == ["wild", "standard", "4.0", "low", "-2.40e+32", "(worse", "than"]
    assert lines[1].split() == ["nan", "topk", "-", "diverged", "-", "-"]


def test_similar_features() -> None:
    found = SimilarFeatures(latents=torch.tensor([[3], [0]]), cosines=torch.tensor([[0.75], [0.25]]))
    nearest = [{"feature": 3, "cosine": 0.75}, {"feature": 0, "cosine": 0.25}]
    assert similar_facts(found, None) == {"mean_max_cosine": 0.5, "features": nearest}
    says = "largest cosine of 2 features: 0.5000 on average; 50.0% at 0.7 or more, 0.0% at 0.9 or more"
    assert similar_lines(found, None) == [says]
    one = SimilarFeatures(latents=torch.tensor([[3, 0]]), cosines=torch.tensor([[0.75, -0.25]]))
    assert similar_facts(one, 7) == {"feature": 7, "similar": [nearest[0], {"feature": 0, "cosine": -0.25}]}
    assert similar_lines(one, 7) == ["       3  0.7500", "       0  -0.2500"]


def test_stability() -> None:
    found = torch.tensor([1.0, 0.5])
    assert stability_facts(found, None) == {"mean_stability": 0.75, "features": [1.0, 0.5]}
    assert stability_facts(found, 1) == {"feature": 1, "stability": 0.5}
    assert stability_lines(found, 3, 1) == ["       1  0.5000"]
    says = "largest cosine, the mean of 3 SAEs, of 2 features: 0.7500 on average; 50.0% at 0.7 or more, "
    assert stability_lines(found, 3, None) == [says + "50.0% at 0.9 or more"]


def test_all_features(tmp_path) -> None:
    facts = features_facts(features_by_hand(tmp_path), 3, WORDS, 1234.5)
    rows = [
        {"feature": 0, "density": 0.4, "max_act": 4.0, "top_token": " the"},
        {"feature": 1, "density": 0.2, "max_act": 0.5, "top_token": " cat"},
    ]
    assert facts == {
        **{"d_sae": 3, "n_tokens": 5, "never_fired": 1, "cache_fingerprint": "0123456789abcdef"},
        **{"rows_per_second": 1234.5, "features": rows},
    }
    first, second, *table = features_lines(facts)
    assert first == "3 features on 5 held-out tokens, 1 never fired; 1,234 tokens/s"
    assert second == "those that fire most often:"
    assert [line.split() for line in table] == [
        ["feature", "density", "max_act", "top_token"],
        ["0", "0.4", "4", "the"],
        ["1", "0.2", "0.5", "cat"],
    ]
    assert features_lines(facts | {"rows_per_second": None})[0].startswith(
        "3 features on 5 held-out tokens, 1 never fired"
    )
    assert [row["feature"] for row in features_facts(features_by_hand(tmp_path), 1, WORDS, None)["features"]] == [0]


def test_one_feature(tmp_path) -> None:
    facts = feature_facts(features_by_hand(tmp_path), 0, 10, WORDS)
    assert (facts["n_fired"], facts["coactive"]) == (2, [{"feature": 1, "n_tokens": 1}])
    assert [context["tokens"] for context in facts["contexts"]] == [[" the", " the", "[9]"], [" the", " cat", "\n"]]
    assert feature_lines(facts) == [
        "feature 0: density 0.4, largest activation 4",
        "         4   the[ the][9]",
        "         2   the[ cat]⏎",
        f"activations from 0 to 4: {' ' * 20}█{' ' * 18}█",
        "fires together with: 1 (1 tokens)",
        "promoted: ' the' +0.25, '⏎' +0.125",
        "suppressed: ' cat' -1.5",
    ]


def test_a_feature_that_never_fires_and_has_no_lens(tmp_path) -> None:
    facts = feature_facts(features_by_hand(tmp_path), 2, 10, dataclasses.replace(WORDS, lens=None))
    assert (facts["top_token"], facts["contexts"], facts["logit_lens"]) == (None, [], None)
    assert feature_lines(facts) == [
        "feature 2: density 0, largest activation 0",
        f"activations from 0 to 0: {' ' * 40}",
        "fires together with: none",
    ]


def test_a_bin_with_anything_in_it_is_not_empty() -> None:
    facts = {"feature": 0, "density": 1.0, "max_act": 1.0, "contexts": [], "coactive": [], "logit_lens": None}
    facts["histogram"] = {"counts": [0, 1, 500, 501, 1000], "edges": [0.0, 1.0]}
    assert feature_lines(facts)[1] == "activations from 0 to 1:  ▁▄▅█"


def test_a_context_is_one_line() -> None:
    assert context_line(["a\n", " b", "\tc\r"], 1) == "a⏎[ b]⇥c␍"
    assert context_line(["a"], 0) == "[a]"


def test_what_fires_on_a_text() -> None:
    tokens = [
        TokenFeatures(token_id=0, token="<bos>", is_special=True, features=()),
        TokenFeatures(token_id=1, token=" the", is_special=False, features=((7, 2.5), (1, -0.123456))),
    ]
    assert text_lines(tokens) == [f"{'<bos>':>16}  ", f"{' the':>16}  7 (2.5)  1 (-0.1235)"]


def test_a_logit_as_a_sum() -> None:
    parts = tuple(Contribution(latent=i, activation=2.0 * i, logit=logit) for i, logit in enumerate((1.0, -0.5, 0.25)))
    found = LogitAttribution(
        token_id=1, token=" the", position=3, logit=2.0, features=parts, bias=0.5, error=-0.25, rest=1.0
    )
    first, *table = attribution_lines(found, 2)
    assert first == (
        "logit of ' the' as the next token, less the mean of all: 2 = 0.75 of the features +0.5 of the bias "
        "-0.25 of what the SAE leaves +1 of the rest"
    )
    assert [line.split() for line in table] == [
        ["feature", "activation", "logit"],
        ["0", "0", "+1"],
        ["1", "2", "-0.5"],
    ]
