"""How benchmarks measure: interleaved repeats, medians, ratios pair by pair, and the machine they ran on."""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from actcache.machine.limits import cores

Say = Callable[[str], None]
BF16_FLAGS = ("avx512_bf16", "amx_tile", "amx_bf16")
SETTINGS = ("OMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # of threads and of the allocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one call: by the clock on the wall, and of CPU in all threads of this process."""

    wall: float
    cpu: float


def interleaved_costs(
    contenders: Mapping[str, Callable[[], object]], repeats: int, uncounted: int = 1
) -> dict[str, list[Cost]]:
    """The costs of each contender. All take turns, `repeats` times, after rounds that are not counted.

    Every other round runs in the reverse order, so that a drift of the machine favours nobody.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for number in range(1 - uncounted, repeats + 1):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order:
            cost = _cost(contenders[name])
            if number > 0:
                costs[name].append(cost)
    return costs


def _cost(contender: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    contender()
    return Cost(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], repeats: int, uncounted: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each contender, as `interleaved_costs` takes them."""
    costs = interleaved_costs(contenders, repeats, uncounted)
    return {name: [cost.wall for cost in spent] for name, spent in costs.items()}


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch uses one thread while something is measured per thread, or makes threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratios(bound: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """The ratios bound / ours of seconds, pair by pair: median, smallest and largest. 1 means that ours is as fast."""
    pairs = [b / o for b, o in zip(bound, ours, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": len(pairs)}


def described(name: str, found: Mapping[str, float]) -> str:
    """A line for a person: the ratio with its range."""
    return f"{name}: {found['median']:.3f} (range {found['min']:.3f} to {found['max']:.3f}, {found['pairs']} pairs)"


def installed(package: str, say: Say) -> bool:
    """Whether a peer can be measured; says why not."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        say(f"{package} is left out: {error}")
        return False
    return True


def forget(files: Iterable[Path]) -> None:
    """Drop the files' pages from the page cache; they are on disk already."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Bytes that this process made the disk read (proc(5), io)."""
    with open("/proc/self/io") as lines:
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def peak_resident_bytes() -> int:
    """The most memory that this process has held at once, what it maps included (VmHWM of proc(5), status)."""
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def machine() -> dict[str, object]:
    """The machine and the versions behind a number. Without them the number means nothing."""
    return {
        "cpu": _cpu_name(),
        "bf16_products": [flag for flag in BF16_FLAGS if flag in _cpu_line("flags").split()],
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "set": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SETTINGS)},
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "zarr", "numcodecs")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor()


def _cpu_line(name: str) -> str:
    """What /proc/cpuinfo says under this name of the first core; nothing where it does not."""
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
