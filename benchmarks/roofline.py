"""What a TopK step on CUDA takes at least: its FLOPs and bytes, counted, at the rates that a GPU is measured to reach.

The roofline of a step is its FLOPs at the GEMM rate, plus its bytes at the copy rate. Written down before anything was
measured, with B, d, F, k for batch, d_in, d_sae, k, s for the bytes of an element in the encoder's product (4, or 2 as
bfloat16), and 4 bytes for everything else:

    FLOPs      2 B d F             the encoder's product; the rest is bound by memory
    weights    2 s F d, s F d      a bfloat16 copy of W_enc written and read, or W_enc read
    rows       s B d + 2 * 4 B d   x in the product, in the loss and in the encoder's gradient
    error      3 * 4 B d           x_hat - x written; read for the values' and for the decoder's gradient
    W_dec      2 * 4 R d           its rows in the decoder and in the values' gradient. R = B k where each entry fetches
                                   its own row; R = min(B k, F) where no row is fetched twice: the strict roofline
    gradients  2 * 4 P             of all P = 2 F d + F + d parameters, written and read
    Adam       6 * 4 P             weights and both moments, read and written
    entries    4 * 12 B k          value and latent of each entry, written once and read three times

Pre-activations are left out: an encoder that ranks what it has just computed need not store them. AuxK has nothing to
revive here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.measure import interleaved_seconds

REPEATS = 7
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the encoder's product


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained: rows of width d_in, d_sae latents of which k are active in each of `batch` rows."""

    d_in: int
    d_sae: int = 65_536
    k: int = 64
    batch: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this GPU reaches: FLOP/s of a square product by precision, bytes/s of a copy (read and written)."""

    gemm: Mapping[str, float]
    copy: float


def step_flops(shape: Shape) -> int:
    """2 B d F: the encoder's product."""
    return 2 * shape.batch * shape.d_in * shape.d_sae


def step_bytes(shape: Shape, precision: str, *, strict: bool) -> dict[str, int]:
    """Bytes of a step by what they are, as the module's docstring derives them; strict: no row of W_dec twice."""
    n_rows, n_weights, n_entries = shape.batch * shape.d_in, shape.d_sae * shape.d_in, shape.batch * shape.k
    itemsize = PRECISIONS[precision].itemsize
    fetched = min(n_entries, shape.d_sae) if strict else n_entries
    n_parameters = 2 * n_weights + shape.d_sae + shape.d_in
    return {
        "weights": itemsize * n_weights * (2 if precision == "bfloat16" else 1),
        "rows": (itemsize + 2 * 4) * n_rows,
        "error": 3 * 4 * n_rows,
        "W_dec": 2 * 4 * fetched * shape.d_in,
        "gradients": 2 * 4 * n_parameters,
        "adam": 6 * 4 * n_parameters,
        "entries": 4 * 12 * n_entries,
    }


def kernel_bytes(shape: Shape, n_ranked: int) -> dict[str, int]:
    """What each kernel of a float32 step reads and writes at least: every row once, indices as int64.

    n_ranked: rows that top-k ranks. "weight gradient" is one of the two.
    """
    n_entries, n_rows, n_weights = shape.batch * shape.k, 4 * shape.batch * shape.d_in, 4 * shape.d_sae * shape.d_in
    fetched = 4 * min(n_entries, shape.d_sae) * shape.d_in
    return {
        "top-k": n_ranked * (4 * shape.d_sae + 8 * shape.k),
        "decode": 12 * n_entries + fetched + n_rows,
        "values' gradient": 28 * n_entries + fetched + n_rows,
        "weight gradient": 12 * n_entries + n_rows + n_weights,
        "adam": 7 * 2 * n_weights,
    }


def roofline_seconds(shape: Shape, precision: str, rates: Rates, *, strict: bool) -> float:
    """FLOPs at the GEMM rate plus bytes at the copy rate."""
    n_bytes = sum(step_bytes(shape, precision, strict=strict).values())
    return step_flops(shape) / rates.gemm[precision] + n_bytes / rates.copy


def measured_rates(device: str, n_copied: int, gemm_size: int) -> Rates:
    """Medians of a copy of n_copied bytes, and of square products."""
    source = torch.empty(n_copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = {"copy": repeated(lambda: target.copy_(source), 1, device)}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(gemm_size, gemm_size, device=device, dtype=dtype) for _ in range(2))
        run[name] = repeated(lambda a=a, b=b: a @ b, 1, device)
    seconds = {name: statistics.median(s) for name, s in interleaved_seconds(run, REPEATS).items()}
    gemm = {name: 2 * gemm_size**3 / seconds[name] for name in PRECISIONS}
    return Rates(gemm=gemm, copy=2 * n_copied / seconds["copy"])


def repeated(call: Callable[[], object], n: int, device: str) -> Callable[[], None]:
    """n calls, and the wait until the device is done."""

    def calls() -> None:
        for _ in range(n):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return calls
