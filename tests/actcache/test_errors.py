import inspect
import re

import pytest

from actcache import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def test_the_tree_at_the_top_says_what_each_class_says():
    """A reader sees the whole tree in the docstring; the indented ones are below ActcacheError."""
    _, tree = errors.__doc__.split("\n\n")
    lines = re.findall(r"^(  )?(\w+) +(.+)$", tree, flags=re.MULTILINE)
    told = {name: (bool(indent), text) for indent, name, text in lines}
    assert told.keys() == CLASSES.keys()
    for name, (is_below, _) in told.items():
        assert is_below == (CLASSES[name].__base__ is errors.ActcacheError), name
    for name in told.keys() - {"ActcacheError", "ConfigError"}:
        first_line = CLASSES[name].__doc__.splitlines()[0]
        assert told[name][1].replace(",", "").lower() == first_line.rstrip(".").replace(",", "").lower()


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_on_disk_and_what_the_caller_asked_are_told_apart(name):
    """A wrong argument is a ValueError as anywhere in Python; nothing else here is one."""
    assert issubclass(CLASSES[name], ValueError) == (name == "ConfigError")
    assert issubclass(CLASSES[name], errors.ActcacheError) == (name != "ConfigError")
    assert str(CLASSES[name]("who: rule, got; way out")) == "who: rule, got; way out"
