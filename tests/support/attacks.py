"""What a stranger who means harm does to a tree of files, which is changed at random, from a seed.

Files become links, pipes, devices, holes of 100 GB, other files; values of JSON, of headers of safetensors and of YAML
become hostile ones, with seals and checksums that are right; names clear the screen or end the line.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from actcache.errors import ManifestError
from actcache.format.seal import MALFORMED, seal, unseal
from trainer.checksums import checksums_of, sealed

CANARY = "CANARY"  # a file of this name is made by code that ran
RUNS_CODE = f"touch {CANARY}"
LARGE = 100 << 30  # bytes of a hole
MOST = 1 << 24  # bytes of a file that is no hole
BELIEVED = 0.7  # of the lies have checksums that are right
TEXTS = (
    *(f"$({RUNS_CODE})", "../../victim", "/etc/passwd", "x\x1b[2J\nmodel        forged", "", "x" * 100_000, "\ud800"),
    *("a\0b", ".", "..", "/", "../elsewhere", "x/..", "\u202egpj", "\r", "\x9b2J", "blocks.0.hook_mlp_out", "train"),
)
NUMBERS = (
    *(None, True, -1, 0, 1, 3, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 10**4000, 0.5, 1e308, 1e-320, float("nan")),
    *(float("inf"), [], {}, [[]], [None], {"a": {}}, ["x"] * 1000),
)
NAMES = (
    *("a\nb", "\x1b[2Jx", os.fsdecode(b"\xff\xfe"), "-rf", "x" * 255, f".x.{'0' * 32}.partial", ".sae.old"),
    *("writer-99.jsonl", "writer-00.jsonl", "writer-00.lock", "exclusive.lock", ".lock", "zarr.json", "config.json"),
    *("step-99999999.safetensors", "step-99999999.crc32c.json", "sae", "checkpoint", "features", "kept", "0" * 16),
    *("crc32c.json", "cfg.json", "9", "\u202egpj", "$(touch CANARY)", "train", "c", "~", "%s", "[bold]x"),
)
JOURNALS = ("writer-99.jsonl", "writer-01.jsonl", "writer-100.jsonl", "writer-1000000000000000000000.jsonl")
YAML = (
    f"x: !!python/object/apply:os.system ['{RUNS_CODE}']\n",
    "x: &x [*x]\n",
    "x: " + "[" * 20_000 + "\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
    "<<: [{tokens: 3}, {tokens: 4}]\n",
    "tokens: " + "9" * 5000 + "\n",
    "? [a, b]\n: c\n",
    "\0",
    "\ufeff---\n---\n",
)


@dataclass(frozen=True)
class Attack:
    """Changes a tree. inside: the tree, or the part of it that is changed. world: the folder above, with `victim`, a
    file, and `elsewhere`, a folder. rng: all that is random.
    """

    inside: Path
    world: Path
    rng: random.Random

    def __call__(self, n_changes: int) -> list[str]:
        """Make so many changes; says which."""
        said = []
        while len(said) < n_changes:
            kind, change = self.rng.choice([*self.rng.choice([TRUTHFUL, LIES]).items()])
            with suppress(NothingToChange):
                said.append(f"{kind}: {change(self)!r:.200}")
                if kind in LIES and self.rng.random() < BELIEVED:
                    reseal(self.inside)
        return said

    def file(self, *suffixes: str) -> Path:
        """A regular file that holds something; of many that are named alike, as shards are, none is likelier."""
        alike: dict[str, list[Path]] = {}
        for path in regular_files(self.inside):
            if not suffixes or path.suffix in suffixes:
                alike.setdefault(re.sub(r"\d+", "0", str(path.relative_to(self.inside))), []).append(path)
        if not alike:
            raise NothingToChange
        return self.rng.choice(alike[self.rng.choice([*alike])])

    def folder(self) -> Path:
        """A folder of the tree, or the tree."""
        return self.rng.choice([*dict.fromkeys([self.inside, *(path.parent for path in regular_files(self.inside))])])

    def short(self, path: Path) -> str:
        return str(path.relative_to(self.inside))


class NothingToChange(Exception):
    """The tree holds nothing that this change could be made to, or not any more."""


def regular_files(folder: Path) -> list[Path]:
    """Those that hold something and are no holes."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and 0 < status.st_size < MOST:
                found.append(path)
    return found


