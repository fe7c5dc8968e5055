"""The models that this user has named to actcache, by which a model that only a cache names is told from a stranger's.

log/origin.json of a cache says where its model was loaded from. A cache may be anybody's, so a command loads that model
only if the user named it before, at a harvest or by --model. The names stand in a file of the user's own,
actcache/models.jsonl below $XDG_STATE_HOME (XDG Base Directory Specification), which is ~/.local/state by default.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from actcache.arguments import local_path
from actcache.errors import ManifestError
from actcache.files import contents, make_folder
from actcache.machine.links import own_file


def note_named(source: str) -> None:
    """Note that the user has named a model. source: its hub name, or the path of its directory.

    Where the file cannot be written, nothing is noted: the user will be asked to name the model again.
    """
    if not was_named(source):
        with suppress(OSError, ManifestError):
            make_folder(_file().parent)
            with open(_file(), "ab", opener=own_file) as file:
                file.write(_line(source) + b"\n")


def was_named(source: str) -> bool:
    """Whether the user has named the model before."""
    try:
        return _line(source) in contents(_file()).splitlines()
    except (OSError, ManifestError):
        return False


def _line(source: str) -> bytes:
    return json.dumps(os.path.abspath(source) if os.path.isdir(source) else source).encode()


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return local_path(state) / "actcache" / "models.jsonl"
