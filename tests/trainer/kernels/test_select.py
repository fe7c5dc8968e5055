"""The largest of a row and of a batch are those of torch.topk and of the papers' definitions."""

import pytest
import torch
from support.kernel_cases import random
from support.reference import FLOAT64, batch_topk_reference

from trainer.kernels import active, select
from trainer.kernels.active import Workspace
from trainer.kernels.select import batch_topk_active, exceeds
from trainer.sae.activations import jumprelu


@pytest.mark.parametrize("batch", [1, 5, 51])
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (9, 9), (8, 1), (6, 2)])
def test_topk_pre_acts_are_those_of_one_dense_topk(
    batch: int, d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "RANKED_AT_ONCE", 20 * d_sae)  # the longest batch in three parts
    x, W_enc, b_enc = random(batch, 4), random(d_sae, 4, seed=1), random(d_sae, seed=2)
    values, latents = select.topk_pre_acts(x, W_enc, b_enc, k, Workspace())
    pre_acts = x @ W_enc.T + b_enc
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, pre_acts.topk(k, dim=1).values, **FLOAT64)
    torch.testing.assert_close(values, pre_acts.gather(1, latents), **FLOAT64)
    assert all(len(set(row)) == k for row in latents.tolist())


@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (9, 9), (8, 1), (6, 2)])
def test_topk_by_magnitude_keeps_the_sign(d_sae: int, k: int) -> None:
    x, W_enc, b_enc = random(11, 4), random(d_sae, 4, seed=1), random(d_sae, seed=2)
    values, latents = select.topk_pre_acts(x, W_enc, b_enc, k, Workspace(), by_magnitude=True)
    pre_acts = x @ W_enc.T + b_enc
    largest = pre_acts.abs().topk(k, dim=1).values
    torch.testing.assert_close(values.abs().sort(dim=1, descending=True).values, largest, **FLOAT64)
    torch.testing.assert_close(values, pre_acts.gather(1, latents), **FLOAT64)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "d_sae", "k"), [(1, 1, 1), (5, 7, 7), (8, 64, 1), (8, 64, 3), (8, 64, 40), (3, 9, 1)]
)
def test_the_largest_of_a_batch_are_those_of_the_definition(
    batch: int, d_sae: int, k: int, dtype: torch.dtype, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal ones (in bfloat16 there are some) any: their values are equal."""
    monkeypatch.setattr(active, "on_cuda", lambda _: on_cuda)
    pre_acts = random(batch, d_sae).to(dtype)
    row, latent = select.batch_topk_entries(pre_acts, k)
    places = (row * d_sae + latent).tolist()
    assert places == sorted(set(places))
    found, expected = pre_acts[row, latent].relu(), batch_topk_reference(pre_acts, k)
    assert found[found > 0].double().sort().values.tolist() == expected[expected > 0].sort().values.tolist()
    assert not on_cuda or len(found) == k * batch, "a number that is known before"


def test_nan_is_among_the_largest_of_a_batch_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "on_cuda", lambda _: True)
    pre_acts = random(4, 64).float()
    pre_acts[2, 9] = torch.nan
    assert (2, 9) in list(zip(*(each.tolist() for each in select.batch_topk_entries(pre_acts, 1)), strict=True))


@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (16, 1), (16, 2), (48, 3), (48, 48), (100, 5), (512, 32), (520, 7)])
def test_topk_in_groups_is_topk(d_sae: int, k: int, dtype: torch.dtype, by_magnitude: bool) -> None:
    """With ties (few different values), rows of one value, NaN and infinities."""
    x = torch.randint(-4, 5, (37, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    W_enc = torch.randint(-4, 5, (d_sae, 6), generator=torch.Generator().manual_seed(1)).to(dtype)
    x[3], x[4, 0], x[5, 0] = 0.0, torch.inf, torch.nan
    b_enc = torch.zeros(d_sae, dtype=dtype)
    values, latents = select.topk_pre_acts(x, W_enc, b_enc, k, Workspace(), by_magnitude=by_magnitude)
    pre_acts = x @ W_enc.T  # small integers: exact in every type
    ranked = pre_acts.abs() if by_magnitude else pre_acts
    expected = ranked.topk(k).values
    got = ranked.gather(1, latents).sort(1, descending=True).values
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, pre_acts.gather(1, latents), rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in latents.tolist())


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("n", [2, 3, 40, 41, 100])
def test_the_largest_of_candidates_come_in_their_order(n: int, on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "on_cuda", lambda _: on_cuda)
    values = random(41).float()
    values[7] = torch.nan
    expected = sorted(sorted(range(41), key=lambda i: (i != 7, -values[i].nan_to_num().item()))[:n])
    assert select.largest(values, n).tolist() == expected


def test_candidates_of_a_row_keep_their_signs_and_latents() -> None:
    values, latents = torch.tensor([[1.0, -3.0, 2.0], [0.0, torch.nan, 5.0]]), torch.tensor([[4, 8, 1], [7, 2, 0]])
    found = select.largest_of_candidates(values, latents, 2, by_magnitude=True)
    assert dict(zip(found[1][0].tolist(), found[0][0].tolist(), strict=True)) == {8: -3.0, 1: 2.0}
    assert set(found[1][1].tolist()) == {2, 0}
    assert select.largest_of_candidates(values, latents, 1, by_magnitude=False)[1].tolist() == [[1], [2]]


def test_the_margin_is_no_wider_than_the_sae() -> None:
    assert [select.with_margin(k, 1000) for k in (1, 64, 100, 990, 1000)] == [17, 80, 125, 1000, 1000]


EXACT = {"rtol": 0.0, "atol": 0.0}


def shuffled(batch: int, d_sae: int, dtype: torch.dtype) -> torch.Tensor:
    """Half positive, distinct in float32 (ties in bfloat16 are of equal values, of which any set has the same sum)."""
    values = torch.linspace(-1, 1, batch * d_sae).to(dtype)
    return values[torch.randperm(batch * d_sae, generator=torch.Generator().manual_seed(0))].view(batch, d_sae)


def batch_topk(pre_acts: torch.Tensor, k: int) -> torch.Tensor:
    """The kept entries where they were, zeros elsewhere."""
    entries = batch_topk_active(pre_acts.detach(), k)
    return torch.zeros_like(pre_acts).index_put(entries, pre_acts[entries])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_batch_topk_equals_the_definition(k: int, dtype: torch.dtype) -> None:
    pre_acts = shuffled(8, 16, dtype)
    torch.testing.assert_close(batch_topk(pre_acts, k).double(), batch_topk_reference(pre_acts, k), **EXACT)


@pytest.mark.parametrize("k", [1, 64])
def test_batch_topk_of_a_sampled_matrix_equals_the_definition(k: int) -> None:
    pre_acts = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))  # four times SAMPLED_ENTRIES
    torch.testing.assert_close(batch_topk(pre_acts, k).double(), batch_topk_reference(pre_acts, k), **EXACT)


def test_batch_topk_is_exact_when_the_sample_misleads() -> None:
    pre_acts = torch.full((512, 512), 0.5)
    pre_acts.view(-1)[:: 512 * 512 // (1 << 16) | 1] = 3.0  # exactly the entries that are sampled
    assert batch_topk(pre_acts, 200).count_nonzero() == 200 * 512


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3)], ids=str)
def test_nothing_positive_keeps_nothing(shape: tuple[int, int]) -> None:
    assert batch_topk(torch.full(shape, -2.0), 1).count_nonzero() == 0


def test_batch_topk_breaks_ties_by_index() -> None:
    pre_acts = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert batch_topk(pre_acts, 1).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch_topk(pre_acts, 2).tolist() == [[1.0, 2.0, 1.0], [1.0, 0.0, 0.0]]


def test_nan_is_kept_so_that_the_loss_shows_it() -> None:
    pre_acts = torch.tensor([[1.0, float("nan"), -1.0, 2.0]])
    assert 1 in batch_topk_active(pre_acts, 1)[1].tolist()
    assert exceeds(pre_acts, torch.tensor(0.0)).tolist() == [[True, True, False, True]]
    assert jumprelu(pre_acts, torch.full((4,), 0.5), 0.1).isnan().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("k", [0, 17])
def test_a_bad_k_is_named(k: int) -> None:
    with pytest.raises(ValueError, match=rf"got k={k}"):
        batch_topk(torch.zeros(2, 16), k)
