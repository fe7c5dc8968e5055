"""The random dictionary against its definition, written out row by row in float64."""

import numpy as np
import torch
from support.evaluation_cases import D_IN, HOOK

from actcache.flow import Batch
from trainer.evaluation.random_sae import random_sae

D_SAE, K = 96, 5


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 + torch.randn(300, D_IN, generator=generator) * torch.linspace(0.5, 2, D_IN)


def batches(x: torch.Tensor) -> list[Batch]:
    return [Batch(x={HOOK: part}, row=torch.arange(len(part)), step=i) for i, part in enumerate(x.split(128))]


def by_hand(x: np.ndarray, mean: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """x_hat - mean of rows of length 1."""
    found = []
    for row in x - mean:
        along = directions @ row
        top = sorted(range(D_SAE), key=lambda i: -along[i])[:K]
        found.append(sum(max(along[i], 0.0) * directions[i] for i in top))
    return np.array(found)


def test_it_equals_its_definition() -> None:
    x = rows()
    mean = x.mean(0)
    sae = random_sae(batches(x), HOOK, mean, d_sae=D_SAE, k=K)
    lengths = sae.W_dec.double().norm(dim=1)
    assert (lengths - lengths.mean()).abs().max() <= 1e-6, "one length"
    wide, centre = x.double().numpy(), mean.double().numpy()
    unit = by_hand(wide, centre, torch.nn.functional.normalize(sae.W_dec.double(), dim=1).numpy())
    best = np.linalg.lstsq(unit.reshape(-1, 1), (wide - centre).ravel(), rcond=None)[0][0]
    feature_acts, x_hat = sae.reconstruct(x)
    # float32 sums of d_in terms, of rows no longer than x
    bound = 8 * D_IN * 2.0**-24 * float(x.norm(dim=1).max())
    assert np.abs(x_hat.double().numpy() - centre - best * unit).max() <= bound
    assert ((feature_acts != 0).sum(1) == K).all()
    assert (sae.d_sae, sae.k, sae.metadata["training_architecture"]) == (D_SAE, K, "random")


def test_the_directions_are_uniform_and_a_seed_gives_the_same() -> None:
    """With 4,000 of them a mean channel is below 5 / sqrt(4000 d_in), and a mean square is 1 / d_in within 10 %."""
    x = rows()
    one, same, other = (random_sae(batches(x), HOOK, x.mean(0), d_sae=4000, k=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    directions = torch.nn.functional.normalize(one.W_dec.double(), dim=1)
    assert directions.mean(0).abs().max() <= 5 / (4000 * D_IN) ** 0.5
    assert (directions.square().mean(0) * D_IN - 1).abs().max() <= 0.1
    cosines = directions @ directions.T - torch.eye(4000)
    assert cosines.abs().max() < 0.9, "no two are the same"


def test_rows_without_variance_are_no_error() -> None:
    x = torch.full((4, D_IN), 2.0)
    assert torch.equal(random_sae(batches(x), HOOK, x[0], d_sae=8, k=2).reconstruct(x)[1], x)
