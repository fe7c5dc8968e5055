"""What golden files are and how they are compared: for test_golden.py, and for write_golden.py, which wrote them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import tarfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache import Loader, open_cache

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = GOLDEN / "expected.json"
MODEL = "bundled_model"  # the folder's name is part of a cache's identity
INPUTS = ("texts.jsonl", "sweep.yaml")
SPLITS = ("train", "validation")
TOKEN_FIELDS = ("id", "document", "sequence", "position")
# Bits hang on the number of threads, and MKL picks its kernels by the processor unless it is told not to.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping")  # in /proc/cpuinfo
COMPUTED = re.compile(r"acts\.zarr/\w+/blocks[^/]+/\w+/c/.*|stats/.*|manifest/partials/.*")
SEALED = re.compile(r"manifest/\S+\.jsonl?")


def run_command(folder: Path, arguments: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of an `actcache` command typed in `folder`; for a process of its own."""
    import cli

    os.chdir(folder)
    sys.argv = ["actcache", *arguments]
    code, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()


def unpack(name: str, folder: Path) -> Path:
    """A golden folder, below `folder`."""
    with tarfile.open(GOLDEN / f"{name}.tar.gz") as archive:
        # an attribute, for the argument of that name came in Python 3.11.4
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder / name


def this_platform() -> dict[str, str]:
    """What decides the last bits of what is computed under ENVIRONMENT."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: said[name] for name in PROCESSOR if name in said} | {
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def files(root: Path) -> dict[str, str]:
    """Path -> sha256 of every file of a cache but those in log/, which tell when and where it was made."""
    return {path: hashlib.sha256(data).hexdigest() for path, data in _contents(root).items()}


def skeletons(root: Path) -> dict[str, str]:
    """Path -> sha256, as `files`, of all that is the same whatever the processor: order, tokens, metadata, records.

    A file of computed numbers counts by its name alone. Of manifest files their checksums and sizes are left out. What
    growth has kept of the smaller cache, which older versions did not, is left out too.
    """
    contents = {path: data for path, data in _contents(root).items() if not path.startswith("kept/")}
    return {path: hashlib.sha256(_skeleton(path, data)).hexdigest() for path, data in contents.items()}


def promised(found: dict[str, str]) -> dict[str, str]:
    """Of `files` or `skeletons`, what equal caches share however they came about."""
    shared = ("acts.zarr/", "stats/", "manifest/cache.json")
    return {path: sha256 for path, sha256 in found.items() if path.startswith(shared)}


def rows(root: Path, split: str) -> dict[str, Tensor]:
    """Name -> what a loader gives of every row of a split, in the order in which rows are stored: hooks, token fields.

    Of one epoch each row is served once.
    """
    cache = open_cache(root)
    everything = {"split": split, "exclude_special_tokens": False, "token_fields": TOKEN_FIELDS}
    with Loader(cache, cache.hook_names, batch_tokens=50, **everything) as loader:
        batches = list(loader)
    order = torch.cat([batch.row for batch in batches]).argsort()
    names = {"id": "token_id", "document": "document", "sequence": "sequence", "position": "position"}
    found = {hook: torch.cat([batch.x[hook] for batch in batches])[order] for hook in cache.hook_names}
    return found | {name: torch.cat([getattr(b, of) for b in batches])[order].int() for name, of in names.items()}


def served_order(root: Path) -> list[int]:
    """Row numbers in the order in which training is served them, two epochs of them."""
    cache = open_cache(root)
    with Loader(cache, cache.hook_names[0], batch_tokens=50, seed=3, epochs=2) as loader:
        return torch.cat([batch.row for batch in loader]).tolist()


def digest(x: Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _contents(root: Path) -> dict[str, bytes]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in paths
        if path.relative_to(root).parts[0] != "log"
    }


def _skeleton(path: str, data: bytes) -> bytes:
    if COMPUTED.fullmatch(path):
        return b""
    if SEALED.fullmatch(path):
        return json.dumps([_without_numbers(json.loads(line)) for line in data.splitlines()]).encode()
    return data


def _without_numbers(values: Any, array: str = "") -> Any:
    """Values of a manifest file, without what follows from computed numbers; array: whose record they are."""
    if isinstance(values, list):
        return [_without_numbers(value, array) for value in values]
    if not isinstance(values, dict):
        return values
    if "checksums" in values and not array.startswith(("tokens/", "sequences/")):
        return {"chunks": len(values["checksums"])}
    names = values.keys() - {"crc32c", "torch", "transformers"}
    if all(name.startswith("manifest/partials/") for name in names):
        return sorted(names)
    return {name: _without_numbers(values[name], name) for name in sorted(names)}
