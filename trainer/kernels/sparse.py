"""The sparse path of a training step: encode densely once, then touch only the entries that are kept.

A dense step costs 10 * batch * d_in * d_sae FLOPs; here only the encoder's 2 * batch * d_in * d_sae stay, the decoder
and both weight gradients gather `kept` rows. On a CPU everything is plain torch; for tensors on CUDA
`triton_kernels` takes its place, and no call but `n_true` waits for the device. Each sum runs in one fixed order (by
row in the decoder, by latent in the gradients), so results repeat bit for bit.
"""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, max_pool1d

from trainer.sae import activations

FOLD = 8  # latents of which only the largest is looked at first
RANKED_AT_ONCE = 1 << 24  # pre-activations that are in memory together on a CPU: smaller products are slower
RANKED_AT_ONCE_ON_CUDA = 1 << 28


class Workspace:
    """A [batch, d_sae] buffer that steps reuse: a fresh one of this size costs as much as filling it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def empty(self, n_rows: int, d_sae: int, like: Tensor) -> Float[Tensor, "{n_rows} {d_sae}"]:
        """An uninitialised matrix of like's dtype and device; it shares memory with the last one handed out."""
        held = self._buffer
        if held.numel() < n_rows * d_sae or held.dtype != like.dtype or held.device != like.device:
            self._buffer = like.new_empty(n_rows * d_sae)
        return self._buffer[: n_rows * d_sae].view(n_rows, d_sae)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptEntries:
    """Which entries of a [batch, d_sae] matrix are kept, ordered by row and by latent; any number in a row, also none.

    row, latent: of each entry, rows ascending. row_start: entries of row b are row_start[b] : row_start[b + 1].
    by_latent: the stable order of the entries by latent; row_by_latent, latent_start: as row and row_start, in that
    order.
    """

    row: Int[Tensor, " kept"]
    latent: Int[Tensor, " kept"]
    row_start: Int[Tensor, " batch_plus_1"]
    by_latent: Int[Tensor, " kept"]
    row_by_latent: Int[Tensor, " kept"]
    latent_start: Int[Tensor, " d_sae_plus_1"]

    @staticmethod
    def of(row: Int[Tensor, " kept"], latent: Int[Tensor, " kept"], *, batch: int, d_sae: int) -> "KeptEntries":
        """From the coordinates, rows ascending."""
        # Stable, for the order changes sums; of the narrowest type, for a radix sort of int16 is three times faster.
        narrow = latent.to(torch.int16 if d_sae <= 1 << 15 else torch.int32)
        by_latent = narrow.argsort(stable=True)
        return KeptEntries(
            row=row,
            latent=latent,
            row_start=_starts(row, None, batch),
            by_latent=by_latent,
            row_by_latent=row.index_select(0, by_latent),
            latent_start=_starts(latent, by_latent, d_sae),
        )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.latent_start) - 1