def paths_of(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON values."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, below in items:
        yield from paths_of(below, (*path, key))


def at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def replaced(values: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of the values with `change(the list or object that holds the place, key)` done to it."""
    holder = {"": json.loads(json.dumps(values))}
    change(at(holder, ("", *path)[:-1]), ("", *path)[-1])
    return holder[""]


def as_object(value: Any) -> dict[str, Any] | None:
    """The object whose JSON a text is, as in the metadata of checkpoints; None for anything else."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):
            return json.loads(value)
    return None


def hostile_values(values: Any, rng: random.Random) -> tuple[Any, str]:
    """The values with one change, and what it was."""
    where = rng.choice([*paths_of(values)])
    inner = as_object(at(values, where))
    if inner is not None:
        hostile, said = hostile_values(inner, rng)
        return replaced(values, where, lambda holder, key: holder.update({key: json.dumps(hostile)})), said
    held, other = at(values, where), at(values, rng.choice([*paths_of(values)]))
    new = rng.choice(
        [
            *[rng.choice(TEXTS), rng.choice(NUMBERS)] * 2,
            other,
            [held],
            *([held + 1, held * 2, -held, held - 1] if type(held) in (int, float) else []),
            *([held + "/../x", held + "\x1b[31m\n", held.upper(), held[:-1]] if type(held) is str else []),
            *([held[::-1], held + held, held[1:]] if type(held) is list else []),
            *([held | {rng.choice(TEXTS): other}] if type(held) is dict else []),
        ]
    )

    def change(holder: Any, key: Any) -> None:
        if choice < 0.1 and isinstance(holder, list | dict) and len(where):
            del holder[key]
        elif choice < 0.2 and isinstance(holder, dict) and len(where):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        else:
            holder[key] = new

    choice = rng.random()
    return replaced(values, where, change), f"{where} = {new!r:.60} ({choice:.1f})"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def as_json(values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def change_json(attack: Attack) -> str:
    """One value of a JSON file, or of a line of it, becomes a hostile one; its seal is right."""
    path = attack.file(".json", ".jsonl", ".pt.json")
    lines = path.read_bytes().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_bytes()]
    number = attack.rng.randrange(len(lines))
    is_sealed = b'"crc32c":"' in lines[number]
    try:
        values = unseal(lines[number], path) if is_sealed else json.loads(lines[number])
        hostile, said = hostile_values(values, attack.rng)
    except (ManifestError, *MALFORMED) as error:  # it was changed before
        raise NothingToChange from error
    new = as_json(hostile)
    if attack.rng.random() < 0.05:
        new, said = nested(100_000).encode() + b"\n", "nested"
    elif is_sealed and isinstance(hostile, dict):
        with suppress(ValueError, TypeError):  # what no seal can have
            new = seal(hostile)
    overwrite(path, b"".join([*lines[:number], new, *lines[number + 1 :]]))
    return f"{attack.short(path)}: {said}"


def change_header(attack: Attack) -> str:
    """The header of a safetensors file says something else; its length is right."""
    path = attack.file(".safetensors")
    data = path.read_bytes()
    n_bytes = int.from_bytes(data[:8], "little")
    try:
        hostile, said = hostile_values(json.loads(data[8 : 8 + n_bytes]), attack.rng)
    except MALFORMED as error:
        raise NothingToChange from error
    header = json.dumps(hostile).encode()
    overwrite(path, len(header).to_bytes(8, "little") + header + data[8 + n_bytes :])
    return f"{attack.short(path)}: {said}"


def change_yaml(attack: Attack) -> str:
    """A sweep file says something else, or more."""
    path = attack.file(".yaml")
    try:
        text = path.read_text()
        hostile, said = hostile_values(yaml.safe_load(text), attack.rng)
        changed = yaml.safe_dump(hostile) if attack.rng.random() < 0.5 else json.dumps(hostile)
    except (yaml.YAMLError, *MALFORMED) as error:  # it was changed before
        raise NothingToChange from error
    if attack.rng.random() < 0.5:
        changed = text + attack.rng.choice(YAML)
    overwrite(path, changed.encode(errors="surrogatepass"))
    return f"{attack.short(path)}: {said}, or {changed[-40:]!r}"


def change_pickle(attack: Attack) -> str:
    """A pickle of torch runs a command where it is loaded as one, or asks for more than it has."""
    path = attack.file(".pt")
    what = attack.rng.choice(["code", "wide", "old", "cut"])
    path.unlink()
    tensors = {"encoder.weight": torch.zeros(1).expand(1 << 20, 1 << 12), "k": torch.tensor(3)}
    torch.save(
        {"code": RunsCode(), "wide": tensors, "old": {"a": RunsCode()}, "cut": [torch.zeros(8)]}[what],
        path,
        _use_new_zipfile_serialization=what != "old",
    )
    if what == "cut":
        os.truncate(path, path.stat().st_size // 2)
    return f"{attack.short(path)}: {what}"


class RunsCode:
    """Whoever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (RUNS_CODE,)


def reseal(folder: Path) -> None:
    """Make every file of checksums right, so that what they guard is believed."""
    files = {path: path.read_bytes() for path in regular_files(folder)}
    for path in files:
        if path.name.endswith("crc32c.json"):
            with suppress(ManifestError, *MALFORMED):
                named = (path.with_name(name) for name in unseal(files[path], path)["files"])
                overwrite(path, sealed(checksums_of({each.name: files[each] for each in named if each in files})))


def more_journal(attack: Attack) -> str:
    """Lines of a journal stand in that of another writer too, some of them changed; their seals are right."""
    path = attack.file(".jsonl")
    lines, new = path.read_bytes().splitlines(keepends=True), path.with_name(attack.rng.choice(JOURNALS))
    if os.path.lexists(new) or b'"crc32c":"' not in lines[0]:
        raise NothingToChange
    with suppress(ManifestError, *MALFORMED):
        for number in attack.rng.choices(range(len(lines)), k=2):
            values, _ = hostile_values(unseal(lines[number], path), attack.rng)
            lines.insert(attack.rng.randrange(len(lines)), seal(values))
    new.write_bytes(b"".join(lines))
    return attack.short(new)


def overwrite(path: Path, data: bytes) -> None:
    """Replace a file. What it is a link or another name of stays as it is."""
    path.unlink()
    path.write_bytes(data)


def in_place(put: Callable[[Attack, Path], None]) -> Callable[[Attack], str]:
    """The change that removes a file and puts something else there."""

    def change(attack: Attack) -> str:
        path = attack.file()
        aside = attack.world / "before"
        path.rename(aside)  # some changes want what it was
        try:
            put(attack, path)
        except NothingToChange:
            aside.rename(path)
            raise
        aside.unlink(missing_ok=True)
        return attack.short(path)

    return change


def put_new(attack: Attack) -> str:
    """Something with an odd name is there too."""
    path = attack.folder() / attack.rng.choice(NAMES)
    if os.path.lexists(path):
        raise NothingToChange
    put = attack.rng.choice([put_link, put_hard_link, put_pipe, put_folder, put_folder_link, put_copy, put_bytes])
    put(attack, path)
    return f"{attack.short(path)} by {put.__name__}"


def rename(attack: Attack) -> str:
    """A file, or the folder of one, gets an odd name."""
    path = attack.rng.choice([attack.file(), attack.folder()])
    new = path.with_name(attack.rng.choice(NAMES))
    if path == attack.inside or os.path.lexists(new):
        raise NothingToChange
    path.rename(new)
    return f"{attack.short(path)} to {new.name!r:.40}"


def move_out(attack: Attack) -> str:
    """A folder lies outside, whole, and a link leads there."""
    folder = attack.folder()
    outside = attack.world / "elsewhere" / "moved"
    if folder == attack.inside or outside.exists():
        raise NothingToChange
    folder.rename(outside)
    folder.symlink_to(outside)
    return attack.short(folder)


def remove(attack: Attack) -> str:
    path = attack.rng.choice([attack.file(), attack.folder()])
    if path == attack.inside:
        raise NothingToChange
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return attack.short(path)


def swap(attack: Attack) -> str:
    """Two files change places."""
    one, two = attack.file(), attack.file()
    aside = attack.world / "before"
    one.rename(aside)
    if one != two:
        two.rename(one)
    aside.rename(two)
    return f"{attack.short(one)} and {attack.short(two)}"


def put_link(attack: Attack, path: Path) -> None:
    path.symlink_to(
        attack.rng.choice(
            [
                attack.world / "victim",
                os.path.relpath(attack.world / "victim", path.parent),
                attack.world / "nobody",
                path,
                "/dev/zero",
                "/dev/full",
                "/proc/self/mem",
                "/proc/self/cmdline",
            ]
        )
    )


def put_hard_link(attack: Attack, path: Path) -> None:
    os.link(attack.world / "victim", path)


def put_moved(attack: Attack, path: Path) -> None:
    """The file itself, in another folder; a link, or another name of it, is here."""
    outside = attack.world / "elsewhere" / "file"
    if outside.exists():
        raise NothingToChange
    (attack.world / "before").rename(outside)
    attack.rng.choice([path.symlink_to, path.hardlink_to])(outside)


def put_pipe(attack: Attack, path: Path) -> None:
    attack.rng.choice([os.mkfifo, make_socket])(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{here}/.s")  # a whole path, or a long name, may be too long for a socket
            os.rename(".s", path.name, src_dir_fd=here, dst_dir_fd=here)
        finally:
            os.close(here)


def put_hole(attack: Attack, path: Path) -> None:
    before = attack.world / "before"
    with open(path, "wb") as file:
        file.write(before.read_bytes() if attack.rng.random() < 0.5 else b"")
        file.truncate(attack.rng.choice([1 << 28, 1 << 33, LARGE]))


def put_part(attack: Attack, path: Path) -> None:
    data = (attack.world / "before").read_bytes()
    path.write_bytes(data[: attack.rng.randrange(len(data))])


def put_flipped(attack: Attack, path: Path) -> None:
    """The file with one bit changed, or something behind it."""
    data = bytearray((attack.world / "before").read_bytes())
    data[attack.rng.randrange(len(data))] ^= 1 << attack.rng.randrange(8)
    path.write_bytes(data + attack.rng.randbytes(attack.rng.choice([0, 0, 1, 4096])))


def put_bytes(attack: Attack, path: Path) -> None:
    path.write_bytes(attack.rng.randbytes(attack.rng.randrange(5000)))


def put_copy(attack: Attack, path: Path) -> None:
    path.write_bytes(attack.file().read_bytes())


def put_folder(attack: Attack, path: Path) -> None:
    (path / "x").mkdir(parents=True)


def put_folder_link(attack: Attack, path: Path) -> None:
    path.symlink_to(attack.world / "elsewhere")


# what is done, and how often among others; TRUTHFUL changes no seal and no checksum, so that it can be found out
TRUTHFUL: dict[str, Callable[[Attack], str]] = {
    **{put.__name__: in_place(put) for put in (put_link, put_hard_link, put_moved, put_pipe, put_hole, put_part)},
    **{put.__name__: in_place(put) for put in (put_flipped, put_bytes, put_copy, put_folder, put_folder_link)},
    **{change.__name__: change for change in (put_new, rename, move_out, remove, swap)},
}
LIES: dict[str, Callable[[Attack], str]] = {
    change.__name__: change for change in (change_json, change_header, change_yaml, change_pickle, more_journal)
}
