"""The kernels of the sparse path for CUDA, in Triton: top-k, weighted sums of rows, and dot products of rows.

Only `trainer.kernels` calls them, with tensors on the device. Importing this module imports triton, which comes with
the builds of torch for CUDA. Products and sums are float32. Shapes and segment bounds fix the order of each sum, and
no atomics are used, so equal inputs give equal bits on one kind of device. Offsets into matrices are int64. No function
waits for the device. `no_type_check` keeps jaxtyping's import hook from wrapping a kernel, which Triton could then not
compile.

The block sizes below are reasoned, not timed. The programs that run side by side share a block of columns. COLUMNS is
small so that the part of the matrix from which they gather fits into the level-2 cache.
"""

from math import isqrt
from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]: a machine without CUDA need not have it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

ENTRIES, COLUMNS = 16, 128  # entries gathered at a time, and columns of their rows
CHUNK = 256  # entries that one program sums; a longer segment is summed chunk by chunk, then over its chunks
CANDIDATES = 4096  # columns of a row that are ranked at a time


def segment_sums(
    values: Float[Tensor, " entry"],
    index: Int64[Tensor, " entry"],
    start: Int64[Tensor, " segment_plus_1"],
    rows: Float[Tensor, "row d_in"],
) -> Float32[Tensor, "segment d_in"]:
    """Row i of the result is the sum of values[j] * rows[index[j]] over start[i] <= j < start[i + 1].

    Segments may be of any lengths; the sum of an empty one is 0.

    Args:
        values: a factor for each entry, float32 or bfloat16.
        index: the row that each entry gathers.
        start: where each segment starts among the entries, and where the last one ends.
        rows: the rows to gather, float32 or bfloat16.

    Raises:
        ValueError: `values` or `rows` have another dtype.
    """
    _check_dtypes("segment_sums", values, rows)
    values, rows, d_in = values.contiguous(), rows.contiguous(), rows.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(d_in))
    n_blocks = triton.cdiv(d_in, columns)
    sizes = {"CHUNK": CHUNK, "ENTRIES": ENTRIES, "COLUMNS": columns}
    out = torch.empty(len(start) - 1, d_in, device=rows.device)
    parts = out  # never read where no segment can be longer than a chunk
    if len(index) > CHUNK:
        segment = _segments_at_chunk_ends(start, len(index))
        parts = torch.empty(*segment.shape, d_in, device=rows.device)
        grid = (segment.numel(), n_blocks)
        _launch(_sum_parts, grid, values, index, start, segment, rows, parts, d_in, **sizes)
    _launch(_sum_segments, (len(out), n_blocks), values, index, start, rows, parts, out, d_in, **sizes)
    return out


def entry_dots(
    x: Float[Tensor, "batch d_in"],
    row: Int64[Tensor, " entry"],
    W: Float[Tensor, "d_sae d_in"],
    latent: Int64[Tensor, " entry"],
    order: Int64[Tensor, " entry"],
) -> Float32[Tensor, " entry"]:
    """The dot product x[row[j]] . W[latent[j]] of each entry j.

    Args:
        x: the rows of the batch, float32 or bfloat16.
        row: the row of each entry.
        W: a row for each latent, float32 or bfloat16.
        latent: the latent of each entry.
        order: the order in which the entries are computed. Sorted by latent, each row of W is read from memory once.

    Raises:
        ValueError: x or W have another dtype.
    """
    _check_dtypes("entry_dots", x, W)
    x, W, d_in = x.contiguous(), W.contiguous(), x.shape[1]
    dots = torch.empty(len(row), device=x.device)
    columns = min(COLUMNS, triton.next_power_of_2(d_in))
    grid = (triton.cdiv(len(row), ENTRIES),)
    _launch(_dot_entries, grid, x, row, W, latent, order, dots, len(row), d_in, ENTRIES=ENTRIES, COLUMNS=columns)
    return dots


