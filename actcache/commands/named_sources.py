"""The models, adapters and datasets that this user has named to actcache, to tell them from those of a stranger.

log/origin.json of a cache says where its model and its dataset were loaded from. A cache may be anybody's, so a command
loads these only if the user named them before, at a harvest, by --model, --adapter or --dataset. The names stand in
files of the user's own, such as actcache/models.jsonl below $XDG_STATE_HOME (XDG Base Directory Specification), which
is ~/.local/state by default.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from actcache.arguments import local_path
from actcache.errors import ManifestError
from actcache.files import contents, make_folder
from actcache.machine.links import own_file

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel

Kind = Literal["model", "adapter", "dataset"]


def note_named(kind: Kind, source: str, revision: str | None) -> None:
    """Note that the user has named a model, an adapter or a dataset.

    Args:
        kind: which of the three.
        source: its hub name, or its path.
        revision: the branch, tag or commit at the hub, as a cache will remember it. Anybody may add one, by asking for
            a change. None for the default, and for a path.

    Where the file cannot be written, nothing is noted: the user will be asked to name it again.
    """
    if not _was_named(kind, source, revision):
        with suppress(OSError, ManifestError):
            make_folder(_file(kind).parent)
            with open(_file(kind), "ab", opener=own_file) as file:
                file.write(_line(source, revision) + b"\n")


def note_model(model: LanguageModel) -> None:
    """Note that the user has named a model that was loaded, and its adapter."""
    note_named("model", model.source, model.identity["revision"])
    if model.adapter is not None:
        note_named("adapter", model.adapter.source, model.adapter.revision)


def refuse_unnamed(kind: Kind, source: str, revision: str | None, cache: Path) -> None:
    """Raise ManifestError unless the user has named this source before. cache: what names it here."""
    if not _was_named(kind, source, revision):
        at = f" at revision {revision}" if revision else ""
        raise ManifestError(
            f"{cache}: names the {kind} {source}{at}, which you have not named to actcache yet; if you trust it, "
            f"pass --{kind} {source}"
        )


def _was_named(kind: Kind, source: str, revision: str | None) -> bool:
    try:
        return _line(source, revision) in contents(_file(kind)).splitlines()
    except (OSError, ManifestError):
        return False


def _line(source: str, revision: str | None) -> bytes:
    name = os.path.abspath(source) if os.path.exists(source) else source
    return json.dumps(name if revision is None else [name, revision]).encode()


def _file(kind: Kind) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return local_path(state) / "actcache" / f"{kind}s.jsonl"
