"""Faults of the surroundings and damage are two things: the one is never taken for the other, and neither is silent."""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zarr
from support.damages import harm
from support.faults import answer, contents, kept
from support.repairs import SETTINGS, changed, no_model, stamps
from support.surroundings import ERRNOS, FailingCalls, descriptors, outcome
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import D_MODEL

from actcache.errors import ActcacheError
from actcache.flow import SPLITS
from actcache.format.paths import ORIGIN
from actcache.integrity.repair import repair
from actcache.integrity.verify import verify
from actcache.loading.loader import Loader
from actcache.store.cache import open_cache

pytestmark = pytest.mark.faults
N_FAULTS = N_DAMAGES = 200


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """Several chunks in a shard, and several shards of sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache.format.arrays.MAX_CHUNK_BYTES", 32 * 2 * D_MODEL)
        patch.setattr("actcache.format.arrays.SEQUENCE_SHARD_TOKENS", 16 * 16)
        yield


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory, _small_chunks) -> Path:
    """A sound cache; do not change it."""
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("sound") / "c", **SETTINGS).path


def load(root: Path) -> str:
    """A digest of every batch of a loader of every hook, with every field and filter."""
    digest, cache = hashlib.sha256(), open_cache(root)
    fields = ("id", "document", "sequence", "position")
    for split in SPLITS:
        with Loader(cache, HOOKS, split=split, token_fields=fields, max_norm_ratio=100.0, group_chunks=3) as loader:
            for batch in loader:
                tensors = [*batch.x.values(), batch.row, *(getattr(batch, name) for name in ("token_id", *fields[1:]))]
                for tensor in tensors:
                    digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


USES: dict[str, Callable[[Path], object]] = {
    "read": contents,
    "load": load,
    "verify": verify,
    "repair": lambda root: repair(root, no_model),
}


def test_no_fault_of_the_surroundings_is_called_damage(sound):
    """The n-th system call about a file of the cache fails, for two hundred n."""
    rng, told = random.Random(0), []
    before = stamps(sound)
    truths, places = {}, {}
    for name, use in USES.items():
        with FailingCalls(sound)() as calls:
            truths[name] = use(sound)
        assert calls.n_calls > 100
        places[name] = {each: [n for n, called in enumerate(calls.names) if called == each] for each in {*calls.names}}
    for _ in range(N_FAULTS):
        name, number = rng.choice([*USES]), rng.choice(ERRNOS)
        of_one_kind = places[name][rng.choice(sorted(places[name]))]  # folders on the way are opened most often
        with FailingCalls(sound, rng.choice(of_one_kind), number)() as calls:
            got = outcome(lambda name=name: USES[name](sound))
        what = f"{name}: {errno.errorcode[number]} of {calls.failed}: {got!r}"
        if isinstance(got, Exception):
            assert (type(got), got.errno) == (type(OSError(number, "")), number), what
            assert "; " in str(got), f"{what}: without a way out"
            assert str(sound) in str(got), what
            told.append(calls.failed.split()[0])
        else:
            assert got == truths[name], what
        assert not changed(before, stamps(sound)), what
    assert len(told) > N_FAULTS // 2
    assert {"open", "read", "stat", "fstat", "mmap", "size"} <= {*told}


def test_with_few_descriptors_all_is_as_with_many(sound):
    """Every hook of both splits is read at once by threads, with fewer descriptors than there are shards."""
    before, truths = stamps(sound), {name: use(sound) for name, use in USES.items()}
    n_shards = sum(path.is_file() for path in (sound / "acts.zarr").rglob("c/**/*"))
    with descriptors(64):
        assert n_shards > 64
        assert {name: use(sound) for name, use in USES.items()} == truths
    assert not changed(before, stamps(sound))


def zarr_reads(root: Path) -> dict[str, dict]:
    """What zarr-python says of every array and group."""
    members = zarr.open_group(root / "acts.zarr", mode="r").members(max_depth=None)
    return {path: member.metadata.to_dict() for path, member in members}


def test_no_damage_is_silent(sound, tmp_path):
    """Two hundred times a file of a cache is changed at random; whoever reads it names it or gives what it gave."""
    root, rng = shutil.copytree(sound, tmp_path / "c"), random.Random(0)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    truth, metadata, n_named = contents(root), zarr_reads(root), 0
    for _ in range(N_DAMAGES):
        path, other = rng.sample(files, 2)
        kind = rng.choice(["flip", "truncate", "remove", "swap", "zero"])
        before = stamps(root)
        with kept(path, other):
            harm(kind, path, other, rng)
            harmed = {str(each) for each, (*_, whole) in before.items() if outcome(each.read_bytes) != whole}
            read, checked = answer(lambda: contents(root)), answer(lambda: verify(root))
            problems = [] if isinstance(checked, ActcacheError) else [problem.path for problem in checked.problems]
            is_named = [any(name in str(got) for name in (*harmed, f"{root}:")) for got in (read, checked)]
            what = f"{kind} of {' and '.join(harmed)}: {read!s:.200}, {checked!s:.200}"
            assert is_named[0] if isinstance(read, ActcacheError) else read == truth, what
            if isinstance(checked, ActcacheError) or problems:
                assert is_named[1] if isinstance(checked, ActcacheError) else harmed.intersection(problems), what
                n_named += 1
            else:  # what nobody reads, or what says the same in other bytes
                unread = all(Path(each).relative_to(root).parts[0] == "log" or ORIGIN in each for each in harmed)
                assert unread or zarr_reads(root) == metadata, what
                assert read == truth, what
    assert n_named > N_DAMAGES * 0.9
    assert contents(root) == truth
    assert verify(root).problems == ()
