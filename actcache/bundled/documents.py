"""The language model that comes with the package, and the text that comes with every Python.

Neither needs a network. The model is a small GPT-2 trained by `benchmarks/train_demo_model.py`. The text is the
documentation of the standard library of the running Python; its modules are parsed and never imported.
"""

import ast
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

EXCLUDED_FOLDERS = frozenset({"__pycache__", "idlelib", "lib2to3", "test", "tests", "turtledemo"})
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def bundled_model_path() -> Path:
    """The folder of the bundled model: weights (safetensors), config and tokenizer in the layout of transformers."""
    return Path(__file__).parent / "bundled_model"


def standard_library_documents() -> list[str]:
    """The documentation of the running Python, sorted; no document is empty or comes twice.

    There is one document for every language topic of `help()`, and one for every module of the standard library that
    has docstrings. In it, each docstring follows the name (and arguments) of what it describes. The documents are about
    2.1 MB on Python 3.11. Equal Python installations give equal documents.
    """
    documents = {_topic_document(name, text) for name, text in topics.items() if text.strip()}
    return sorted(documents.union(module_documents(Path(os.__file__).parent)))


def module_documents(folder: Path) -> list[str]:
    """One document for each module below `folder` that has docstrings; folders of tests are left out."""
    return list(filter(None, (_module_document(path, folder) for path in sorted(_module_files(folder)))))


def write_documents(path: Path | str) -> Path:
    """Write the standard library's documents as JSON lines with a `text` column; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in standard_library_documents()))
    return path


def _topic_document(name: str, text: str) -> str:
    return f"Topic {name}\n\n{text.strip()}\n"


def _module_files(folder: Path) -> Iterator[Path]:
    """Source files of importable modules; a folder whose name is no identifier, such as `site-packages`, is skipped."""
    for path in folder.iterdir():
        if path.is_dir() and path.name.isidentifier() and path.name not in EXCLUDED_FOLDERS:
            yield from _module_files(path)
        elif path.suffix == ".py" and path.stem.isidentifier():
            yield path


def _module_document(path: Path, stdlib: Path) -> str:
    """Every docstring of one module under its heading, in source order; empty if it has none."""
    parts = path.relative_to(stdlib).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules contain invalid escapes
        module = ast.parse(path.read_bytes())
    sections = list(_sections(module, name, f"Module {name}"))
    return "\n\n".join(sections) + "\n" if sections else ""


def _sections(node: ast.Module | Definition, name: str, heading: str) -> Iterator[str]:
    """Heading and docstring of `node`, then of all classes and functions inside it, in source order."""
    docstring = (ast.get_docstring(node) or "").strip()
    if docstring:
        yield f"{heading}\n\n{docstring}"
    for child in _definitions(node):
        yield from _sections(child, f"{name}.{child.name}", _heading(child, f"{name}.{child.name}"))


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Classes and functions directly under `node`, and those in its `if` and `try` branches."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
