"""`content_hash`: a sha256 of all bytes of a file or a folder, remembered for as long as nothing there changes.

The hashes of this user's datasets stand in actcache/content_hashes.jsonl below $XDG_CACHE_HOME (XDG Base Directory
Specification), which is ~/.cache by default. What is remembered holds while every file has the same size, inode, time
of its content and time of its status. A tool can set the time of the content, as `cp -p` and `tar` do, but nobody can
set the time of the status.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from actcache.arguments import local_path
from actcache.errors import ManifestError
from actcache.files import contents, make_folder, write_atomically

BLOCK_BYTES = 1 << 20
REMEMBERED = 1000  # datasets
SETTLED_SECONDS = 2.0  # a file that changed later than this may change again within one tick of its file system's clock


def content_hash(path: Path) -> str:
    """sha256 of the names, sizes and bytes of a file, or of all files below a folder. Raises OSError."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    name, now, (state, latest) = os.path.abspath(path), time.time(), _state(files)
    if (known := _remembered().get(name)) and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.path.relpath(file, path)}:{file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
    if latest < now - SETTLED_SECONDS and _state(files)[0] == state:
        _remember(name, state, digest.hexdigest())
    return digest.hexdigest()


def _state(files: list[Path]) -> tuple[str, float]:
    """A hash of what changes with the bytes of the files, and when the last of them changed, in seconds."""
    digest, latest = hashlib.sha256(), 0
    for file in files:
        found = file.stat()
        values = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(f"{os.path.abspath(file)}\0{values}\n".encode("utf-8", "surrogateescape"))
        latest = max(latest, found.st_ctime_ns)
    return digest.hexdigest(), latest / 1e9


def _remembered() -> dict[str, tuple[str, str]]:
    """(state, hash) of each path, the oldest first. What cannot be read is not remembered."""
    found: dict[str, tuple[str, str]] = {}
    with suppress(OSError, ManifestError, ValueError, TypeError):
        for line in contents(_file()).splitlines():
            path, state, content = json.loads(line)
            if isinstance(path, str) and isinstance(state, str) and isinstance(content, str) and len(content) == 64:
                found[path] = (state, content)
    return found


def _remember(name: str, state: str, content: str) -> None:
    """Write the hash beside the others. Where the file cannot be written, it is computed again the next time."""
    found = {each: value for each, value in _remembered().items() if each != name} | {name: (state, content)}
    lines = [f"{json.dumps([each, *value])}\n".encode() for each, value in [*found.items()][-REMEMBERED:]]
    with suppress(OSError, ManifestError):
        make_folder(_file().parent)
        write_atomically(_file(), lines)


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return local_path(cache) / "actcache" / "content_hashes.jsonl"
