"""PCA, the baseline of every SAE, against the singular vectors of all rows."""

import numpy as np
import pytest
import torch
from support.evaluation_cases import D_IN, HOOK

from actcache.flow import Batch
from trainer.evaluation.pca import fit_pca


def test_pca_equals_the_singular_vectors(cache):
    from actcache.loading.loader import Loader

    with Loader(cache, HOOK, batch_tokens=100) as loader:
        pca = fit_pca(loader, HOOK, 5)
    x = cache.hook_reader("train", HOOK).read(0, cache.n_rows())
    ids = cache.token_reader("train", "id").read(0, cache.n_rows())
    x = x[torch.from_numpy(~np.isin(ids, cache.special_token_ids))].double()
    centred = x - x.mean(0)
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vh[:5] + x.mean(0)
    x_hat = pca.decode(pca.encode(x.float())).double()
    # float32 arithmetic on vectors of d_in terms; the components' own rounding turns the subspace by as little
    assert ((x_hat - best).norm(dim=1) <= 8 * D_IN * 2.0**-24 * x.norm(dim=1)).all()
    assert (pca.n_rows, pca.d_sae, pca.d_in) == (len(x), 5, D_IN)
    first = pca.leading(2)
    torch.testing.assert_close(first.encode(x.float()), pca.encode(x.float())[:, :2], rtol=1e-5, atol=1e-4)
    for wrong in (0, 33):
        with pytest.raises(ValueError, match=rf"n_components must be in \[1, 32\], got {wrong}"):
            fit_pca(Loader(cache, HOOK), HOOK, wrong)
    with pytest.raises(ValueError, match="needs at least one batch"):
        fit_pca([], HOOK, 3)


def test_rows_of_a_plane_are_explained_by_two_components() -> None:
    """Rows 100 + a u + b v of orthonormal u and v, a twice as wide as b: first u, then v, then nothing is left."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(D_IN, 2, generator=generator, dtype=torch.float64)).Q.T
    coordinates = torch.randn(400, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0])
    coordinates = torch.linalg.qr(coordinates - coordinates.mean(0)).Q * torch.tensor([40.0, 20.0])
    x = 100 + coordinates @ plane
    batches = [Batch(x={HOOK: part}, row=torch.arange(len(part)), step=i) for i, part in enumerate(x.split(150))]
    pca = fit_pca(batches, HOOK, 2)
    torch.testing.assert_close(pca.mean, x.mean(0).float(), rtol=0, atol=100 * 2.0**-23)
    # a component is float32, and the covariance's own rounding, of float64, turns it by far less
    assert ((pca.components.double() @ plane.T).abs() - torch.eye(2)).abs().max() <= D_IN * 2.0**-23
    x_hat = pca.reconstruct(x.float())[1].double()
    assert ((x_hat - x).norm(dim=1) <= 8 * D_IN * 2.0**-24 * x.norm(dim=1)).all()
    assert (pca.n_rows, pca.d_in, pca.d_sae) == (400, D_IN, 2)
    with pytest.raises(ValueError, match=r"n_components must be in \[1, 2\], got 3"):
        pca.leading(3)
