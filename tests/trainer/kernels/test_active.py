"""Active entries: where each row and each latent starts, how often it fires, and the buffer that steps share."""

import pytest
import torch
from support.kernel_cases import MASKS, kept_of

from trainer.kernels import active
from trainer.kernels.active import ActiveEntries, Workspace


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


def test_dtypes_that_alternate_use_the_same_memory() -> None:
    """AuxK ranks in float32 after a step that ranked in bfloat16; so do two SAEs of a sweep, in turn."""
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.empty(4, 6, like)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        lent = workspace.empty(4, 6, like.to(dtype))
        assert (lent.shape, lent.dtype, lent.data_ptr()) == ((4, 6), dtype, first.data_ptr())


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