def topk_latents(pre_acts: Float[Tensor, "batch d_sae"], k: int, *, by_magnitude: bool) -> Int64[Tensor, "batch {k}"]:
    """The latents of the k largest entries of each row, or of those of largest magnitude, in ascending order.

    Of equal entries the first are chosen. NaN counts as the largest, and -0 as 0.

    Each row is cut into groups. The k largest entries lie in the k groups whose maxima are largest, because k entries
    come before any entry of another group. So one pass finds the maxima of the groups. Two small selections follow: k
    of the groups, and then k of the entries in these groups.

    Args:
        pre_acts: float32 or bfloat16.
        k: how many latents of each row are chosen.
        by_magnitude: rank |h| instead of h.

    Raises:
        ValueError: pre_acts has another dtype, or k is outside [1, d_sae].
    """
    _check_dtypes("topk_latents", pre_acts)
    d_sae = pre_acts.shape[1]
    if not 1 <= k <= d_sae:
        raise ValueError(f"topk_latents: k must be in [1, d_sae={d_sae}], got k={k}; pick a smaller k or a wider SAE")
    pre_acts, group = pre_acts.contiguous(), _group_size(d_sae, k)
    if group == 1:
        return _selected(pre_acts, None, k, group, by_magnitude)
    best_groups = _selected(_group_maxima(pre_acts, group, by_magnitude), None, k, 1, by_magnitude)
    return _selected(pre_acts, best_groups, k, group, by_magnitude)


