"""`no_installs`: inside it, nothing that the program calls may install software.

Some libraries run pip when they miss a package. That may change the versions of others, torch among them.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("actcache")

_MANAGERS = r"pip[\d.]*|pipx|uv|conda|mamba|micromamba|pixi|poetry|pdm|apt|apt-get|dnf|yum|apk|brew|npm"
_VERBS = r"install|uninstall|add|remove|sync|update|upgrade|create"
_INSTALLS = re.compile(  # over the whole command, because a shell or `python -c` holds another command in one word
    rf"(?:^|[\s/\\'\"(;&|]|-m)(?:(?:{_MANAGERS})(?:\.exe)?(?![\w/\\-]).*?[\s'\"](?:{_VERBS})(?![\w/.=-])"
    r"|(?:ensurepip|easy_install|uvx)(?![\w/\\-])|(?:uv|pipx)\s+(?:tool\s+)?run\s|setup\.py['\"]?\s+(?:install|develop)\b)",
    re.DOTALL,
)
_STARTS = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"})  # the last has no arguments[1]
_IN_PROCESS = ("pip._internal.commands.install", "pip._internal.commands.uninstall")  # what pip as a library imports
_IN_PROCESS_FILES = tuple(f"{module.replace('.', os.sep)}.py" for module in _IN_PROCESS)

_lock = threading.Lock()
_running: list[tuple[str, list[str]]] = []  # a library and what it was refused, for each block that runs now
_hooked = False


@contextmanager
def no_installs(library: str) -> Iterator[None]:
    """While the block runs, every attempt of this process to install or remove software raises PermissionError.

    pip, uv, conda and other package managers are known, started by any function of Python or called as a library. Other
    programs start as ever. All threads are meant, because a library may have threads of its own. Where the library
    swallows the error and goes on without the package, a line of the log says what it wanted.

    Args:
        library: whose calls are in the block, for the messages.
    """
    block: tuple[str, list[str]] = (library, [])
    with _lock:
        _add_hook()
        for module in _IN_PROCESS:
            sys.modules.pop(module, None)  # so that pip imports it again, which runs its file
        _running.append(block)
    try:
        yield
    finally:
        with _lock:
            _running[:] = [other for other in _running if other is not block]
        for message in dict.fromkeys(block[1]):
            logger.warning(message)


def _add_hook() -> None:
    """Begin to watch this process. A hook of Python cannot be taken away, so it does nothing between blocks."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_refuse)
        _hooked = True


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Raise PermissionError if an event of Python's audit begins to install or to remove software."""
    if not _running:
        return
    if event in _STARTS:
        command = _installing(arguments[0], arguments[:2][-1])
    elif event == "exec":  # of a module's code; importlib tells no event "import"
        file = str(getattr(arguments[0], "co_filename", ""))
        command = f"pip {Path(file).stem}" if file.endswith(_IN_PROCESS_FILES) else None
    else:
        return
    for library, refused in _running[-1:] if command else ():
        refused.append(
            f"{library} wanted to run `{command}`; nothing was installed, because actcache lets no library change the "
            "environment; run it yourself if you want the package"
        )
        raise PermissionError(refused[-1])


def _installing(program: object, command: object) -> str | None:
    """The command as one line if it installs or removes software, else None. command: one string, or a list of words.

    The first word of a list may be any name, so the program that is really started is looked at too.
    """
    if not isinstance(command, list | tuple):
        line = _text(command)
        return line if _INSTALLS.search(line) else None
    words = [_text(word) for word in command]
    lines = shlex.join(words), shlex.join([_text(program), *words[1:]])
    return lines[0] if any(map(_INSTALLS.search, lines)) else None


def _text(word: object) -> str:
    return os.fsdecode(word) if isinstance(word, str | bytes | os.PathLike) else str(word)
