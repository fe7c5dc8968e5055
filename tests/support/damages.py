"""Ways in which a file can be damaged; those of a cache, file by file, and what it takes to rebuild each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.tiny_caches import HOOKS

HOOK, OTHER = HOOKS[0], HOOKS[1]
TRAIN, VALIDATION = "acts.zarr/train", "acts.zarr/validation"
CACHE, PLAN, JOURNAL = "manifest/cache.json", "manifest/plan.json", "manifest/writer-00.jsonl"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What happens to one file of a cache. needs: "model" or "dataset" if nothing else gives its bytes again."""

    file: str
    how: Callable[[Path], None]
    needs: str = ""

    def to(self, root: Path) -> Path:
        """Damage the cache; returns the damaged file."""
        self.how(root / self.file)
        return root / self.file


def flip(path: Path, offset: int = 30) -> None:
    """One bit; from the end if the offset is negative."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 8
    path.write_bytes(content)


def flip_index(path: Path) -> None:
    """One bit of the index at the end of a shard."""
    flip(path, -9)


def cut(path: Path) -> None:
    """The last seven bytes are gone."""
    path.write_bytes(path.read_bytes()[:-7])


def drop(path: Path) -> None:
    """The file is gone."""
    path.unlink()


def zero(path: Path) -> None:
    """As long as it was, and empty, as after a crash of the machine."""
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    """In the place of the next one, which is as sound, and the other way round."""
    following = path.parents[1] / str(int(path.parent.name) + 1) / path.name
    here, there = path.read_bytes(), following.read_bytes()
    path.write_bytes(there)
    following.write_bytes(here)


def put_statistics_of_another_hook(path: Path) -> None:
    """Sealed, of as many rows and channels, and of something else."""
    path.write_bytes((path.parent / f"{HOOKS[2]}.json").read_bytes())


def change_seed(path: Path) -> None:
    """The identity of a cache of another seed."""
    values = json.loads(path.read_bytes())
    values["attributes"]["actcache"]["seed"] = 99
    path.write_text(json.dumps(values))


def empty_brace(path: Path) -> None:
    """No JSON."""
    path.write_text("{")


def lose_a_line(path: Path) -> None:
    """The third line of a journal is gone, and nothing tells."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def harm(kind: str, path: Path, other: Path, rng: random.Random) -> None:
    """What damage does to a file; if it is a swap, to two."""
    whole = path.read_bytes()
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif kind == "flip":
        flip(path, rng.randrange(len(whole)))
    elif kind == "zero":
        start, stop = sorted(rng.sample(range(len(whole) + 1), 2))
        path.write_bytes(whole[:start] + bytes(stop - start) + whole[stop:])
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(whole)


def hook_damages(array: str) -> dict[str, Damage]:
    """Damage to the shard files of a hook; array: one of those that hold it."""
    shard, last = f"{TRAIN}/{HOOK}/{array}/c/2/0", f"{VALIDATION}/{HOOK}/{array}/c/1/0"
    return {
        f"{array} flipped": Damage(file=shard, how=flip, needs="model"),
        f"{array} index flipped": Damage(file=shard, how=flip_index, needs="model"),
        f"{array} cut": Damage(file=shard, how=cut, needs="model"),
        f"{array} gone": Damage(file=shard, how=drop, needs="model"),
        f"{array} zeros": Damage(file=shard, how=zero, needs="model"),
        f"{array} swapped": Damage(file=shard, how=swap, needs="model"),
        f"last {array} flipped": Damage(file=last, how=flip, needs="model"),
    }


TOKENS_AND_SEQUENCES = {
    **{f"tokens/{n} flipped": Damage(file=f"{VALIDATION}/tokens/{n}/c/1", how=flip) for n in ("id", "sequence")},
    "tokens/position gone": Damage(file=f"{TRAIN}/tokens/position/c/0", how=drop),
    "sequences/id flipped": Damage(file=f"{TRAIN}/sequences/id/c/1/0", how=flip),
    "last sequences/id gone": Damage(file=f"{VALIDATION}/sequences/id/c/1/0", how=drop),
    "sequences/document cut": Damage(file=f"{TRAIN}/sequences/document/c/1/0", how=cut, needs="dataset"),
    "last sequences/document gone": Damage(file=f"{VALIDATION}/sequences/document/c/1/0", how=drop, needs="dataset"),
}
STATISTICS = {
    "partial flipped": Damage(file=f"manifest/partials/train-000002-{OTHER}.safetensors", how=flip),
    "partial gone": Damage(file=f"manifest/partials/validation-000001-{OTHER}.safetensors", how=drop),
    "statistics flipped": Damage(file=f"stats/train/{OTHER}.json", how=flip),
    "statistics gone": Damage(file=f"stats/validation/{OTHER}.json", how=drop),
    "statistics of another hook": Damage(file=f"stats/train/{OTHER}.json", how=put_statistics_of_another_hook),
}
METADATA = {
    "root of another identity": Damage(file="acts.zarr/zarr.json", how=change_seed),
    "root no JSON": Damage(file="acts.zarr/zarr.json", how=empty_brace),
    "group gone": Damage(file=f"{TRAIN}/tokens/zarr.json", how=drop),
    "array gone": Damage(file=f"{VALIDATION}/tokens/id/zarr.json", how=drop),
    "array flipped": Damage(file=f"{TRAIN}/tokens/position/zarr.json", how=flip),
    "sequences no JSON": Damage(file=f"{TRAIN}/sequences/id/zarr.json", how=empty_brace),
}
TWINS = {
    "plan flipped": Damage(file=PLAN, how=flip),
    "plan gone": Damage(file=PLAN, how=drop),
    "journal flipped": Damage(file=JOURNAL, how=flip),
    "journal cut": Damage(file=JOURNAL, how=cut),
    "journal lost a line": Damage(file=JOURNAL, how=lose_a_line),
    "journal gone": Damage(file=JOURNAL, how=drop),
}
BESIDE_HOOKS = {**TOKENS_AND_SEQUENCES, **STATISTICS, **METADATA, **TWINS}
