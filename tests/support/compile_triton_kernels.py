"""Compile every Triton kernel, as the trainer calls it, down to the machine code of a GPU: needs none.

    python compile_triton_kernels.py 90        compute capability 9.0

Prints one line a kernel. What runs in the interpreter may still be refused by the compiler, by ptxas in particular.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.kernels import triton_kernels

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def kind_of(argument: object) -> str:
    """As Triton's launcher sees it: 1 and None are compiled in."""
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "constexpr" if argument is None or argument == 1 else "i32"


def compiler(target: GPUTarget) -> Any:
    """A stand-in for `_launch` that compiles what it would run."""

    def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        signature = {name: kind_of(value) for name, value in given.items()} | dict.fromkeys(sizes, "constexpr")
        constants = {name: value for name, value in given.items() if signature[name] == "constexpr"} | sizes
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
        compiled = triton.compile(source, target=target)
        print(kernel.__name__, list(signature.values()), constants, len(compiled.asm["cubin"]), "bytes")

    return compile_instead


def main(capability: int) -> None:
    triton_kernels._launch = compiler(GPUTarget("cuda", capability, 32))
    values, index, start = torch.ones(600), torch.zeros(600, dtype=torch.int64), torch.tensor([0, 1, 600])
    for d_in in (1, 2304):
        for dtype in (torch.float32, torch.bfloat16):
            rows = torch.ones(5, d_in, dtype=dtype)
            triton_kernels.segment_sums(values, index, start, rows)
            triton_kernels.entry_dots(rows.float(), index, rows, index, index)
    for d_sae, k in ((1, 1), (5000, 5000), (65536, 64)):
        triton_kernels.topk_latents(torch.ones(1, d_sae), k, by_magnitude=False)
    triton_kernels.topk_latents(torch.ones(1, 65536, dtype=torch.bfloat16), 64, by_magnitude=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
