"""Similar features and their stability, against cosines in float64 and a permuted copy."""

import math

import pytest
import torch
from support.planted import D_SAE, make_sae
from support.surroundings import address_space
from support.tiny_models import D_MODEL
from support.tiny_saes import changed

from actcache.errors import CacheMismatch, ConfigError
from trainer.features.similarity import similar_features, stability
from trainer.features.text import ROWS_AT_ONCE
from trainer.sae.sae import SAE


def random_sae(seed: int, d_sae: int = D_SAE) -> SAE:
    w = torch.randn(d_sae, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return make_sae(W_dec=w, W_enc=w.T, b_enc=torch.zeros(d_sae))


def test_similar_features_are_those_of_the_definition():
    a, b = random_sae(0, ROWS_AT_ONCE + 30), random_sae(1)
    got = similar_features(a, b, 4)
    wide_a, wide_b = a.W_dec.double(), b.W_dec.double()
    cosines = wide_a @ wide_b.T / torch.outer(wide_a.norm(dim=1), wide_b.norm(dim=1))
    best = cosines.topk(4)
    # float32: two norms and one product over d_model terms
    bound = (2 * D_MODEL + 8) * 2.0**-24
    assert float((got.cosines.double() - best.values).abs().max()) <= bound
    assert float((cosines.gather(1, got.latents) - best.values).abs().max()) <= 2 * bound
    some = similar_features(a, b, 4, latents=[150, 3])
    assert torch.equal(some.latents, got.latents[[150, 3]])


def test_a_decoder_that_does_not_fit_twice_is_refused():
    a, b = random_sae(0), random_sae(1, 25 << 15)
    with address_space(96 << 20), pytest.raises(MemoryError, match=r"^a copy of a decoder may take 0\.17 GB$"):
        similar_features(a, b)


def test_a_permuted_copy_is_found_whole():
    a = random_sae(3)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(4))
    b = changed(a, W_dec=7 * a.W_dec[order])
    got = similar_features(a, b)
    assert torch.equal(order[got.latents[:, 0]], torch.arange(D_SAE))
    torch.testing.assert_close(got.cosines, torch.ones(D_SAE, 1), rtol=0, atol=(2 * D_MODEL + 8) * 2.0**-24)


def test_a_dead_row_is_like_nothing():
    a = random_sae(3)
    dead = changed(a, W_dec=a.W_dec.index_fill(0, torch.tensor([9]), 0.0))
    assert similar_features(dead, a, D_SAE).cosines[9].tolist() == [0.0] * D_SAE


def test_stability_is_the_mean_of_the_best_cosines():
    first, other = random_sae(0), random_sae(1)
    copy = changed(first, W_dec=first.W_dec.flip(0))
    alone = similar_features(first, other).cosines[:, 0]
    got = stability([first, other, copy])
    # the copy's cosines are 1 within rounding, so the mean is half way from there
    torch.testing.assert_close(got, (alone + 1) / 2, rtol=0, atol=(2 * D_MODEL + 8) * 2.0**-24)
    typical = math.sqrt(2 * math.log(D_SAE) / D_MODEL)
    assert 0.5 * typical < float(alone.mean()) < 1.5 * typical, "random directions are alike as the docstring says"


def test_what_cannot_be_compared():
    narrow = changed(random_sae(0), W_dec=torch.zeros(D_SAE, 8), b_dec=torch.zeros(8))
    with pytest.raises(CacheMismatch, match="one width, got 32 and 8; compare SAEs of one hook"):
        similar_features(random_sae(0), narrow)
    for n in (0, D_SAE + 1):
        with pytest.raises(ConfigError, match=rf"n must be in \[1, d_sae=96\], got {n}"):
            similar_features(random_sae(0), random_sae(1), n)
    with pytest.raises(ConfigError, match="at least two seeds, got 1"):
        stability([random_sae(0)])