def _group_size(d_sae: int, k: int) -> int:
    """A power of two near sqrt(d_sae / k), which makes maxima and candidates equally many; 1 if groups save little."""
    size = 1 << (isqrt(d_sae // k).bit_length() - 1)
    return size if size >= 4 else 1


def _group_maxima(
    pre_acts: Float[Tensor, "batch d_sae"], group: int, by_magnitude: bool
) -> Int32[Tensor, "batch n_groups"]:
    """The largest order key in each group of `group` neighbouring entries."""
    batch, d_sae = pre_acts.shape
    n_groups, groups = triton.cdiv(d_sae, group), CANDIDATES // group
    maxima = torch.empty(batch, n_groups, dtype=torch.int32, device=pre_acts.device)
    sizes = {"BY_MAGNITUDE": by_magnitude, "GROUP": group, "GROUPS": groups}
    _launch(_rank_groups, (batch, triton.cdiv(n_groups, groups)), pre_acts, maxima, d_sae, n_groups, **sizes)
    return maxima


def _selected(
    ranked: Tensor, groups: Int64[Tensor, "batch k"] | None, k: int, group: int, by_magnitude: bool
) -> Int64[Tensor, "batch {k}"]:
    """The columns of the k largest entries of each row, ascending.

    groups: the groups of each row whose columns are ranked; None to rank all columns.
    """
    batch, n_columns = ranked.shape
    n_candidates = n_columns if groups is None else groups.shape[1] * group
    selected = torch.empty(batch, k, dtype=torch.int64, device=ranked.device)
    sizes = {
        "BY_MAGNITUDE": by_magnitude,
        "GROUP": group,
        "CANDIDATES": min(CANDIDATES, triton.next_power_of_2(n_candidates)),
    }
    _launch(_select, (batch,), ranked, groups, selected, n_columns, n_candidates, k, **sizes)
    return selected


def _segments_at_chunk_ends(start: Int64[Tensor, " segment_plus_1"], n_entries: int) -> Int64[Tensor, "chunk 2"]:
    """The segments to which the first and the last entry of each chunk belong."""
    first = torch.arange(0, n_entries, CHUNK, device=start.device)
    ends = torch.stack([first, (first + CHUNK - 1).clamp_max(n_entries - 1)], dim=1)
    return torch.searchsorted(start, ends, right=True) - 1


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **sizes: Any) -> None:
    """Run a kernel on the device that holds its first argument."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **sizes)


def _check_dtypes(who: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{who}: takes float32 or bfloat16, got {tensor.dtype}; convert it, or run it on the CPU")


@triton.jit
@no_type_check
def _sum_segments(
    values, index, start, rows, parts, out, d_in, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum one segment in one block of columns: its entries, or its parts where it is longer than a chunk."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = tl.load(start + segment), tl.load(start + segment + 1)
    if last - first <= CHUNK:
        total = _sum_of_entries(values, index, rows, first, last, columns, d_in, ENTRIES, COLUMNS)
    else:
        total = _sum_of_parts(parts, first, last, columns, d_in, CHUNK, ENTRIES, COLUMNS)
    tl.store(out + segment * d_in + columns, total, mask=columns < d_in)


@triton.jit
@no_type_check
def _sum_parts(
    values,
    index,
    start,
    segment_at,
    rows,
    parts,
    d_in,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the entries of one chunk that belong to a segment longer than a chunk.

    Part 0 is of the segment at the chunk's first entry. Part 1 is of the segment at its last entry, if that is another
    one. A segment longer than a chunk covers the first or the last entry of every chunk that it meets.
    """
    part = tl.program_id(0).to(tl.int64)
    chunk_first = part // 2 * CHUNK
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    segment = tl.load(segment_at + part)
    first, last = tl.load(start + segment), tl.load(start + segment + 1)
    is_another = first > chunk_first
    if (last - first > CHUNK) & ((part % 2 == 0) | is_another):
        from_entry = tl.maximum(first, chunk_first)
        to_entry = tl.minimum(last, chunk_first + CHUNK)
        total = _sum_of_entries(values, index, rows, from_entry, to_entry, columns, d_in, ENTRIES, COLUMNS)
        tl.store(parts + part * d_in + columns, total, mask=columns < d_in)


@triton.jit
@no_type_check
def _sum_of_entries(values, index, rows, first, last, columns, d_in, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """values[j] * rows[index[j]] over first <= j < last: ENTRIES running sums, then their sum."""
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for at in range(first, last, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        exists = entry < last
        row = tl.load(index + entry, mask=exists, other=0)
        value = tl.load(values + entry, mask=exists, other=0.0).to(tl.float32)
        is_inside = exists[:, None] & (columns < d_in)[None, :]
        x = tl.load(rows + row[:, None] * d_in + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)
        total += value[:, None] * x
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _sum_of_parts(parts, first, last, columns, d_in, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the parts of a long segment: one part of each chunk that it meets.

    That is part 1 of the chunk in which the segment begins, if it begins after the chunk's first entry. It is part 0 of
    every other chunk.
    """
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    end = (last - 1) // CHUNK + 1
    for at in range(first // CHUNK, end, ENTRIES):
        chunk = at + tl.arange(0, ENTRIES)
        part = 2 * chunk + (first > chunk * CHUNK).to(tl.int64)
        is_inside = (chunk < end)[:, None] & (columns < d_in)[None, :]
        total += tl.load(parts + part[:, None] * d_in + columns[None, :], mask=is_inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _dot_entries(x, row, W, latent, order, dots, n_entries, d_in, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """The dot products of ENTRIES entries that are neighbours in `order`."""
    rank = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = rank < n_entries
    entry = tl.load(order + rank, mask=exists, other=0)
    x_at = tl.load(row + entry, mask=exists, other=0)[:, None] * d_in
    W_at = tl.load(latent + entry, mask=exists, other=0)[:, None] * d_in
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for at in range(0, d_in, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)[None, :]
        is_inside = exists[:, None] & (columns < d_in)
        x_part = tl.load(x + x_at + columns, mask=is_inside, other=0.0).to(tl.float32)
        total += x_part * tl.load(W + W_at + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(dots + entry, tl.sum(total, 1), mask=exists)


@triton.jit
@no_type_check
def _rank_groups(x, maxima, n_columns, n_groups, BY_MAGNITUDE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The maxima of GROUPS neighbouring groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    key = _order_keys(x + row * n_columns, column, column < n_columns, BY_MAGNITUDE)
    tl.store(maxima + row * n_groups + group, tl.max(key, 1), mask=group < n_groups)


@triton.jit
@no_type_check
def _select(
    x,
    groups,
    selected,
    n_columns,
    n_candidates,
    k,
    BY_MAGNITUDE: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Select the k largest keys of one row.

    The k-th largest key is found bit by bit, from the highest bit down. All larger keys are selected, and of those that
    equal it the first.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * n_columns
    selected += row * k
    if groups is not None:
        groups += row * k
    _, first = _candidates(x, groups, 0, n_columns, n_candidates, BY_MAGNITUDE, GROUP, CANDIDATES)  # stays in registers
    kth = tl.full((), -(2**31), tl.int32)
    for i in range(32):
        higher = kth ^ (tl.full((), 1, tl.int32) << (31 - i))
        n_reached = tl.sum((first >= higher).to(tl.int32), 0)
        for at in range(CANDIDATES, n_candidates, CANDIDATES):
            _, key = _candidates(x, groups, at, n_columns, n_candidates, BY_MAGNITUDE, GROUP, CANDIDATES)
            n_reached += tl.sum((key >= higher).to(tl.int32), 0)
        kth = tl.where(n_reached >= k, higher, kth)
    n_above = tl.sum((first > kth).to(tl.int32), 0)
    for at in range(CANDIDATES, n_candidates, CANDIDATES):
        _, key = _candidates(x, groups, at, n_columns, n_candidates, BY_MAGNITUDE, GROUP, CANDIDATES)
        n_above += tl.sum((key > kth).to(tl.int32), 0)
    n_equal, n_written = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for at in range(0, n_candidates, CANDIDATES):
        column, key = _candidates(x, groups, at, n_columns, n_candidates, BY_MAGNITUDE, GROUP, CANDIDATES)
        is_equal = (key == kth).to(tl.int32)
        is_early = n_equal + tl.cumsum(is_equal, 0) <= k - n_above
        is_selected = ((key > kth) | ((key == kth) & is_early)).to(tl.int32)
        written_to = n_written + tl.cumsum(is_selected, 0) - 1
        tl.store(selected + written_to, column.to(tl.int64), mask=is_selected != 0)
        n_equal += tl.sum(is_equal, 0)
        n_written += tl.sum(is_selected, 0)


@triton.jit
@no_type_check
def _candidates(
    x,
    groups,
    at,
    n_columns,
    n_candidates,
    BY_MAGNITUDE: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """(column, key) of CANDIDATES neighbouring candidates: of all columns, or of the columns in `groups`."""
    candidate = at + tl.arange(0, CANDIDATES)
    exists = candidate < n_candidates
    if groups is not None:
        column = tl.load(groups + candidate // GROUP, mask=exists, other=0) * GROUP + candidate % GROUP
    else:
        column = candidate
    return column, _order_keys(x, column, exists & (column < n_columns), BY_MAGNITUDE)


@triton.jit
@no_type_check
def _order_keys(x, column, exists, BY_MAGNITUDE: tl.constexpr):
    """int32 keys in the order of x: NaN is largest, -0 equals 0, and what does not exist is below all.

    If x holds such keys already, they are returned unchanged.
    """
    loaded = tl.load(x + column, mask=exists, other=0)
    if x.dtype.element_ty == tl.int32:
        key = loaded
    else:
        value = loaded.to(tl.float32)
        if BY_MAGNITUDE:
            value = tl.abs(value)
        bits = value.to(tl.int32, bitcast=True)
        key = bits ^ (
            (bits >> 31) & 0x7FFFFFFF
        )  # the more negative a float, the larger its bits: their order is reversed
        key = tl.where(bits == -(2**31), 0, key)
        key = tl.where(value != value, 0x7FFFFFFF, key)
    return tl.where(exists, key, -(2**31))
