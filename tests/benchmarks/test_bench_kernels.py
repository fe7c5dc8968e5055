import dataclasses

import pytest

from benchmarks.bench_kernels import check, kernels, random_operands

SIZES = [(96, 24, 56, 5), (1, 8, 16, 1), (33, 7, 12, 12)]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_kernel_passes_its_check(sizes):
    for name, kernel in kernels(random_operands(*sizes)).items():
        check(name, kernel)


def test_a_wrong_answer_is_noticed():
    for name, kernel in kernels(random_operands(*SIZES[0])).items():
        with pytest.raises(AssertionError, match=name):
            check(name, dataclasses.replace(kernel, exact=kernel.exact * (1 + 1e-4)))
