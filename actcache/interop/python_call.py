"""`read_calls`: the calls of config classes in a Python text, as mappings. The text is read, and never run.

It may be a stranger's. So its size, its nesting, its numbers and the number of its values are bounded.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from actcache.arguments import shown
from actcache.errors import ConfigError

MAX_CHARACTERS, MAX_DEPTH, MAX_EXPONENT, MAX_NUMBER = 100_000, 40, 64, 1 << 63
CLASS = "__class__"  # the key under which a mapping says which class was called

Number = int | float


@dataclass(frozen=True, slots=True)
class Unread:
    """An expression that is more than literals and arithmetic, such as a call of a function. text: as it stands."""

    text: str

    def __repr__(self) -> str:
        return self.text


def read_calls(who: str, text: str, classes: Collection[str]) -> list[dict[str, Any]]:
    """The arguments of each call of one of the classes, in the order of the text.

    Values are literals, lists, tuples and dicts of them, arithmetic on numbers, `int` of a number, calls of `dict` and
    of a class that ends in Config (a mapping again, with the class under CLASS), and names that the text gave such a
    value before. Anything else is an Unread. What stands without a name is under the key "*".

    Args:
        who: where the text comes from, for messages.
        text: of a Python file.
        classes: names of classes.

    Raises:
        ConfigError: it is no Python within the bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{who}: must have at most {MAX_CHARACTERS:,} characters; leave the config alone in it")
    try:
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.Call)]
        nodes.sort(key=lambda node: (node.lineno, node.col_offset))
        reader, found = _Reader(), []
        for node in nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                reader.known[node.targets[0].id] = reader.value(node.value)
            elif isinstance(node, ast.Call) and _called(node) in classes:
                found.append(reader.arguments(node, 0))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the parser's own bounds among them
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{who}: is not Python{where}: {' '.join(str(error).split()) or 'too deep'}") from None
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


class _Reader:
    """Gives the values of expressions. known: the names that were given a value so far."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """What an expression stands for, or an Unread of it."""
        value = self._value(node, depth + 1) if depth < MAX_DEPTH else None
        return Unread(shown_source(node)) if value is None else value[0]

    def arguments(self, node: ast.Call, depth: int) -> dict[str, Any]:
        """What is given by name, and the class that is called."""
        given = {each.arg or "*": self.value(each.value, depth) if each.arg else Unread("**") for each in node.keywords}
        return {CLASS: _called(node)} | given | ({"*": Unread(shown_source(node.args[0]))} if node.args else {})

    def _value(self, node: ast.expr, depth: int) -> tuple[Any] | None:
        """(value,), or None if this is nothing that is read."""
        match node:
            case ast.Constant(value=bool() | str() | None as value):
                return (value,)
            case ast.Constant(value=int() | float() as value):
                return _bounded(value)
            case ast.Name(id=name) if name in self.known:
                return (self.known[name],)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
                return (f"torch.{attr}",)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                items = [self.value(each, depth) for each in elements]
                return (items if isinstance(node, ast.List) else tuple(items),)
            case ast.Dict(keys=keys) if all(isinstance(key, ast.Constant) for key in keys):
                names = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
                return (dict(zip(names, (self.value(each, depth) for each in node.values), strict=True)),)
            case ast.Call(func=ast.Name(id="int"), args=[operand], keywords=[]):
                return self._computed(int, (operand,), depth)
            case ast.Call() if _called(node) == "dict" or _called(node).endswith("Config"):
                given = self.arguments(node, depth)
                return (given if given[CLASS] != "dict" else {name: v for name, v in given.items() if name != CLASS},)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                return self._computed(operator.neg if isinstance(sign, ast.USub) else operator.pos, (operand,), depth)
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                return self._computed(_ARITHMETIC[type(op)], (left, right), depth)
        return None

    def _computed(self, compute: Callable[..., Any], nodes: tuple[ast.expr, ...], depth: int) -> tuple[Any] | None:
        values = [self.value(each, depth) for each in nodes]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in values):
            return None
        try:
            return _bounded(compute(*values))
        except (ArithmeticError, ValueError):  # a division by zero, and what is too large
            return None


def _power(base: Number, exponent: Number) -> Number:
    """NaN, which `_bounded` refuses, where it would be too large or complex."""
    if abs(exponent) > MAX_EXPONENT or (base < 0 and exponent % 1):
        return math.nan
    return base**exponent


_ARITHMETIC: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _bounded(value: object) -> tuple[Number] | None:
    """(value,) of a real number that is finite and, if whole, of 64 bits; None of any other value."""
    if isinstance(value, float):
        return (value,) if math.isfinite(value) else None
    return (value,) if isinstance(value, int) and -MAX_NUMBER <= value < MAX_NUMBER else None


def shown_source(node: ast.expr) -> str:
    """An expression as a message shows it: cut where it is long or deep."""
    try:
        text = ast.unparse(node)
    except (RecursionError, ValueError):
        return "..."
    return text if len(text) <= 60 else re.sub(r"\s+", " ", shown(text)[1:60]) + "..."
