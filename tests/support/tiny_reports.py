"""A sweep's folder for reports, without training: hand-made logs, and where asked for real features of real text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from support.tiny_caches import HOOKS
from support.tiny_saes import make_config, make_run

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel
    from actcache.store.cache import Cache


def evaluation(**changes: object) -> dict:
    """What eval.json of a run says."""
    values = {
        "l0": 4.25,
        "explained_variance": 0.8125,
        "ce_loss_score": 0.96875,
        "ce_loss_score_vs_mean": 0.953125,
        "ce_loss_increase": 0.25,
        "kl_div_score": 0.9375,
        "kl_div_with_sae": 0.125,
        "top1_agreement": 0.75,
        "dead_fraction": 0.125,
        "n_tokens": 12345,
        "n_model_tokens": 6789,
        "feature_density": {"log10_edges": [-3.0, -2.0, -1.0, 0.0], "counts": [0, 40, 2], "never_fired": 6},
        "ce_loss_by_position": {
            "n_sequences": [0, 3, 3],
            "without_sae": [None, 1.5, 1.25],
            "with_sae": [None, 1.75, 1.375],
            "with_ablation": [None, 4.0, 4.5],
        },
    }
    return values | changes


def add_logs(run: Path, n: int = 5) -> None:
    """metrics.jsonl and timing.jsonl of n lines; the last line of the latter is still being written."""
    lines = [
        {
            "step": 10 * i,
            "n_tokens": 1000 * i,
            "losses/overall_loss": 100.0 / i,
            "metrics/explained_variance": 1 - 1 / i,
            "sparsity/dead_features": i,
        }
        for i in range(1, n + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates = {"tokens_per_second": 4000.0, "wait_share": 0.03}
    timing = [{"step": 10 * i, "step_seconds": 0.5 * i, **rates} for i in range(1, n + 1)]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing) + '{"step": 1')


def add_baseline(runs: Path, **changes: object) -> Path:
    """RUNS/pca-k4-..., evaluated."""
    pca = runs / "pca-k4-blocks.1.hook_resid_post"
    pca.mkdir()
    config = {"architecture": "pca", "name": pca.name, "hook_name": "blocks.1.hook_resid_post", "d_sae": 4, "k": 4}
    (pca / "config.json").write_text(json.dumps(config))
    (pca / "eval.json").write_text(json.dumps(evaluation(**changes)))
    return pca


def add_run_with_features(runs: Path, name: str, cache: Cache, model: LanguageModel, **changes: object) -> Path:
    """An evaluated run of a random SAE whose features are those on the cache's validation text."""
    from trainer.features.build import build_features
    from trainer.features.words import write_words

    config = make_config("topk", name=name, d_in=32, hook_name=HOOKS[2])
    run = make_run(runs, config, cache.identity["model"])
    (run / "eval.json").write_text(json.dumps(evaluation(**changes)))
    add_logs(run)
    build_features(run, cache)
    write_words(run, cache, model)
    return run
