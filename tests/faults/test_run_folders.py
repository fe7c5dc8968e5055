"""What training leaves: faults of the surroundings and damage are two things, and neither is silent.

Every use of a folder of runs is tried while a system call about it fails, and after one of its files was damaged.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.damages import harm
from support.faults import answer
from support.repairs import changed, stamps
from support.surroundings import ERRNOS, FailingCalls, descriptors, outcome
from support.sweep_cases import Stop, stop_after
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import ActcacheError
from actcache.store.cache import Cache
from trainer.config.sweep import SweepConfig
from trainer.evaluation.evaluate import evaluate_runs
from trainer.features.build import build_features
from trainer.features.read import Features, open_features
from trainer.features.words import read_words, write_words
from trainer.formats.saelens import export_sae, load_sae
from trainer.report.report import write_report
from trainer.trained_on import remembered_cache
from trainer.training.sweep import train

pytestmark = pytest.mark.faults
RUNS = [
    {"name": "topk", "architecture": "topk", "k": 4},
    {"name": "jumprelu", "architecture": "jumprelu", "sparsity_coefficient": 0.01},
]
KINDS = ("flip", "truncate", "remove", "swap", "zero")
N_FAULTS, N_DAMAGES = 120, 120  # of each of the two kinds of uses


def the_sweep() -> SweepConfig:
    shared = {"batch_tokens": 128, "log_every": 2, "checkpoint_every": 3, "keep_checkpoints": 2, "tokens": 1400}
    base = {"hook_name": HOOKS[1], "d_sae": 48, "lr": 0.003}
    return SweepConfig.from_dict({**shared, "epochs": 2, "base": base, "runs": RUNS})


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cache, and folders of runs at three moments; do not change them.

    begun: stopped between two checkpoints. half: finished, while features are built. finished: with all that there is.
    """

    cache: Cache
    begun: Path
    half: Path
    finished: Path


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    """Several files of codes, and several blocks in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
        patch.setattr("trainer.features.build.FILE_ENTRIES", 100)
        patch.setattr("trainer.checksums.BLOCK_BYTES", 1 << 10)
        yield


@pytest.fixture(scope="module")
def place(tiny_model, tiny_texts, tmp_path_factory, _small_parts) -> Place:
    folder = tmp_path_factory.mktemp("place")
    cache = harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS[1:2], tokens=2000, holdout=0.4)
    begun, half, finished = folder / "begun", folder / "half", folder / "finished"
    with pytest.raises(Stop):
        train(cache, the_sweep(), begun, progress=stop_after(8))
    assert all(record.error is None for record in train(cache, the_sweep(), finished))
    evaluate_runs(finished, cache)
    shutil.copytree(finished, half)
    with pytest.raises(Stop):
        build_features(half / "topk", cache, progress=stop_at(4))
    for run in RUNS:
        build_features(finished / str(run["name"]), cache)
        write_words(finished / str(run["name"]), cache, tiny_model)
    return Place(cache=cache, begun=begun, half=half, finished=finished)


def stop_at(n_calls: int) -> Callable[[int, int], None]:
    """A progress callback of a build that ends it."""
    calls: list[int] = []

    def stop(n_rows: int, total: int) -> None:
        calls.append(n_rows)
        if len(calls) == n_calls:
            raise Stop

    return stop


# --- uses ------------------------------------------------------------------------------------------------------------


def answers(features: Features) -> list[object]:
    """Everything that the features of a run say."""
    asked: list[object] = [features.n_tokens, features.n_fired.tolist(), features.max_act.tolist()]
    for latent in range(0, features.d_sae, 5):
        counts, edges = features.histogram(latent)
        asked += [features.top(latent, 10), features.coactive(latent), counts.tolist(), edges.tolist()]
    return asked


def weights(run: Path) -> dict[str, bytes]:
    sae = load_sae(run)
    tensors = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    return {name: x.contiguous().view(torch.uint8).numpy().tobytes() for name, x in tensors.items() if x is not None}


def contents_of(folder: Path, *patterns: str) -> dict[str, bytes]:
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def looks(place: Place, aside: Path) -> dict[str, Callable[[Path], object]]:
    """What reads a folder of finished runs, and writes nothing into it: name -> use."""

    def exported(root: Path) -> dict[str, bytes]:
        shutil.rmtree(aside / "exported", ignore_errors=True)
        return contents_of(export_sae(root / "topk", aside / "exported"), "*")

    return {
        "load": lambda root: [weights(root / str(run["name"])) for run in RUNS],
        "features": lambda root: answers(open_features(root / "topk")),
        "words": lambda root: read_words(root / "topk"),
        "report": lambda root: write_report(root, aside / "report.html").read_bytes(),
        "export": exported,
        "trained": lambda root: [record.metrics for record in train(place.cache, the_sweep(), root)],
        "cache": remembered_cache,
    }


@dataclass(frozen=True, kw_only=True)
class Work:
    """What writes into a folder of runs.

    start: the folder that it begins with. do: the work. ends: which files it ends with, as patterns. writes: of which
    kinds of files it may leave others than there were, when it is stopped.
    """

    start: Path
    do: Callable[[Path], object]
    ends: tuple[str, ...]
    writes: tuple[str, ...]

    def came_to(self, root: Path) -> dict[str, bytes]:
        """The files that it ended with."""
        return contents_of(root, *self.ends)


def works(place: Place) -> dict[str, Work]:
    last = "*/checkpoint/step-00000011.*"  # of older ones a fault may leave more than are kept
    runs = ("*/config.json", "*/metrics.jsonl", "*/sae/*", last, "*/sae.crc32c.json")
    logs = ("metrics.jsonl", "timing.jsonl", "crc32c.json")
    return {
        "resume": Work(
            start=place.begun,
            do=lambda root: train(place.cache, the_sweep(), root),
            ends=runs,
            writes=(*logs, "checkpoint", "sae", "sae.crc32c.json", ".lock", ".partial"),
        ),
        "build": Work(
            start=place.half,
            do=lambda root: build_features(root / "topk", place.cache),
            ends=("topk/features/*",),
            writes=("features",),
        ),
        "evaluate": Work(
            start=place.half,
            do=lambda root: evaluate_runs(root, place.cache),
            ends=("*/eval.json", "pca-*/*"),
            writes=("eval.json", "crc32c.json", "pca-", ".partial"),
        ),
    }


def foreign(root: Path, work: Work, paths: set[Path]) -> list[Path]:
    """Those that the work has no business with: other kinds of files, below RUNS/<name>/ or RUNS itself."""
    parts = [path.relative_to(root).parts for path in paths]
    kinds = [part[0] if len(part) == 1 or part[0].startswith("pca-") else part[1] for part in parts]
    ours = [any(kind == each or each in (kind[-8:], kind[:4]) for each in work.writes) for kind in kinds]
    return [path for path, is_ours in zip(paths, ours, strict=True) if not is_ours]


# --- faults of the surroundings --------------------------------------------------------------------------------------


def assert_is_of_the_system(got: Exception, number: int, root: Path, what: str) -> None:
    """An OSError of this number that names the file, or a folder above it, and the way out."""
    assert (type(got), getattr(got, "errno", None)) == (type(OSError(number, "")), number), what
    assert "; " in str(got), f"{what}: without a way out"
    assert str(root) in str(got), what


def test_no_fault_of_the_surroundings_is_called_damage_by_who_reads(place, tmp_path):
    uses, rng, told, root = looks(place, tmp_path), random.Random(0), [], place.finished
    before, truths, n_calls = stamps(root), {}, {}
    for name, use in uses.items():
        use(root)  # what is imported is read once
        with FailingCalls(root)() as calls:
            truths[name], n_calls[name] = use(root), calls.n_calls
    assert min(n_calls.values()) >= 5
    for number_of_fault in range(N_FAULTS):
        name, number = [*uses][number_of_fault % len(uses)], rng.choice(ERRNOS)
        with FailingCalls(root, rng.randrange(n_calls[name]), number)() as calls:
            got = outcome(lambda name=name: uses[name](root))
        what = f"{name}: {errno.errorcode[number]} of {calls.failed}: {got!r}"
        if isinstance(got, Exception):
            assert_is_of_the_system(got, number, root, what)
            told.append(calls.failed.split()[0])
        else:
            assert got == truths[name], what
        assert not changed(before, stamps(root)), what
    assert len(told) > N_FAULTS * 0.8
    assert {"open", "read", "readinto", "stat", "fstat", "mmap", "scandir"} & {*told} >= {"open", "read", "stat"}


def test_no_fault_of_the_surroundings_is_called_damage_by_who_writes(place, tmp_path):
    """What was begun stays as it was or goes further: the same call again ends as if nothing had happened."""
    rng, told, truths, n_calls, todo = random.Random(1), [], {}, {}, works(place)
    for name, work in todo.items():
        root = Path(shutil.copytree(work.start, tmp_path / name))
        with FailingCalls(root)() as calls:
            work.do(root)
        truths[name], n_calls[name] = work.came_to(root), calls.n_calls
    for number_of_fault in range(N_FAULTS):
        name, number = [*todo][number_of_fault % len(todo)], rng.choice(ERRNOS)
        work, root = todo[name], Path(shutil.copytree(todo[name].start, tmp_path / str(number_of_fault)))
        before = stamps(root)
        with FailingCalls(root, rng.randrange(n_calls[name]), number)() as calls:
            got = outcome(lambda root=root, work=work: work.do(root))
        what = f"{name}: {errno.errorcode[number]} of {calls.failed}: {got!r}"
        if isinstance(got, Exception):
            assert_is_of_the_system(got, number, root, what)
            told.append(calls.failed.split()[0])
        else:
            assert work.came_to(root) == truths[name], what
        assert not foreign(root, work, changed(before, stamps(root))), what
        work.do(root)
        assert work.came_to(root) == truths[name], f"{what}, and then"
        shutil.rmtree(root)
    assert len(told) > N_FAULTS * 0.8


def test_with_few_descriptors_all_is_as_with_many(place, tmp_path):
    uses, root, before = looks(place, tmp_path), place.finished, stamps(place.finished)
    truths = {name: use(root) for name, use in uses.items()}
    n_codes = len(list((root / "topk" / "features").glob("codes-*")))
    assert 5 < n_codes < 60
    with descriptors(64):
        assert {name: use(root) for name, use in uses.items()} == truths
    with descriptors(n_codes):
        got = outcome(lambda: answers(open_features(root / "topk")))
    assert_is_of_the_system(got, errno.EMFILE, root, repr(got))
    assert not changed(before, stamps(root))


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged_at_random(root: Path, rng: random.Random) -> tuple[str, set[Path]]:
    """Damage one file below a folder, or swap two; returns how, and those that no longer hold what they held."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    path, other = rng.sample(files, 2)
    kind, before = rng.choice(KINDS), {each: each.read_bytes() for each in (path, other)}
    harm(kind, path, other, rng)
    return kind, {each for each, whole in before.items() if outcome(each.read_bytes) != whole}


