import numpy as np
import pytest
import torch
import zarr
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import NonFiniteActivations
from actcache.integrity.verify import verify
from actcache.models.huggingface import HuggingFaceModel


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_int8_stores_blocks_of_the_lossless_rows(tiny_model, tiny_texts, tmp_path, dtype):
    settings = {"dtype": dtype, "tokens": 1000, "hook_names": HOOKS[:1]}
    lossless = harvest_tiny(tiny_model, tiny_texts, tmp_path / "lossless", **settings)
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "int8", codec="int8", **settings)
    x = lossless.hook_reader("train", HOOKS[0]).read(0, lossless.n_rows())
    group = zarr.open_group(cache.path / "acts.zarr", mode="r")["train"]
    q8 = torch.from_numpy(group[f"{HOOKS[0]}/q8"][:])
    scale = torch.from_numpy(group[f"{HOOKS[0]}/scale"][:]).view(torch.bfloat16)
    product = q8.double() * scale.double().repeat_interleave(32, dim=1)
    assert ((product - x.double()).abs() <= scale.double().repeat_interleave(32, dim=1) / 2 * (1 + 2.0**-16)).all()
    assert torch.equal(cache.hook_reader("train", HOOKS[0]).read(0, cache.n_rows()), product.to(getattr(torch, dtype)))
    mean = cache.statistics(HOOKS[0], row_filter="all").mean
    stored = product.to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_allclose(mean, stored.mean(0), rtol=0, atol=len(stored) * 2.0**-52 * np.abs(stored).max())
    assert verify(cache.path).problems == ()


def test_overflow_of_the_stored_dtype_stops_with_the_token_range(tiny_model, tiny_texts, tmp_path, monkeypatch):
    real = HuggingFaceModel.run_until

    def loud(self, token_ids, hook_names, on_activation):
        real(self, token_ids, hook_names, lambda name, x: on_activation(name, x * 1e6))

    monkeypatch.setattr(HuggingFaceModel, "run_until", loud)
    with pytest.raises(NonFiniteActivations, match=r"as float16 for \d+ tokens between \d+ and \d+ of train"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype="float16")
