import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS


def test_statistics_are_those_of_the_stored_rows(tiny_cache):
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")["train"]
    x = torch.from_numpy(group[f"{HOOKS[2]}/acts"][:]).view(torch.bfloat16).double().numpy()
    plain = ~np.isin(group["tokens/id"][:], tiny_cache.special_token_ids)
    for row_filter, rows in (("all", x), ("no_special_tokens", x[plain])):
        statistics = tiny_cache.statistics(HOOKS[2], row_filter=row_filter)
        assert statistics.n_rows == len(rows)
        # sums of n terms in float64, of values far from cancelling
        np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=len(rows) * 2.0**-52)
        assert statistics.mean_square_norm == pytest.approx((rows**2).sum(1).mean(), rel=len(rows) * 2.0**-52)
        away = rows - statistics.geometric_median
        unit = away / np.linalg.norm(away, axis=1, keepdims=True)
        assert np.linalg.norm(unit.sum(0)) < 0.05 * len(rows), "of a sample of the rows, so near their own median"
