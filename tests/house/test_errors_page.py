"""docs/reference/errors.md holds every class of error, and quotes only messages that the program still says."""

import ast
import builtins
import re

import pytest
from support.places import ROOT

PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text()
PACKAGES = [ROOT / "actcache", ROOT / "trainer"]
SOURCES = [ROOT / "cli.py", *(path for package in PACKAGES for path in sorted(package.rglob("*.py")))]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def first_cells(title: str) -> list[str]:
    """The code span that each row begins with, of every table whose first column has this title."""
    tables = re.findall(rf"^\| {title} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [re.match(r"\| `([^`]+)` \|", row)[1] for table in tables for row in table.splitlines()]


def raised_classes() -> set[str]:
    """The public exception classes that the packages define, and Python's own that they raise by name."""
    nodes = [node for path, tree in TREES.items() if path.parent != ROOT for node in ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base).split(".")[-1] for base in node.bases] for node in classes}

    def is_exception(name: str) -> bool:
        return is_builtin_exception(name) or any(map(is_exception, bases.get(name, [])))

    raised = {
        node.exc.func.id if isinstance(node.exc, ast.Call) else node.exc.id
        for node in nodes
        if isinstance(node, ast.Raise) and isinstance(getattr(node.exc, "func", node.exc), ast.Name)
    }
    public = {name for name in bases if not name.startswith("_")}  # a private class never leaves its module
    return {name for name in public if is_exception(name)} | {name for name in raised if is_builtin_exception(name)}


def is_builtin_exception(name: str) -> bool:
    """Whether Python has an exception of this name."""
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


def constant(text: str) -> str:
    """A message with `{}` in place of everything that a value is put into, by an f-string or by logging."""
    return re.sub(r"\{[^{}]*\}|%[.\d]*[sdfg]", "{}", text)


def template(node: ast.AST) -> str | None:
    """What a string literal or an f-string says, its values left out."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def said(tree: ast.Module) -> list[str]:
    """Every string of a module but its docstrings, as `constant` leaves it."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for node in ast.walk(tree) if id(node) not in docstrings]
    return [constant(text) for text in map(template, nodes) if text]


TEMPLATES = "\n".join(text for tree in TREES.values() for text in said(tree))
MESSAGES = first_cells("message")


def test_every_class_is_on_the_page_once():
    assert sorted(first_cells("class")) == sorted(raised_classes())


def test_the_classes_of_the_error_tree_are_found():
    from actcache import errors

    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree <= raised_classes()


def test_no_message_is_quoted_twice():
    assert len(MESSAGES) == len(set(MESSAGES)) > 100


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_source(message):
    assert len(re.sub(r"\{\}|\W", "", constant(message))) >= 5, "says too little to be looked for"
    assert constant(message) in TEMPLATES
