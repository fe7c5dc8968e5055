"""The memory that docs/explanation/memory.md promises of a harvest, measured."""

import subprocess
import sys
from pathlib import Path

from support.places import CHILD, SUPPORT


def measured(out: Path, *codecs: str, **environment: str) -> dict[str, tuple[int, ...]]:
    """Peak over the forward pass, promised, forward pass: bytes, for each codec, all in one process of its own."""
    script = SUPPORT / "peak_memory_of_harvest.py"
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(1 << 15), *codecs],
        env={**CHILD, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [tuple(int(word) for word in line.split()) for line in done.stdout.splitlines()]
    return dict(zip(codecs, lines, strict=True))


def test_a_harvest_uses_no_more_than_the_promised_memory(tmp_path):
    # from this size on the allocator gives every freed block back, so that what is resident is what is in use
    of_codecs = measured(tmp_path, "lossless", "int8", MALLOC_MMAP_THRESHOLD_="65536")
    for codec, (peak, promised, _) in of_codecs.items():
        assert peak < promised, f"{codec}: {peak / 2**20:.0f} MiB, of {promised / 2**20:.0f} MiB"


def test_the_allocator_keeps_no_more_than_a_forward_pass_besides(tmp_path):
    peak, promised, forward = measured(tmp_path, "lossless")["lossless"]
    assert peak < promised + forward, f"{peak / 2**20:.0f} MiB, of {(promised + forward) / 2**20:.0f} MiB"
