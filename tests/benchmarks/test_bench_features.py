"""The bench runs, and both ways of it find the same: it checks that itself."""

import pytest

from benchmarks import bench_features


def test_the_bench_in_small(monkeypatch):
    small = {"N_TOKENS": 2048, "CHECKED_TOKENS": 4096, "TUTORIAL_TOKENS": 1024, "PRODUCT_ROWS": 512}
    for name, value in {**small, "D_SAE": 128, "K": 4, "REPEATS": 1}.items():
        monkeypatch.setattr(bench_features, name, value)
    said: list[str] = []
    found = bench_features.run(said.append)
    assert set(found["tokens_per_second"]) == {"ours", "bound", "tutorial", "forward"}
    assert all(rate > 0 for rate in found["tokens_per_second"].values())
    assert found["peak_memory"]["stored_mb"] == pytest.approx(found["tokens"] * (4 * 16 + 12) / 1e6, rel=0.05)
    assert any(line.startswith("peak memory: ") for line in said)
