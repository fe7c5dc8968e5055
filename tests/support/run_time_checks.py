"""The checks of annotations at run time, made cheaper: every function of the packages is checked, at every call.

jaxtyping's decorator spends 30 microseconds on each call, for the sizes of the axes that annotations name. Most
functions name none: for those, beartype's check alone says the same, in 1 microsecond. And a check is made when its
function is first called, for a process of the tests calls a part of them alone.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from jaxtyping import AbstractArray, _decorator

_of_jaxtyping = _decorator.jaxtyped


def install() -> None:
    """From now on jaxtyping's import hook decorates functions so."""
    jaxtyping.jaxtyped = _decorator.jaxtyped = _jaxtyped


def _jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """As `jaxtyping.jaxtyped`, which comes back here with the functions of a class, a property and the like."""
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if not inspect.isfunction(fn):
        return _of_jaxtyping(fn, typechecker=typechecker)
    checked, hints = None, _hints(fn)  # read now: later a test may have put something else under a name

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if checked is None:
            checked = fn  # until there is one: its own making may call it, if it is an audit hook
            checked = _checked(fn, hints, typechecker)
        return checked(*args, **kwargs)

    return wrapped


def _hints(fn: Any) -> dict[str, Any]:
    """As jaxtyping reads them: Any stands for what is imported for type checkers alone, or comes further down."""
    return {name: _decorator._destring_annotation(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}


def _checked(fn: Any, hints: dict[str, Any], typechecker: Callable[[Any], Any]) -> Any:
    given, fn.__annotations__ = fn.__annotations__, hints
    try:
        if inspect.isgeneratorfunction(fn) or any(map(_names_axes, hints.values())):
            return _of_jaxtyping(fn, typechecker=typechecker)
        return typechecker(fn)
    finally:
        fn.__annotations__ = given


def _names_axes(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_names_axes, typing.get_args(hint)))
