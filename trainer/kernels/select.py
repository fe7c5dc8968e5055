"""Which latents are active: the k largest of each row, or k x batch of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, isqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import max_pool1d

from trainer.kernels import active
from trainer.kernels.active import Workspace

RANKED_AT_ONCE = 1 << 24  # pre-activations that a CPU holds at a time; smaller products are slower
RANKED_AT_ONCE_ON_CUDA = 1 << 28
FOLD = 8  # latents in a group; only the largest of a group is ranked first
SMALLEST_MARGIN = 16  # candidates of a row beside its k largest, where bfloat16 ranks
SAMPLED_ENTRIES = 1 << 16  # entries from which the batch's k-th largest is guessed


def topk_pre_acts(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    workspace: Workspace,
    *,
    by_magnitude: bool = False,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """(values, latents) of the k largest pre-activations x W_enc^T + b_enc of each row, in no order, without gradient.

    Args:
        x: what the encoder multiplies, of the dtype of the weights.
        k: how many entries of each row are active.
        workspace: holds the pre-activations of one chunk of rows.
        by_magnitude: rank |h| instead of h; the values keep their signs.
    """
    values, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    with torch.no_grad():
        for rows in _chunks(len(x), topk_chunk_rows(len(W_enc), is_cuda=active.on_cuda(x))):
            pre_acts = encoder_pre_acts(x[rows], W_enc, b_enc, workspace)
            if active.on_cuda(pre_acts):
                latents[rows] = active.triton_kernels().topk_latents(pre_acts, k, by_magnitude=by_magnitude)
            else:
                values[rows], latents[rows] = _largest_of_rows(pre_acts.abs() if by_magnitude else pre_acts, k)
            if by_magnitude or active.on_cuda(pre_acts):
                torch.gather(pre_acts, 1, latents[rows], out=values[rows])
    return values, latents


def with_margin(k: int, d_sae: int) -> int:
    """How many candidates of a row a ranking in bfloat16 must give, so that the k largest are among them.

    bfloat16 has eight bits. Near the k-th of thousands of pre-activations many are equal in it, and others have changed
    places.
    """
    return min(d_sae, k + max(SMALLEST_MARGIN, k // 4))


def largest_of_candidates(
    values: Float[Tensor, "batch candidate"], latents: Int[Tensor, "batch candidate"], k: int, *, by_magnitude: bool
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """(values, latents) of the k largest of the candidates of each row, in no order. NaN counts as the largest."""
    chosen = (values.abs() if by_magnitude else values).topk(k, sorted=False).indices
    return values.gather(1, chosen), latents.gather(1, chosen)


def largest(values: Float[Tensor, " candidate"], n: int) -> Int[Tensor, " chosen"]:
    """Indices of the n largest values, ascending; of all values where there are no more than n. NaN is the largest.

    On a CPU, of equal values the first are chosen. On CUDA that is not defined, and nothing waits for the device.
    """
    if len(values) <= n:
        return torch.arange(len(values), device=values.device)
    if active.on_cuda(values):
        return values.argsort(descending=True)[:n].sort().values
    return _largest(values, n)


def topk_chunk_rows(d_sae: int, *, is_cuda: bool) -> int:
    """How many rows `topk_pre_acts` encodes and ranks at a time."""
    return max(1, (RANKED_AT_ONCE_ON_CUDA if is_cuda else RANKED_AT_ONCE) // d_sae)


def batch_topk_entries(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Int[Tensor, " active"], Int[Tensor, " active"]]:
    """(row, latent) of the `k * batch` largest entries of the whole batch, in row-major order.

    On a CPU these are the positive ones alone, as `batch_topk_active` chooses them. On CUDA they include entries that
    are not positive, because their number cannot be known without waiting for the device; `activations.relu` makes
    them 0. On CUDA, which of several equal entries are chosen is not defined.
    """
    if not active.on_cuda(pre_acts):
        return batch_topk_active(pre_acts, k)
    batch, d_sae = pre_acts.shape
    # Groups of about sqrt(d_sae / k) entries make groups and candidates equally many. gcd finds a power of two that
    # divides d_sae.
    fold = gcd(d_sae, 1 << (isqrt(d_sae // k).bit_length() - 1))
    indices = _largest_of_all(pre_acts.view(-1, fold), k * batch).sort().values
    return indices // d_sae, indices % d_sae


def encoder_pre_acts(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    workspace: Workspace,
) -> Float[Tensor, "batch d_sae"]:
    """x W_enc^T + b_enc in the workspace, without gradient. It is valid until the workspace is used again."""
    with torch.no_grad():
        return torch.addmm(b_enc, x, W_enc.T, out=workspace.empty(len(x), len(W_enc), x))


def batch_topk_active(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Int[Tensor, " active"], Int[Tensor, " active"]]:
    """(row, latent) of the `k * batch` largest positive entries of the whole batch, in row-major order.

    Bussmann et al. 2024, "BatchTopK Sparse Autoencoders" (arXiv:2412.06410). L0 is at most k on average over the batch,
    not per row. Of equal entries the first in row-major order are chosen. NaN counts as the largest.

    A sample of the entries gives a cut that about a quarter too many entries exceed. The exact choice is made among
    these.

    Raises:
        ValueError: k is outside [1, d_sae].
    """
    batch, d_sae = pre_acts.shape
    if not 1 <= k <= d_sae:
        raise ValueError(f"batch_topk: k must be in [1, d_sae={d_sae}], got k={k}; pick a smaller k or a wider SAE")
    n_active = k * batch
    row, latent = exceeds(pre_acts, _guessed_cut(pre_acts, n_active)).nonzero(as_tuple=True)
    if len(row) < n_active:
        row, latent = exceeds(pre_acts, pre_acts.new_zeros(())).nonzero(as_tuple=True)
    if len(row) <= n_active:
        return row, latent
    chosen = _largest(pre_acts[row, latent], n_active)
    return row[chosen], latent[chosen]


def exceeds(
    pre_acts: Float[Tensor, "batch d_sae"], cut: Float[Tensor, "#d_sae"] | Float[Tensor, ""]
) -> Bool[Tensor, "batch d_sae"]:
    """Which entries exceed `cut`, a number or one number per latent. NaN does, so that the loss will show it."""
    return (pre_acts <= cut).logical_not_()


def _chunks(n_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, n_rows, chunk_rows))


def _largest_of_rows(
    ranked: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """(values, latents) of the k largest entries of each row. NaN counts as the largest.

    They lie in the k groups of FOLD latents whose maxima are largest. To rank the maxima first saves time, because
    torch.topk takes a few nanoseconds for each number that it ranks.
    """
    batch, d_sae = ranked.shape
    n_groups = d_sae // FOLD
    if d_sae % FOLD or n_groups < 2 * k:
        values, latents = ranked.topk(k, sorted=False)
        return values, latents
    maxima = max_pool1d(ranked[:, None], FOLD)[:, 0]
    groups = maxima.topk(k, sorted=False).indices
    group_row = groups + torch.arange(batch, device=ranked.device)[:, None] * n_groups
    candidates = ranked.view(batch * n_groups, FOLD).index_select(0, group_row.flatten()).view(batch, k * FOLD)
    values, chosen = candidates.topk(k, sorted=False)
    return values, groups.gather(1, chosen // FOLD) * FOLD + chosen % FOLD


def _largest_of_all(grouped: Float[Tensor, "group fold"], n: int) -> Int[Tensor, " {n}"]:
    """Flat indices of the n largest entries of the whole matrix, in no order. NaN counts as the largest.

    They lie in the n groups whose maxima are largest. On CUDA the time of torch.topk grows with the square of the
    row's length, so two short rows are ranked instead of one long one.
    """
    fold = grouped.shape[1]
    groups = grouped.amax(1).topk(n, sorted=False).indices
    chosen = grouped.index_select(0, groups).flatten().topk(n, sorted=False).indices
    return groups[chosen // fold] * fold + chosen % fold


def _guessed_cut(pre_acts: Float[Tensor, "batch d_sae"], n_active: int) -> Float[Tensor, ""]:
    """A value >= 0 that about 1.25 * n_active entries exceed. It is 0 where so many positive entries are unlikely."""
    flat = pre_acts.reshape(-1)
    stride = (
        max(1, flat.numel() // SAMPLED_ENTRIES) | 1
    )  # an odd stride reaches every latent where d_sae is a power of two
    sample = flat[::stride]
    rank = 1 + int(1.25 * n_active / flat.numel() * sample.numel())
    if rank >= sample.numel():
        return flat.new_zeros(())
    return sample.kthvalue(sample.numel() - rank + 1).values.nan_to_num(nan=0.0).clamp_min(0)


def _largest(values: Float[Tensor, " candidate"], n: int) -> Int[Tensor, " largest"]:
    """Indices of the n largest values, ascending. Of equal values the first are chosen."""
    smallest = values.kthvalue(len(values) - n + 1).values
    is_left_out = values < smallest
    surplus = len(values) - int(is_left_out.sum()) - n
    if surplus > 0:
        is_left_out[(values == smallest).nonzero().squeeze(1)[-surplus:]] = True
    return is_left_out.logical_not_().nonzero().squeeze(1)
