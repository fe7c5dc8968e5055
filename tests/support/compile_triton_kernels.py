"""Compile every Triton kernel, as the trainer calls it, down to the machine code of a GPU: needs none.

    python compile_triton_kernels.py 90        compute capability 9.0

Triton's own launcher compiles them, and stops where it would run them. So each kernel is specialised for its arguments
as at run time: 1 and None are compiled in, and numbers and addresses that are divisible by 16 are known to be. Both
kinds occur: a d_in or k may be odd, and so may be the row at which a slice of a matrix begins.

Prints one line a kernel, with the types of its arguments; d marks those known to be divisible. What runs in the
interpreter may still be refused by the compiler, by ptxas in particular.
"""

import sys
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from trainer.kernels import triton_kernels


def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    """A stand-in for `_launch`."""
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **sizes)
    types, hints = compiled.src.signature.values(), compiled.src.attrs
    known = [f"{kind}{' d' * bool(hints.get((place,)))}" for place, kind in enumerate(types)]
    print(kernel.__name__, known, list(compiled.src.constants.values()), len(compiled.asm["cubin"]), "bytes")


def zeros(*shape: int, dtype: torch.dtype = torch.float32, is_aligned: bool) -> Tensor:
    """A tensor whose first element is at an address divisible by 16, or is the one behind it."""
    first = 0 if is_aligned else 1
    tensor = torch.zeros(first + prod(shape), dtype=dtype)[first:].view(shape)
    assert (tensor.data_ptr() % 16 == 0) == is_aligned
    return tensor


def compile_sums(d_in: int, n_entries: int, *, is_aligned: bool) -> None:
    index, start = (zeros(n, dtype=torch.int64, is_aligned=is_aligned) for n in (n_entries, 3))
    for dtype in (torch.float32, torch.bfloat16):
        rows = zeros(5, d_in, dtype=dtype, is_aligned=is_aligned)
        triton_kernels.segment_sums(zeros(n_entries, is_aligned=is_aligned), index, start, rows)
        triton_kernels.entry_dots(zeros(5, d_in, is_aligned=is_aligned), index, rows, index, index)


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    current = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    triton.runtime.driver.set_active(SimpleNamespace(**current))
    triton_kernels._launch = compile_instead
    for is_aligned, n_entries in ((True, 608), (False, 601)):
        for d_in in (1, 2304, 2305):
            compile_sums(d_in, n_entries, is_aligned=is_aligned)
        for d_sae, k in ((1, 1), (5000, 5000), (8192, 8192), (65536, 64), (65536, 50), (65537, 64)):
            for dtype in (torch.float32, torch.bfloat16):
                pre_acts = zeros(1, d_sae, dtype=dtype, is_aligned=is_aligned)
                triton_kernels.topk_latents(pre_acts, k, by_magnitude=dtype == torch.bfloat16)


if __name__ == "__main__":
    main(int(sys.argv[1]))
