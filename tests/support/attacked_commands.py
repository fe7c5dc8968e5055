"""Commands on trees of a stranger who means harm: what they may do then, which is told by their sound trees."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import google_crc32c
import torch

from actcache.commands.terminal import plain
from support import foreign_saes
from support.arrow_caches import arrow_folder
from support.attacks import CANARY, TRUTHFUL, Attack
from support.command_line import actcache
from support.forked_commands import Commands, call, leave_address_space
from support.tiny_caches import HOOKS

SECONDS, BYTES = 20, 2 << 30
SMALL = 1 << 20  # bytes of a file that is looked into
NEW_HOOK = "blocks.0.hook_mlp_out"
N_STEPS = 8
BASE = f"""tokens: {32 * N_STEPS}
batch_tokens: 32
log_every: 1
checkpoint_every: 3
keep_checkpoints: 2
base: {{hook_name: {HOOKS[2]}, architecture: topk, d_sae: 32, lr: 1.0e-3}}
"""
SWEEP = BASE + "runs:\n  - {name: topk, k: 2}\n  - {name: begun, k: 3}\n"
GRID = BASE + "grid: {k: [2, 3], seed: [0, 1]}\n"
PROGRESS = re.compile(r"\rGenerating train split: [\w ?:.,/\[\]]*")  # of the library that reads the dataset
# what is another each time, or a copy of what was attacked; and what of the manifest is made again if it was lost: a
# plan then names the hooks of the cache in place of those that its last harvest was asked for, and a journal has the
# lines in the order in which they were written
TIMED = re.compile(
    r"/log/|/kept/|/manifest/(plan\.json|writer-\d+\.jsonl)$|/timing\.jsonl$|lock$|runs/[^/]+/crc32c\.json$"
)


@dataclass(frozen=True, kw_only=True)
class Use:
    """Commands that somebody gives one after the other, as long as they are well.

    commands: as they are typed, with the places put in. writes: the folders of the tree that they may change.
    """

    commands: Sequence[str]
    writes: Sequence[str] = ()


ON = "--device cpu"
HARVEST = f"harvest --model {{model}} --dataset {{texts}} --context-size 16 --holdout 0.4 --batch-size 8 {ON}"
OLD_HOOKS = f"--hook {HOOKS[0]} --hook {HOOKS[2]}"
NAMED = f"--model-name tiny_llama --hook-name {HOOKS[2]}"
LOOKS = {
    "info": Use(commands=["info {cache}", "info {cache} --json"]),
    "verify": Use(commands=["verify {cache}"]),
    "verify json": Use(commands=["verify {cache} --json"]),
    "train": Use(commands=[f"train {{cache}} {{sweep}} --out {{out}}/runs {ON}"]),
    "read": Use(commands=["read {cache}"]),
}
CACHE_USES = {
    **LOOKS,
    "sample": Use(commands=[f"verify {{cache}} --sample-model --sequences 2 {ON}"]),
    "repair": Use(commands=[f"repair {{cache}} {ON}", "verify {cache}"], writes=["cache"]),
    "harvest": Use(commands=[f"{HARVEST} --tokens 1600 --hook {NEW_HOOK} --out {{cache}}"], writes=["cache"]),
    "grow": Use(commands=[f"{HARVEST} --tokens 2000 {OLD_HOOKS} --out {{cache}}"], writes=["cache"]),
    "relabel": Use(commands=["relabel {cache} --native-bf16"], writes=["cache"]),
    "export-cache": Use(commands=["export-cache {cache} --out {out}/arrow"]),
    "plan": Use(commands=[f"train {{cache}} {{sweep}} --out {{out}}/runs --dry-run {ON}"]),
    "eval": Use(commands=[f"eval {{runs}}/topk --cache {{cache}} --json {ON}"], writes=["runs", "cache"]),
    "features": Use(commands=[f"features {{runs}}/topk --cache {{cache}} --feature 3 --json {ON}"], writes=["runs"]),
}
BEGUN_USES = {
    "info": LOOKS["info"],
    "verify": LOOKS["verify"],
    "go on": Use(commands=[f"{HARVEST} --tokens 1600 {OLD_HOOKS} --out {{cache}}"], writes=["cache"]),
    "more": Use(commands=[f"{HARVEST} --tokens 2000 {OLD_HOOKS} --out {{cache}}"], writes=["cache"]),
    "other": Use(commands=[f"{HARVEST} --tokens 1600 --hook {NEW_HOOK} --out {{cache}}"], writes=["cache"]),
    "worker": Use(
        commands=[f"{HARVEST} --tokens 1600 {OLD_HOOKS} --out {{cache}} --worker {i}/2" for i in (0, 1)],
        writes=["cache"],
    ),
    "no lock": Use(commands=[f"{HARVEST} --tokens 1600 {OLD_HOOKS} --out {{cache}} --no-lock"], writes=["cache"]),
    "repair": Use(commands=[f"repair {{cache}} {ON}"], writes=["cache"]),
}
RUN_USES = {
    "resume": Use(commands=[f"train {{cache}} {{sweep}} --out {{runs}} {ON}"], writes=["runs"]),
    "eval": Use(commands=[f"eval {{runs}}/topk {ON}"], writes=["runs", "cache"]),
    "eval all": Use(commands=[f"eval {{runs}} --cache {{cache}} --json {ON}"], writes=["runs", "cache"]),
    "features": Use(commands=[f"features {{runs}}/topk {ON}"], writes=["runs"]),
    "feature": Use(commands=[f"features {{runs}}/topk --feature 3 --json {ON}"], writes=["runs"]),
    "text": Use(commands=[f"features {{runs}}/topk --text ships --json {ON}"]),
    "predict": Use(commands=[f"features {{runs}}/topk --text ships --predict e {ON}"]),
    "report": Use(commands=["report {runs} --out {out}/report.html"]),
    "export": Use(commands=["export {runs}/topk --out {out}/sae"]),
    "neuronpedia": Use(commands=["export {runs}/topk --format neuronpedia --out {out}/np"]),
    "similar": Use(commands=[f"similar {{runs}}/topk {{runs}}/topk --json {ON}"]),
    "stability": Use(commands=[f"stability {{runs}}/topk {{runs}}/topk --json {ON}"]),
    "steer": Use(commands=[f"steer {{runs}}/topk --feature 3 --strength 4 --text ships --tokens 3 --json {ON}"]),
    "import": Use(commands=["import {runs}/topk/sae --out {out}/imported"]),
}
SAE_USES = {
    **{
        f"import {name}": Use(
            commands=[
                f"import {{saes}}/{name} --out {{out}}/runs/imported {more}",
                f"eval {{out}}/runs --cache {{cache}} --model {{model}} --json {ON}",
                "report {out}/runs --out {out}/report.html",
            ]
        )
        for name, more in (
            ("saelens", ""),
            ("run/layers.1", NAMED),
            ("trainer_0", NAMED),
            ("gated/trainer_0", "--model-name tiny_llama"),
        )
    },
    "import all": Use(commands=["import {saes} --out {out}/imported"]),
    "similar": Use(commands=[f"similar {{saes}}/saelens {{runs}}/topk {ON}"]),
    "steer": Use(
        commands=[f"steer {{saes}}/saelens --model {{model}} --feature 3 --mode ablate --text a --tokens 3 {ON}"]
    ),
    "export": Use(commands=["export {saes}/saelens --out {out}/sae"]),
}
ARROW_USES = {
    "import-cache": Use(
        commands=["import-cache {arrow} --model {model} --special-token 0 --out {out}/cache", "verify {out}/cache"]
    )
}
SWEEP_USES = {
    "train": Use(commands=[f"train {{cache}} {{sweeps}}/runs.yaml --out {{out}}/runs {ON}"]),
    "grid": Use(commands=[f"train {{cache}} {{sweeps}}/grid.yaml --out {{out}}/runs {ON}"]),
    "plan": Use(commands=[f"train {{cache}} --config {{sweeps}}/grid.yaml --out {{out}}/runs --dry-run {ON}"]),
    "resume": Use(commands=[f"train {{cache}} {{sweeps}}/runs.yaml --out {{runs}} {ON}"], writes=["runs"]),
}
SEALED = ("cache", "begun", "runs")  # they have checksums, by which damage is found
TREES = ("cache", "runs", "saes", "arrow", "sweeps")
# what is attacked -> what is done with it
USES = {
    "cache": CACHE_USES,
    "begun": BEGUN_USES,
    "runs": RUN_USES,
    "saes": SAE_USES,
    "arrow": ARROW_USES,
    "sweeps": SWEEP_USES,
}


def limited(world: Path) -> None:
    """In the process of the command: little memory and time, and folders that are watched."""
    os.environ.update(HOME=str(world / "home"), TMPDIR=str(world / "tmp"))
    tempfile.tempdir = None
    os.chdir(world / "here")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    leave_address_space(BYTES)
    signal.alarm(SECONDS)


class AttackedCommands:
    """A world of sound trees, which are attacked and used again and again.

    Its folder holds `inside`, the trees; `out`, where commands write; and around them what nobody may touch.
    """

    def __init__(self, folder: Path, model: Path, texts: Path):
        self.world, self.sound, said = folder / "world", folder / "sound", folder / "said"
        said.mkdir(parents=True)
        self.places = {"model": model, "texts": texts, "out": self.world / "out"}
        inside = self.world / "inside"
        self.places |= {name: inside / name for name in TREES} | {"sweep": self.world / "sweep.yaml"}
        make_surroundings(self.world)
        make_trees(self.places | {"begun": inside / "begun"})
        inside.rename(self.sound)
        self._changed, self._holds_begun = {*TREES}, False  # what `_renew` has to make
        self._commands = Commands(said)
        self._sound_uses: dict[tuple[str, str], Used] = {}

    def faults(self, tree: str, seed: int, n_attacks: int) -> list[str]:
        """What went wrong in so many attacks on a tree, each of them with the line by which it can be repeated."""
        wrong, codes = [], Counter()
        for number in range(n_attacks):
            said, code = self.fault(tree, seed, number)
            codes[code] += 1
            wrong += [f"{tree}, seed {seed}, {number}: {each}" for each in said]
        print(f"{tree}, seed {seed}: exit codes {dict(codes)}")
        return wrong

    def fault(self, tree: str, seed: int, number: int) -> tuple[list[str], int]:
        """What went wrong in one attack, and the exit code."""
        rng = random.Random(f"{tree} {seed} {number}")
        name, use = [*USES[tree].items()][number % len(USES[tree])]  # in turn: few attacks reach them all
        self._renew(tree)
        attacked = "cache" if tree == "begun" else tree
        changes = Attack(self.places[attacked], self.world, rng)(rng.choice([1, 1, 1, 2, 3, 6]))
        self._changed |= {attacked}
        names_a_link = self._names_a_link(use)
        used = self._used(use)
        wrong = used.wrongs(use)
        truthful = all(change.split(":")[0] in TRUTHFUL for change in changes) and not names_a_link
        if used.code == 0 and tree in SEALED and truthful:
            wrong += used.untruths(self._used_on_sound(tree, name))
        case = f"{name} after {'; '.join(changes)}: {used.code}"
        return [f"{case}: {each}: {used.said[-600:]}" for each in wrong], used.code

    def _names_a_link(self, use: Use) -> bool:
        """Whether a command names a link, which it follows: the path that it leads to is what a result may say."""
        return any(os.path.islink(word.format(**self.places)) for each in use.commands for word in each.split())

    def _used(self, use: Use) -> Used:
        code, said, before = 0, "", self._states()
        for command in use.commands:
            if code == 0:
                words = [word.format(**self.places) for word in command.split()]
                what, words = (read_rows, words[1:]) if words[0] == "read" else (call, words)
                code, more = self._commands.run(words, partial(limited, self.world), what)
                said += more
        used = Used(code=code, said=said, before=before, after=self._states())
        self._changed |= {name for name in TREES if any(is_below(path, [f"inside/{name}"]) for path in used.changed())}
        return used

    def _used_on_sound(self, tree: str, name: str) -> Used:
        if (tree, name) not in self._sound_uses:
            self._renew(tree)
            self._sound_uses[tree, name] = self._used(USES[tree][name])
            assert self._sound_uses[tree, name].code == 0, self._sound_uses[tree, name].said
        return self._sound_uses[tree, name]

    def _renew(self, tree: str) -> None:
        """Make the world as it was; of the trees only those that may have changed."""
        make_surroundings(self.world)
        changed = self._changed | ({"cache"} if (tree == "begun") != self._holds_begun else set())
        for name in changed:
            shutil.rmtree(self.places[name], ignore_errors=True)
            shutil.copytree(self.sound / ("begun" if name == "cache" and tree == "begun" else name), self.places[name])
        self._changed, self._holds_begun = set(), tree == "begun"

    def _states(self) -> dict[str, State]:
        """Everything that is there."""
        return {
            str(path.relative_to(self.world)): State.of(path)
            for folder, folders, names in os.walk(self.world)
            for path in (Path(folder, name) for name in (*folders, *names))
        }


@dataclass(frozen=True, kw_only=True)
class State:
    """What lies at a path. data: what a small file holds. stamp: another one where it was written."""

    stamp: tuple[int, ...]
    data: bytes | None

    @staticmethod
    def of(path: Path) -> State:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            return State(stamp=(status.st_mode,), data=None)
        is_small = stat.S_ISREG(status.st_mode) and status.st_size < SMALL
        stamp = (status.st_mode, status.st_size, status.st_ino, status.st_mtime_ns)
        return State(stamp=stamp, data=path.read_bytes() if is_small else None)


@dataclass(frozen=True, kw_only=True)
class Used:
    """What came of commands: the exit code, what they said, and everything that was there before and after."""

    code: int
    said: str
    before: dict[str, State]
    after: dict[str, State]

    def changed(self) -> set[str]:
        """What was written or removed."""
        return {path for path in {*self.before, *self.after} if self.before.get(path) != self.after.get(path)}

    def wrongs(self, use: Use) -> list[str]:
        """What no command may do, whatever it is given."""
        may_change = ("out", *(f"inside/{name}" for name in use.writes))
        touched = sorted(path for path in self.changed() if not is_below(path, may_change))
        errors = sum(line.startswith("error: ") for line in self.said.splitlines())
        found = {
            "a strange exit code": self.code not in (0, 1, 2),
            "a traceback": "Traceback" in self.said,
            f"{errors} errors": errors != (self.code != 0),
            "unprintable": any(not line.isprintable() for line in PROGRESS.sub("", self.said).split("\n")),
            f"wrote or removed {touched}": touched,
            "ran code": any(Path(path).name == CANARY for path in self.after),
        }
        return [what for what, is_so in found.items() if is_so]

    def untruths(self, sound: Used) -> list[str]:
        """How the results differ from those of the sound tree."""
        paths = {path for path in self.changed() | sound.changed() if not TIMED.search(path)}
        differ = sorted(path for path in paths if self.data(path) != sound.data(path))
        said = self.values() != sound.values()
        return [f"other results than of the sound tree: {differ or 'what it said'}"] if differ or said else []

    def data(self, path: str) -> bytes | None:
        state = self.after.get(path)
        return state.data if state else None

    def values(self) -> list[str]:
        """The JSON that it said."""
        return [line for line in self.said.splitlines() if line.startswith("{")]


def is_below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def make_surroundings(world: Path) -> None:
    """What lies around the trees. Nobody may touch it."""
    for name in ("out", "elsewhere", "home", "tmp", "here"):
        shutil.rmtree(world / name, ignore_errors=True)
    for name in ("elsewhere/x", "home", "tmp", "here"):
        (world / name).mkdir(parents=True)
    for path in world.iterdir():
        if not path.is_dir() or path.is_symlink():
            path.unlink()
    (world / "elsewhere" / "cfg.json").write_text("{}")
    (world / "elsewhere" / f".x.{'0' * 32}.partial").write_text("x")
    (world / "victim").write_text('{"export PATH": 1}\n')
    (world / "sweep.yaml").write_text(SWEEP)


def make_trees(places: dict[str, Path]) -> None:
    """A cache that has grown, one that is half done, runs of which one is not over, SAEs of others, an Arrow cache."""
    for line in (
        f"{HARVEST} --tokens 1200 {OLD_HOOKS} --out {{cache}}",
        f"{HARVEST} --tokens 1600 {OLD_HOOKS} --out {{cache}}",
        f"{HARVEST} --tokens 1600 {OLD_HOOKS} --out {{begun}} --worker 0/2",
        f"train {{cache}} {{sweep}} --out {{runs}} {ON}",
        f"eval {{runs}} {ON}",
        f"features {{runs}}/topk {ON}",
        "export {runs}/topk --out {saes}/saelens",
    ):
        actcache(*line.format(**places).split())
    shutil.rmtree(places["runs"] / "begun" / "sae")
    for path in (places["runs"] / "begun" / "checkpoint").glob(f"step-{N_STEPS:08d}.*"):
        path.unlink()  # so that steps are left to take
    with mock.patch.object(foreign_saes, "D_IN", 32):
        foreign_saes.sparsify_folder(places["saes"], hookpoint="layers.1")
        foreign_saes.dictionary_folder(places["saes"], "BatchTopKSAE", layer=1)
        foreign_saes.dictionary_folder(
            places["saes"] / "gated", "GatedAutoEncoder", layer=1, submodule_name="resid_post_layer_1"
        )
    arrow_folder(places["arrow"], n_rows=40)
    places["sweeps"].mkdir()
    (places["sweeps"] / "runs.yaml").write_text(SWEEP)
    (places["sweeps"] / "grid.yaml").write_text(GRID)


def read_rows(arguments: Sequence[str]) -> None:
    """In a process of its own: train on a cache, without an SAE. Prints the CRC-32C of all rows that came."""
    from actcache import Loader, open_cache
    from actcache.errors import ActcacheError

    try:
        cache, found = open_cache(arguments[0]), 0
        for batch in Loader(cache, cache.hook_names, batch_tokens=64):
            for x in batch.x.values():
                found = google_crc32c.extend(found, x.view(torch.uint8).numpy().tobytes())
    except (ActcacheError, OSError) as error:
        print(plain(f"error: {error}"))
        raise SystemExit(1) from None
    print(json.dumps({"crc32c": found}))
