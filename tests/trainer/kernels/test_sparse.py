"""The sparse path against dense float64 products."""

import pytest
import torch
from support.reference import FLOAT64, batch_topk_reference
from torch import Tensor

from trainer.kernels import active, select, sparse
from trainer.kernels.active import ActiveEntries, Workspace


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept_of(mask: Tensor) -> ActiveEntries:
    row, latent = mask.nonzero(as_tuple=True)
    return ActiveEntries.of(row, latent, batch=mask.shape[0], d_sae=mask.shape[1])


MASKS = {
    "one_row": torch.ones(1, 5, dtype=torch.bool),
    "one_entry": torch.tensor([[False, True, False]]),
    "nothing": torch.zeros(3, 4, dtype=torch.bool),
    "empty_rows": torch.tensor([[False] * 4, [True, False, True, True], [False] * 4, [False, False, True, False]]),
    "everything": torch.ones(7, 9, dtype=torch.bool),
    "random": torch.rand(33, 17, generator=torch.Generator().manual_seed(1)) < 0.2,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("subtracts_b_dec", [False, True])
def test_a_sparse_autoencoder_has_the_dense_values_and_gradients(name: str, subtracts_b_dec: bool) -> None:
    mask, d_in = MASKS[name], 6
    batch, d_sae = mask.shape
    x, target = random(batch, d_in), random(batch, d_in, seed=2)
    values = {"W_enc": random(d_sae, d_in, seed=3), "b_enc": random(d_sae, seed=4)}
    values |= {"W_dec": random(d_sae, d_in, seed=5), "b_dec": random(d_in, seed=6)}
    ours, dense = ({key: value.clone().requires_grad_() for key, value in values.items()} for _ in range(2))

    encoder_input = dense["b_dec"].neg() + x if subtracts_b_dec else x
    f = (encoder_input @ dense["W_enc"].T + dense["b_enc"]) * mask
    dense_x_hat = f @ dense["W_dec"] + dense["b_dec"]
    (dense_x_hat * target).sum().backward()

    entries = kept_of(mask)
    b_dec = ours["b_dec"] if subtracts_b_dec else None
    acts = sparse.active_pre_acts(
        f.detach()[mask], entries, encoder_input.detach(), ours["W_enc"], ours["b_enc"], b_dec
    )
    x_hat = sparse.sparse_decode(acts, entries, ours["W_dec"]) + ours["b_dec"]
    (x_hat * target).sum().backward()

    torch.testing.assert_close(x_hat, dense_x_hat, **FLOAT64)
    for key, weight in ours.items():
        torch.testing.assert_close(weight.grad, dense[key].grad, msg=lambda text, key=key: f"{key}: {text}", **FLOAT64)


@pytest.mark.parametrize("subtracts_b_dec", [False, True])
def test_dense_pre_acts_have_the_gradients_of_the_product(subtracts_b_dec: bool) -> None:
    x, upstream = random(5, 3), random(5, 7, seed=1)
    leaves = [random(7, 3, seed=2), random(7, seed=3), *([random(3, seed=4)] if subtracts_b_dec else [])]
    W_enc, b_enc, *rest = (leaf.requires_grad_() for leaf in leaves)
    encoder_input = x - rest[0] if rest else x
    expected = torch.autograd.grad(encoder_input @ W_enc.T + b_enc, leaves, upstream)
    pre_acts = select.encoder_pre_acts(encoder_input, W_enc, b_enc, Workspace())
    dense = sparse.dense_pre_acts(pre_acts, encoder_input.detach(), W_enc, b_enc, rest[0] if rest else None)
    got = torch.autograd.grad(dense, leaves, upstream)
    torch.testing.assert_close(got, expected, **FLOAT64)


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


def test_a_detached_decoder_gets_no_gradient() -> None:
    entries, W_dec = kept_of(MASKS["random"]), random(17, 6).requires_grad_()
    values = random(len(entries.row), seed=3).requires_grad_()
    sparse.sparse_decode(values, entries, W_dec.detach()).sum().backward()
    assert W_dec.grad is None
    torch.testing.assert_close(values.grad, W_dec.detach().sum(1)[entries.latent], **FLOAT64)


@pytest.mark.parametrize("name", MASKS)
def test_kept_entries_are_indexed_both_ways(name: str) -> None:
    mask = MASKS[name]
    entries = kept_of(mask)
    assert entries.row_start.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert entries.latent_start.tolist() == [0, *mask.sum(0).cumsum(0).tolist()]
    in_latent_order = list(
        zip(entries.latent[entries.by_latent].tolist(), entries.row[entries.by_latent].tolist(), strict=True)
    )
    assert in_latent_order == sorted(in_latent_order), "by latent, and by row within one: the order of the sums"


@pytest.mark.parametrize("d_sae", [1 << 15, (1 << 15) + 1])
def test_wide_latents_sort_right_around_the_limit_of_int16(d_sae: int) -> None:
    latent = torch.tensor([d_sae - 1, 0, d_sae // 2, 3])
    entries = ActiveEntries.of(torch.arange(4), latent, batch=4, d_sae=d_sae)
    assert entries.by_latent.tolist() == [1, 3, 2, 0]
    assert entries.d_sae == d_sae


def test_firing_counts_leave_out_kept_zeros() -> None:
    entries = kept_of(torch.tensor([[True, True, False], [True, False, False]]))
    assert active.firing_counts(torch.tensor([0.0, 2.0, 3.0]), entries).tolist() == [1, 1, 0]


def test_the_workspace_is_allocated_once() -> None:
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.empty(4, 6, like)
    assert workspace.empty(3, 5, like).data_ptr() == first.data_ptr()
    assert workspace.empty(5, 6, like).shape == (5, 6)
    assert workspace.empty(2, 2, like.double()).dtype == torch.float64


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_entries_are_found_once_their_number_is_known(
    name: str, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = MASKS[name]
    monkeypatch.setattr(active, "on_cuda", lambda _: on_cuda)
    row, latent = active.indices_of_true(mask, active.count_true(mask))
    assert list(zip(row.tolist(), latent.tolist(), strict=True)) == [tuple(each) for each in mask.nonzero().tolist()]
    assert row.is_contiguous()
    assert latent.is_contiguous(), "the Triton kernels read them by their addresses"


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


@pytest.mark.parametrize("name", MASKS)
def test_pre_acts_of_the_kept_entries_alone(name: str) -> None:
    mask, d_in = MASKS[name], 6
    x, W_enc, b_enc = random(mask.shape[0], d_in), random(mask.shape[1], d_in, seed=3), random(mask.shape[1], seed=4)
    got = sparse.entry_pre_acts(kept_of(mask), x, W_enc, b_enc)
    torch.testing.assert_close(got, (x @ W_enc.T + b_enc)[mask], **FLOAT64)


def test_pre_acts_of_entries_in_no_order_within_their_row() -> None:
    x, W_enc, b_enc = random(9, 6), random(17, 6, seed=3), random(17, seed=4)
    latents = torch.stack([torch.randperm(17, generator=torch.Generator().manual_seed(row))[:5] for row in range(9)])
    entries = ActiveEntries.of(torch.arange(9).repeat_interleave(5), latents.flatten(), batch=9, d_sae=17)
    got = sparse.entry_pre_acts(entries, x, W_enc, b_enc)
    torch.testing.assert_close(got.view(9, 5), (x @ W_enc.T + b_enc).gather(1, latents), **FLOAT64)


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
