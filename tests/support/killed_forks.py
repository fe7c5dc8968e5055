"""Harvests and repairs that are killed at a call of a function of os, and tried again.

Each function is for `Commands.run`: it is called in a process of its own, loads the model once, forks for each try and
prints how it ended: the point, and "killed" or the exit code.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence, Sized
from pathlib import Path


def harvest_after_kills(arguments: Sequence[str]) -> None:
    """One harvest, killed at each point in turn, and then not. arguments: model, texts, cache, points as fsync:3."""
    from actcache.models.load import load_model
    from support.tiny_caches import harvest_tiny

    model_dir, texts, out, *points = arguments
    model = load_model(model_dir, device="cpu")
    harvest_tiny(model, Path(texts), Path(out).with_name("warm"))  # what is made once is there before the forks
    for point in [*points, None]:
        _try(point, lambda: [] if harvest_tiny(model, Path(texts), Path(out)) else [out])


def repair_after_kills(arguments: Sequence[str]) -> None:
    """In each cache a repair that is killed, at the call whose number is its name, and a repair.

    arguments: model, its attention, name of the function, caches.
    """
    from actcache.format import arrays
    from actcache.integrity.repair import repair
    from actcache.models.load import load_model

    arrays.SEQUENCE_SHARD_TOKENS = 16 * 16
    model_dir, attention, function, *roots = arguments
    model = load_model(model_dir, device="cpu", attention=attention)
    for root in roots:
        for point in (f"{function}:{Path(root).name}", None):
            _try(point, lambda root=root: repair(root, lambda compute: model).problems)


def _try(point: str | None, work: Callable[[], Sized]) -> None:
    """Print how a fork ends that does the work and is killed at the point; None is no point.

    work: gives what is wrong after it, whose length is the exit code.
    """
    child = os.fork()
    if child == 0:
        if point:
            _die_at(*point.split(":"))
        os._exit(len(work()))
    status = os.waitpid(child, 0)[1]
    print(point, "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)


def _die_at(name: str, count: str) -> None:
    real, calls = getattr(os, name), [0]

    def patched(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, patched)