def is_named(error: ActcacheError, root: Path, harmed: set[Path]) -> bool:
    """Whether the message names a damaged file, or a folder of runs or features that holds one."""
    folders = {folder for path in harmed for folder in path.parents if folder.is_relative_to(root) and folder != root}
    said = str(error)
    return any(str(path) in said for path in harmed) or any(f"{each}{end}" in said for each in folders for end in ": ")


def test_no_damage_is_silent_to_who_reads(place, tmp_path):
    """Each answer is what it was, or an error that names a damaged file."""
    uses, rng, n_named = looks(place, tmp_path), random.Random(2), 0
    root = shutil.copytree(place.finished, tmp_path / "runs")
    truths = {name: use(root) for name, use in uses.items()}
    for _ in range(N_DAMAGES):
        kind, harmed = damaged_at_random(root, rng)
        before = stamps(root)
        for name, use in uses.items():
            got = answer(lambda use=use: use(root))
            what = f"{name}: {kind} of {' and '.join(map(str, harmed))}: {got!s:.300}"
            if isinstance(got, ActcacheError):
                assert is_named(got, root, harmed), what
                n_named += 1
            else:
                assert got == truths[name], what
        assert not changed(before, stamps(root)), "who reads writes nothing"
        for path in harmed:
            shutil.copyfile(place.finished / path.relative_to(root), path)
    assert n_named > N_DAMAGES
    assert {name: use(root) for name, use in uses.items()} == truths


