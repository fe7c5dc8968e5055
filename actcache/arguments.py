"""Checks of what a caller gives: types, numbers, names, devices and paths. Their errors are ConfigError.

A wrong type is refused here, because it would be a TypeError of some line deep inside, or be taken for another value:
True for 1, 1.5 for a seed, the letters of a word for a list of names.
"""

from __future__ import annotations

import functools
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actcache.errors import ConfigError

if TYPE_CHECKING:
    import torch


ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[:/]")  # s3://; a Path of it has one slash; fsspec chains with ::
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 40


def shown(value: object) -> str:
    """A value as a message shows it: what `repr` gives, cut where it is long, for it may be a stranger's."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write a number of more than 4,300 digits
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"


def typed(who: str, name: str, value: object, kind: Any) -> Any:
    """`value` as a setting of type `kind`.

    Args:
        who, name: whose setting it is and what it is called, for the message.
        value: what the caller gave. An int is taken for a float, a number of numpy for one of Python, a path for a str,
            and a list for a tuple. A bool is no number.
        kind: a class, a Literal of str, Sequence[...], tuple[..., ...], or one of these `| None`.

    Raises:
        ConfigError: `value` is of another type.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) or _is_optional(kind) else (kind,)
    if value is None and type(None) in options:
        return None
    accepted = next(option for option in options if option is not type(None))
    if typing.get_origin(accepted) in (Sequence, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{who}: {name} must be a list, got {shown(value)} ({type(value).__name__})")
        return tuple(typed(who, name, each, typing.get_args(accepted)[0]) for each in value)
    accepted = str if typing.get_origin(accepted) is Literal else typing.get_origin(accepted) or accepted
    if isinstance(value, bool) == (accepted is bool):
        if accepted is int and isinstance(value, Integral):
            return int(value)
        if accepted is float and isinstance(value, Real):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{who}: {name} must be at most 1.8e308, got {shown(value)}") from None
        if accepted is str and isinstance(value, str | os.PathLike):
            return os.fspath(value)
        if isinstance(value, accepted):
            return value
    raise ConfigError(f"{who}: {name} must be {accepted.__name__}, got {shown(value)} ({type(value).__name__})")


def type_fields_(who: str, config: Any) -> None:
    """Give every field of a frozen dataclass its type, as `typed` does. Raises ConfigError for another type."""
    for name, kind in field_types(type(config)).items():
        object.__setattr__(config, name, typed(who, name, getattr(config, name), kind))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass that its constructor takes."""
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init or each.default is not MISSING}


def whole_number(who: str, name: str, value: object, lowest: int = 0, highest: int | None = None) -> int:
    """`value` as an int in [lowest, highest], both included. Raises ConfigError."""
    number = typed(who, name, value, int)
    if number < lowest or (highest is not None and number > highest):
        must = f"at least {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ConfigError(f"{who}: {name} must be {must}, got {shown(value)}")
    return number


def one_of(who: str, name: str, value: object, allowed: Iterable[str]) -> str:
    """`value` as one of the allowed words. Raises ConfigError."""
    words = tuple(allowed)
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{who}: {name} must be one of {', '.join(words)}, got {shown(value)}")
    return value


def names(who: str, name: str, value: object) -> tuple[str, ...]:
    """One name, or a list of names, as a tuple. Raises ConfigError."""
    return (value,) if isinstance(value, str) else typed(who, name, value, tuple[str, ...])


def device_of(who: str, device: object) -> torch.device:
    """The device of that name; "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ConfigError: it is no device, of a kind that is not supported, or not in this machine.
    """
    import torch  # takes seconds, and `actcache --help` must not wait for it

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None:
        raise ConfigError(f"{who}: device must be auto, cpu, cuda or cuda:0, cuda:1, ..., got {device!r}")
    asked = str(device)
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{who}: device must be cpu or cuda, got {asked!r}; nothing here runs on {found.type}; pass cpu"
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{who}: device {asked!r} asked for, torch sees no CUDA device; pass auto or cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        last = f"cuda:{torch.cuda.device_count() - 1}"
        raise ConfigError(f"{who}: device {asked!r} asked for, the last one here is {last!r}; pass that, or another")
    return found


def _is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def local_path(path: str | Path) -> Path:
    """The path of a file or folder, with "~" expanded. Where it leads through links it is the path without them.

    So the user's own links are followed here, once. Below the path none is followed (`actcache.machine.links`).

    Raises ConfigError for an address such as s3://bucket/cache.
    """
    refuse_address(path, "a path of this machine")
    found = Path(os.path.expanduser(path))
    return Path(os.path.realpath(found)) if any(map(os.path.islink, (found, *found.parents))) else found


def refuse_address(name: str | Path, instead: str) -> None:
    """Raise ConfigError for an address, which as a path would be a folder of the name "s3:".

    instead: what the caller should pass, for the message.
    """
    if ADDRESS.match(str(name)):
        raise ConfigError(f"{name}: no address is read or written; mount or copy what is there, and pass {instead}")


def can_only_be_a_path(name: str, suffixes: Collection[str]) -> bool:
    """Whether a name cannot be one of the hub, owner/name. suffixes: of the files that such a path may have."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in suffixes


def missing_here(name: str) -> str:
    """What to say first when the hub has no owner/name: that a folder called owner is here and lacks it; else ""."""
    owner = os.path.dirname(name)
    return f"the folder {owner} is here and lacks it; the hub: " if owner and os.path.isdir(owner) else ""
