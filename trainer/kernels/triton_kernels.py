"""The kernels of the sparse path for CUDA, in Triton: top-k, weighted sums of rows, and dot products of rows.

Of `trainer.kernels` alone, for tensors on the device; importing this module imports triton, which torch brings along
where it is built for CUDA. Sums are of float32 products in float32, in an order that shapes and segment bounds fix,
without atomics: equal inputs give equal bits on one kind of device. Offsets into matrices are int64. Nothing waits for
the device. `no_type_check` keeps jaxtyping's import hook from wrapping a kernel: Triton compiles what it finds there.

The block sizes below are reasoned, not timed. COLUMNS is small so that the programs that run side by side, which share
a block of columns, gather from a part of the matrix that fits into the level-2 cache.
"""

from math import isqrt
from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]: no dependency on a machine without CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

ENTRIES, COLUMNS = 16, 128  # entries gathered at a time, and how much of their rows
CHUNK = 256  # entries that one program sums; longer segments are summed chunk by chunk, and then over the chunks
PLACES = 4096  # places of a row that are ranked at a time


def segment_sums(
    values: Float[Tensor, " entry"],
    index: Int64[Tensor, " entry"],
    start: Int64[Tensor, " segment_plus_1"],
    rows: Float[Tensor, "row d_in"],
) -> Float32[Tensor, "segment d_in"]:
    """Row i is the sum of values[j] * rows[index[j]] over start[i] <= j < start[i + 1]; 0 where there are none.

    values and rows: float32 or bfloat16 (ValueError for others). Segments may be as uneven as they like.
    """
    _check_dtypes("segment_sums", values, rows)
    values, rows, d_in = values.contiguous(), rows.contiguous(), rows.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(d_in))
    n_blocks = triton.cdiv(d_in, columns)
    sizes = {"CHUNK": CHUNK, "ENTRIES": ENTRIES, "COLUMNS": columns}
    out = torch.empty(len(start) - 1, d_in, device=rows.device)
    parts = out  # never read where no segment can be long
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
    """x[row[j]] . W[latent[j]] of each entry j, taken in `order`: by latent, each row of W comes from memory once.

    x and W: float32 or bfloat16 (ValueError for others).
    """
    _check_dtypes("entry_dots", x, W)
    x, W, d_in = x.contiguous(), W.contiguous(), x.shape[1]
    dots = torch.empty(len(row), device=x.device)
    columns = min(COLUMNS, triton.next_power_of_2(d_in))
    grid = (triton.cdiv(len(row), ENTRIES),)
    _launch(_dot_entries, grid, x, row, W, latent, order, dots, len(row), d_in, ENTRIES=ENTRIES, COLUMNS=columns)
    return dots


