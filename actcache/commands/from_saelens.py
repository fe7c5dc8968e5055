"""`--from-saelens`: the table of a config's fields, and the options of a harvest that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.arguments import shown
from actcache.commands.terminal import say

if TYPE_CHECKING:
    from actcache.interop.saelens_config import Row

WIDEST = 48  # letters of a cell


def options_of_saelens(context: Any, path: Path | None) -> Path | None:
    """Make the options that FILE says the defaults of this command, and say what becomes of each field.

    So what is given on the command line wins. FILE is read before the other options are looked at.

    Args:
        context: typer's, of this call.
        path: FILE, if it was given.
    """
    if path is not None:
        from actcache.interop.saelens_config import read_saelens_config
        from actcache.interop.saelens_harvest import harvest_options

        config = read_saelens_config(path)
        say(*row_lines(config.rows("harvest")))
        context.default_map = harvest_options(config)
    return path


def row_lines(rows: Sequence[Row]) -> list[str]:
    """A table of what becomes of each field: its value, the verdict, and the words."""
    cells = [("field", "value", "", "here")]
    cells += [(_cut(row.field), _value(row), row.verdict, row.here) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    return ["  ".join([*(text.ljust(w) for text, w in zip(line, widths, strict=False)), line[3]]) for line in cells]


def _value(row: Row) -> str:
    text = _cut(row.value if isinstance(row.value, str) else shown(row.value))
    return text if row.is_given else f"{text} (default)"


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
