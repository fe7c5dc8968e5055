"""How benchmarks measure: interleaved repeats, medians, ratios pair by pair, and the machine they ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one call: by the clock on the wall, and of CPU in all threads of this process."""

    wall: float
    cpu: float


def interleaved_costs(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Cost]]:
    """What each contender costs, taken in turn `repeats` times after one uncounted round.

    The order is turned round in every other round, so that a drift of the machine favours nobody.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order:
            cost = _cost(contenders[name])
            if number:
                costs[name].append(cost)
    return costs


def _cost(contender: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    contender()
    return Cost(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def interleaved_seconds(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each contender, as `interleaved_costs` takes them."""
    return {name: [cost.wall for cost in costs] for name, costs in interleaved_costs(contenders, repeats).items()}


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For what is measured by the thread, or makes threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratios(bound: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """bound / ours pair by pair, as seconds: 1 means that ours is as fast. Median, smallest and largest."""
    pairs = [b / o for b, o in zip(bound, ours, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": len(pairs)}


def described(name: str, found: Mapping[str, float]) -> str:
    """A line for a person: the ratio with its range."""
    return f"{name}: {found['median']:.3f} (range {found['min']:.3f} to {found['max']:.3f}, {found['pairs']} pairs)"


def installed(package: str, say: Say) -> bool:
    """Whether a peer can be measured; says so if not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        say(f"{package} is not installed; left out")
    return found


def machine() -> dict[str, object]:
    """What a number without is worth nothing."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "zarr", "numcodecs")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