def test_no_damage_is_silent_to_who_writes(place, tmp_path):
    """What is begun ends as without damage, or an error names the file; of a checkpoint the last good one too."""
    rng, n_named, truths, todo = random.Random(3), 0, {}, works(place)
    for name, work in todo.items():
        root = Path(shutil.copytree(work.start, tmp_path / name))
        work.do(root)
        truths[name] = work.came_to(root)
    for number in range(N_DAMAGES):
        name, work = [*todo.items()][number % len(todo)]
        root = Path(shutil.copytree(work.start, tmp_path / str(number)))
        kind, harmed = damaged_at_random(root, rng)
        before = stamps(root)
        got = answer(lambda root=root, work=work: work.do(root))
        what = f"{name}: {kind} of {' and '.join(map(str, harmed))}: {got!s:.300}"
        if isinstance(got, ActcacheError):
            n_named += 1
            assert is_named(got, root, harmed), what
            assert not foreign(root, work, changed(before, stamps(root))), what
            assert not {path for path in before if not path.exists()}, f"{what}: something is lost"
            if got.path is not None and got.path.name == "step-00000006.safetensors":
                good = not any(path.name.startswith("step-00000003") for path in harmed)
                assert ("go on from step-00000003.safetensors" if good else "train from the start") in str(got), what
        else:
            assert work.came_to(root) == truths[name], what
        shutil.rmtree(root)
    assert n_named > N_DAMAGES // 3


def test_a_damaged_checkpoint_can_be_removed_as_the_message_says(place, tmp_path):
    root = Path(shutil.copytree(place.begun, tmp_path / "runs"))
    newest = root / "topk" / "checkpoint" / "step-00000006.safetensors"
    harm("zero", newest, newest, random.Random(0))
    work = works(place)["resume"]
    with pytest.raises(ActcacheError, match=r"remove it to go on from step-00000003\.safetensors, the last good one"):
        work.do(root)
    newest.unlink()
    sound = Path(shutil.copytree(place.begun, tmp_path / "sound"))
    for each in (root, sound):
        work.do(each)
    assert work.came_to(root) == work.came_to(sound)
