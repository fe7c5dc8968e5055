"""The evaluation bench on a small model: SAELens' metrics are ours, a difference is noticed, and every way is timed."""

import json

import pytest

from benchmarks import bench_eval

pytest.importorskip("sae_lens")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"N_LAYERS": 2, "D_MODEL": 64, "VOCAB": 512, "D_SAE": 256, "K": 8, "N_SEQUENCES": 10, "REPEATS": 1}
    hooks = {"HOOK": "blocks.1.hook_resid_pre", "SAELENS_HOOK": "transformer.h.0"}
    for name, value in (sizes | hooks).items():
        monkeypatch.setattr(bench_eval, name, value)


def test_every_way_is_timed_once_the_metrics_agree():
    lines: list[str] = []
    found = json.loads(json.dumps(bench_eval.run(lines.append), allow_nan=False))
    ours = {"products", "forwards", "cache alone", "first SAE", "another SAE", "4 SAEs"}
    assert set(found["tokens_per_second"]) == ours | {"saelens without losses", "saelens"}
    assert found["n_tokens"] % 128 == 0
    assert found["saelens / another SAE"]["pairs"] == 1
    assert any("ce_loss_with_sae" in line for line in lines), "what was compared is told"


@pytest.mark.parametrize("name", ["l0", "mse", "explained_variance", "ce_loss_with_sae", "kl_div_score"])
def test_another_metric_is_noticed(name):
    names = ("l0", "l1", "mse", "explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias")
    names += ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
    names += ("kl_div_with_sae", "kl_div_with_ablation", "kl_div_score")
    same = dict.fromkeys(names, 0.5)
    bench_eval._check(same, same, str)
    with pytest.raises(AssertionError, match=f"{name}: 0.5 here, 0.51 in SAELens"):
        bench_eval._check(same, same | {name: 0.51}, str)
