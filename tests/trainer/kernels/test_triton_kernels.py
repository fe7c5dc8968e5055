"""Runs `triton_cases.py`: in Triton's interpreter where triton is installed, on the GPU as `pytest -m gpu`."""

import importlib.util
import subprocess
import sys

import pytest
from support.places import CHILD, ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, interpreted: bool, **variables: str) -> None:
    environment = {**CHILD, "TRITON_INTERPRET": "1" if interpreted else "0", **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_kernels_in_the_interpreter():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/support/triton_cases.py", interpreted=True)


@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_without_a_gpu(tmp_path, capability):
    run("tests/support/compile_triton_kernels.py", capability, interpreted=False, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/support/triton_cases.py", interpreted=False)