def topk_latents(pre_acts: Float[Tensor, "batch d_sae"], k: int, *, by_magnitude: bool) -> Int64[Tensor, "batch {k}"]:
    """The latents of the k largest entries of each row, or of largest magnitude, ascending; of equal ones the first.

    pre_acts: float32 or bfloat16; NaN counts as the largest, -0 as 0. Raises ValueError for another dtype, or unless
    1 <= k <= d_sae.

    Each row is cut into groups. The k best entries lie in the k groups whose best entries are best (of equal ones the
    first), for an entry of another group comes behind k of those. So one pass finds the groups' maxima, and two small
    selections follow: k of the groups, and k of the entries in these.
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
    """A power of two near sqrt(d_sae / k), where maxima and candidates are equally many; 1 if grouping saves little."""
    size = 1 << (isqrt(d_sae // k).bit_length() - 1)
    return size if size >= 4 else 1


def _group_maxima(
    pre_acts: Float[Tensor, "batch d_sae"], group: int, by_magnitude: bool
) -> Int32[Tensor, "batch n_groups"]:
    """The order key of the best of each `group` neighbours."""
    batch, d_sae = pre_acts.shape
    n_groups, groups = triton.cdiv(d_sae, group), PLACES // group
    maxima = torch.empty(batch, n_groups, dtype=torch.int32, device=pre_acts.device)
    sizes = {"BY_MAGNITUDE": by_magnitude, "GROUP": group, "GROUPS": groups}
    _launch(_rank_groups, (batch, triton.cdiv(n_groups, groups)), pre_acts, maxima, d_sae, n_groups, **sizes)
    return maxima


def _selected(
    ranked: Tensor, groups: Int64[Tensor, "batch k"] | None, k: int, group: int, by_magnitude: bool
) -> Int64[Tensor, "batch {k}"]:
    """The columns of the k best of each row, ascending: among all columns, or among those of some groups."""
    batch, n_columns = ranked.shape
    n_places = n_columns if groups is None else groups.shape[1] * group
    selected = torch.empty(batch, k, dtype=torch.int64, device=ranked.device)
    sizes = {"BY_MAGNITUDE": by_magnitude, "GROUP": group, "PLACES": min(PLACES, triton.next_power_of_2(n_places))}
    _launch(_select, (batch,), ranked, groups, selected, n_columns, n_places, k, **sizes)
    return selected


def _segments_at_chunk_ends(start: Int64[Tensor, " segment_plus_1"], n_entries: int) -> Int64[Tensor, "chunk 2"]:
    """The segment of the first entry of each chunk, and of its last."""
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
    """One segment, one block of columns: of its entries, or of its parts where it is long."""
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
    """What a chunk holds of the long segment at its first entry (part 0), and of another one at its last (part 1).

    A segment longer than a chunk holds the first or the last entry of every chunk that it meets.
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
    """The parts of a long segment: part 1 of the chunk in which it begins, unless with it, and part 0 of the others."""
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
    """ENTRIES neighbours of the order."""
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = place < n_entries
    entry = tl.load(order + place, mask=exists, other=0)
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
    n_places,
    k,
    BY_MAGNITUDE: tl.constexpr,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One row: the k-th largest key bit by bit from the top, then all above it and the first of those that equal it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * n_columns
    selected += row * k
    if groups is not None:
        groups += row * k
    _, first = _candidates(x, groups, 0, n_columns, n_places, BY_MAGNITUDE, GROUP, PLACES)  # stays in registers
    kth = tl.full((), -(2**31), tl.int32)
    for i in range(32):
        higher = kth ^ (tl.full((), 1, tl.int32) << (31 - i))
        n_reached = tl.sum((first >= higher).to(tl.int32), 0)
        for at in range(PLACES, n_places, PLACES):
            _, key = _candidates(x, groups, at, n_columns, n_places, BY_MAGNITUDE, GROUP, PLACES)
            n_reached += tl.sum((key >= higher).to(tl.int32), 0)
        kth = tl.where(n_reached >= k, higher, kth)
    n_above = tl.sum((first > kth).to(tl.int32), 0)
    for at in range(PLACES, n_places, PLACES):
        _, key = _candidates(x, groups, at, n_columns, n_places, BY_MAGNITUDE, GROUP, PLACES)
        n_above += tl.sum((key > kth).to(tl.int32), 0)
    n_equal, n_written = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for at in range(0, n_places, PLACES):
        column, key = _candidates(x, groups, at, n_columns, n_places, BY_MAGNITUDE, GROUP, PLACES)
        is_equal = (key == kth).to(tl.int32)
        is_early = n_equal + tl.cumsum(is_equal, 0) <= k - n_above
        is_selected = ((key > kth) | ((key == kth) & is_early)).to(tl.int32)
        place = n_written + tl.cumsum(is_selected, 0) - 1
        tl.store(selected + place, column.to(tl.int64), mask=is_selected != 0)
        n_equal += tl.sum(is_equal, 0)
        n_written += tl.sum(is_selected, 0)


@triton.jit
@no_type_check
def _candidates(
    x,
    groups,
    at,
    n_columns,
    n_places,
    BY_MAGNITUDE: tl.constexpr,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,
):
    """(column, key) of PLACES neighbouring places: columns themselves, or members of the listed groups."""
    place = at + tl.arange(0, PLACES)
    exists = place < n_places
    if groups is not None:
        column = tl.load(groups + place // GROUP, mask=exists, other=0) * GROUP + place % GROUP
    else:
        column = place
    return column, _order_keys(x, column, exists & (column < n_columns), BY_MAGNITUDE)


@triton.jit
@no_type_check
def _order_keys(x, column, exists, BY_MAGNITUDE: tl.constexpr):
    """int32 in the order of x: NaN largest, -0 equal to 0, what does not exist below all. Keys stay as they are."""
    loaded = tl.load(x + column, mask=exists, other=0)
    if x.dtype.element_ty == tl.int32:
        key = loaded
    else:
        value = loaded.to(tl.float32)
        if BY_MAGNITUDE:
            value = tl.abs(value)
        bits = value.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the more negative, the larger the bits: turned round
        key = tl.where(bits == -(2**31), 0, key)
        key = tl.where(value != value, 0x7FFFFFFF, key)
    return tl.where(exists, key, -(2**31))