def topk_pre_acts(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    workspace: Workspace,
    *,
    by_magnitude: bool = False,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """The k largest pre-activations of each row, or of largest magnitude, and their latents, in no order.

    Without gradient.
    """
    values, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    with torch.no_grad():
        for rows in _chunks(len(x), topk_chunk_rows(len(W_enc), is_cuda=on_cuda(x))):
            pre_acts = encoder_pre_acts(x[rows], W_enc, b_enc, workspace)
            if on_cuda(pre_acts):
                latents[rows] = _triton().topk_latents(pre_acts, k, by_magnitude=by_magnitude)
            else:
                values[rows], latents[rows] = _largest_of_rows(pre_acts.abs() if by_magnitude else pre_acts, k)
            if by_magnitude or on_cuda(pre_acts):
                torch.gather(pre_acts, 1, latents[rows], out=values[rows])
    return values, latents


def topk_chunk_rows(d_sae: int, *, is_cuda: bool) -> int:
    """How many rows are encoded and ranked at a time."""
    return max(1, (RANKED_AT_ONCE_ON_CUDA if is_cuda else RANKED_AT_ONCE) // d_sae)


def _chunks(n_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, n_rows, chunk_rows))


def _largest_of_rows(
    ranked: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """(values, latents) of the k largest of each row; NaN counts as the largest.

    They lie in the k groups of FOLD latents with the largest maxima, which are soon found: torch.topk takes a few
    nanoseconds for each number that it looks at.
    """
    batch, d_sae = ranked.shape
    n_groups = d_sae // FOLD
    if d_sae % FOLD or n_groups < 2 * k:
        values, latents = ranked.topk(k, sorted=False)
        return values, latents
    maxima = max_pool1d(ranked[:, None], FOLD)[:, 0]
    groups = maxima.topk(k, sorted=False).indices
    in_store = groups + torch.arange(batch, device=ranked.device)[:, None] * n_groups
    candidates = ranked.view(batch * n_groups, FOLD).index_select(0, in_store.flatten()).view(batch, k * FOLD)
    values, places = candidates.topk(k, sorted=False)
    return values, groups.gather(1, places // FOLD) * FOLD + places % FOLD


def batch_topk_entries(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
    """(row, latent) of the `k * batch` largest entries of the whole batch, in row-major order.

    On a CPU `functional.batch_topk_kept`, the positive ones alone. On CUDA those that are not positive are among them,
    for `functional.relu` to silence: how many there are nobody knows without a wait. Of equal entries it keeps any.
    """
    if not on_cuda(pre_acts):
        return activations.batch_topk_kept(pre_acts, k)
    batch, d_sae = pre_acts.shape
    # with groups of about sqrt(d_sae / k), groups and candidates are equally many; gcd: a power of two that divides
    fold = gcd(d_sae, 1 << (isqrt(d_sae // k).bit_length() - 1))
    places = _largest_places(pre_acts.view(-1, fold), k * batch).sort().values
    return places // d_sae, places % d_sae


def _largest_places(grouped: Float[Tensor, "group fold"], n: int) -> Int[Tensor, " {n}"]:
    """Where the n largest of all lie, counted through, in no order; NaN counts as the largest.

    They lie in the n groups with the largest maxima. torch.topk of one long row takes time with its square on CUDA: it
    looks at two short ones instead.
    """
    fold = grouped.shape[1]
    groups = grouped.amax(1).topk(n, sorted=False).indices
    chosen = grouped.index_select(0, groups).flatten().topk(n, sorted=False).indices
    return groups[chosen // fold] * fold + chosen % fold


def n_true(mask: Bool[Tensor, "*shape"]) -> int:
    """How many entries are True. On CUDA it waits for the device."""
    return int(mask.count_nonzero())


def true_entries(mask: Bool[Tensor, "batch d_sae"], n: int) -> tuple[Int[Tensor, " {n}"], Int[Tensor, " {n}"]]:
    """(row, latent) of the n entries that are True, in row-major order. n: of `n_true`, so that this need not wait."""
    if on_cuda(mask):
        found = torch.nonzero_static(mask, size=n)  # (n, 2)
        return found[:, 0].contiguous(), found[:, 1].contiguous()
    row, latent = mask.nonzero(as_tuple=True)
    return row, latent


def encoder_pre_acts(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    workspace: Workspace,
) -> Float[Tensor, "batch d_sae"]:
    """x W_enc^T + b_enc in the workspace, without gradient; valid until the workspace is used again."""
    with torch.no_grad():
        return torch.addmm(b_enc, x, W_enc.T, out=workspace.empty(len(x), len(W_enc), x))


def entry_pre_acts(
    kept: KeptEntries,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, " kept"]:
    """x W_enc^T + b_enc at the kept entries alone, without gradient: for those that were chosen in a shorter type."""
    with torch.no_grad():
        if on_cuda(x):
            dots = _triton().entry_dots(x, kept.row, W_enc, kept.latent, kept.by_latent)
        else:
            pattern = _csr_pattern(kept, x)
            dots = torch.sparse.sampled_addmm(pattern, x, W_enc.T, beta=0.0).values()
        return dots + b_enc.index_select(0, kept.latent)


def kept_pre_acts(
    values: Float[Tensor, " kept"],
    kept: KeptEntries,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, " kept"]:
    """`values`, the pre-activations of the kept entries as computed before, with their gradient to the encoder.

    x: what the encoder multiplied; no gradient goes to it. b_dec: given where x is the input less b_dec, which then
    gets -(grad b_enc) W_enc, the gradient that x would have passed on.
    """
    return _KeptPreActs.apply(values, kept, x, W_enc, b_enc, b_dec)


def dense_pre_acts(
    pre_acts: Float[Tensor, "batch d_sae"],
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, "batch d_sae"]:
    """All pre-activations, as computed before, with their gradient to the encoder; b_dec as in `kept_pre_acts`."""
    return _DensePreActs.apply(pre_acts, x, W_enc, b_enc, b_dec)


def sparse_decode(
    values: Float[Tensor, " kept"], kept: KeptEntries, W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Row b is the sum of values[j] * W_dec[latent[j]] over its kept entries j; gradients to values and W_dec.

    A detached W_dec costs no gradient.
    """
    if on_cuda(values):
        x_hat = _TritonDecode.apply(values, kept, W_dec.detach())
    else:
        x_hat = _sums_of_rows(values, kept.latent, kept.row_start, W_dec.detach())
    return _WithDecoderGradient.apply(x_hat, values.detach(), kept, W_dec)


def firing_counts(values: Float[Tensor, " kept"], kept: KeptEntries) -> Int[Tensor, " d_sae"]:
    """How many rows each latent is active (nonzero) in."""
    if on_cuda(values):  # bincount and a boolean mask would wait for the device
        before = torch.nn.functional.pad((values.detach() != 0)[kept.by_latent].cumsum(0), (1, 0))
        return before[kept.latent_start].diff()
    return torch.bincount(kept.latent[values.detach() != 0], minlength=kept.d_sae)


class _KeptPreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, kept: KeptEntries, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.kept, ctx.subtracts_b_dec = kept, b_dec is not None
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor | None]:
        x, W_enc = ctx.saved_tensors
        grad_W_enc = _sum_by_latent(grads[0], ctx.kept, x)
        if on_cuda(x):
            grad_b_enc = _sum_by_latent(grads[0], ctx.kept, x.new_ones(len(x), 1)).squeeze(1)
        else:
            grad_b_enc = torch.segment_reduce(
                grads[0][ctx.kept.by_latent], "sum", offsets=ctx.kept.latent_start, initial=0.0
            )
        return None, None, None, grad_W_enc, grad_b_enc, -(grad_b_enc @ W_enc) if ctx.subtracts_b_dec else None


class _DensePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.subtracts_b_dec = b_dec is not None
        return pre_acts.view_as(pre_acts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor | None]:
        x, W_enc = ctx.saved_tensors
        grad_b_enc = grads[0].sum(0)
        return None, None, grads[0].T @ x, grad_b_enc, -(grad_b_enc @ W_enc) if ctx.subtracts_b_dec else None


class _TritonDecode(torch.autograd.Function):
    """x_hat with its gradient to the values; none to W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: KeptEntries, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.kept = kept
        return _sums_of_rows(values, kept.latent, kept.row_start, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (W_dec,), kept = ctx.saved_tensors, ctx.kept
        return _triton().entry_dots(grads[0], kept.row, W_dec, kept.latent, kept.by_latent), None, None


class _WithDecoderGradient(torch.autograd.Function):
    """x_hat as it is; backward passes its gradient on and gives W_dec the sum by latent."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, values: Tensor, kept: KeptEntries, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        ctx.kept = kept
        return x_hat.view_as(x_hat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        (values,) = ctx.saved_tensors
        to_W_dec = _sum_by_latent(values, ctx.kept, grads[0].contiguous()) if ctx.needs_input_grad[3] else None
        return grads[0], None, None, to_W_dec


def _csr_pattern(kept: KeptEntries, like: Tensor) -> Tensor:
    with warnings.catch_warnings():  # that CSR tensors are in beta state
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            kept.row_start, kept.latent, like.new_zeros(len(kept.latent)), size=(len(like), kept.d_sae)
        )


def _sum_by_latent(
    values: Float[Tensor, " kept"], kept: KeptEntries, rows: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """Latent i is the sum of values[j] * rows[row[j]] over its kept entries j: a weight gradient."""
    return _sums_of_rows(values.index_select(0, kept.by_latent), kept.row_by_latent, kept.latent_start, rows)


def _sums_of_rows(
    values: Float[Tensor, " entry"],
    index: Int[Tensor, " entry"],
    start: Int[Tensor, " segment_plus_1"],
    rows: Float[Tensor, "row d_in"],
) -> Float[Tensor, "segment d_in"]:
    """Row i is the sum of values[j] * rows[index[j]] over start[i] <= j < start[i + 1]."""
    if on_cuda(rows):
        return _triton().segment_sums(values, index, start, rows)
    return embedding_bag(index, rows, start, mode="sum", per_sample_weights=values, include_last_offset=True)


def _starts(keys: Int[Tensor, " kept"], order: Int[Tensor, " kept"] | None, n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of 0 .. n-1 starts when the keys are sorted by `order` (None: they are), and the end."""
    if on_cuda(keys):  # bincount would wait for the device
        in_order = keys if order is None else keys[order]
        return torch.searchsorted(in_order, torch.arange(n + 1, dtype=keys.dtype, device=keys.device))
    counts = torch.bincount(keys, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def on_cuda(tensor: Tensor) -> bool:
    """Whether a tensor's values can only be looked at by waiting for what was asked of the device before."""
    return tensor.is_cuda


def _triton() -> Any:
    """`triton_kernels`, imported when first needed: a machine without CUDA need not have triton."""
    return importlib.import_module("trainer.kernels.triton_kernels")
