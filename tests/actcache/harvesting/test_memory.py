"""The memory that docs/explanation/memory.md promises of a harvest, measured."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.places import CHILD, SUPPORT


def measured(out: Path, codec: str, **environment: str) -> list[int]:
    """Peak over the forward pass, promised, forward pass: bytes, of a process of its own."""
    script = SUPPORT / "peak_memory_of_harvest.py"
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(1 << 16), codec],
        env={**CHILD, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_a_harvest_uses_no_more_than_the_promised_memory(tmp_path, codec):
    # from this size on the allocator gives every freed block back, so that what is resident is what is in use
    peak, promised, _ = measured(tmp_path / "c", codec, MALLOC_MMAP_THRESHOLD_="65536")
    assert peak < promised, f"{peak / 2**20:.0f} MiB, of {promised / 2**20:.0f} MiB"


def test_the_allocator_keeps_no_more_than_a_forward_pass_besides(tmp_path):
    peak, promised, forward = measured(tmp_path / "c", "lossless")
    assert peak < promised + forward, f"{peak / 2**20:.0f} MiB, of {(promised + forward) / 2**20:.0f} MiB"
