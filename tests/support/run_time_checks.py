"""The checks of annotations at run time, made cheaper: every function of the packages is checked, at every call.

jaxtyping's decorator spends 30 microseconds on each call, for the sizes of the axes that annotations name. Most
functions name none: for those, beartype's check alone says the same, and sooner.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf
from jaxtyping import AbstractArray, _decorator

AS_JAXTYPING = BeartypeConf(violation_type=jaxtyping.TypeCheckError)  # a TypeError, as readers of files expect
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
    given = fn.__annotations__
    hints = {name: _decorator._destring_annotation(hint, fn.__globals__) for name, hint in given.items()}
    if inspect.isgeneratorfunction(fn) or any(map(_names_axes, hints.values())):
        return _of_jaxtyping(fn, typechecker=typechecker)
    fn.__annotations__ = hints  # as jaxtyping reads them: Any is what is imported for type checkers alone
    checked = typechecker(fn, conf=AS_JAXTYPING)
    fn.__annotations__ = given

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return (fn if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return wrapped


def _names_axes(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_names_axes, typing.get_args(hint)))
