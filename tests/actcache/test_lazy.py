import importlib
import subprocess
import sys

import pytest
from support.places import CHILD


def test_reading_imports_no_language_model():
    code = "import sys, actcache; actcache.Loader; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_name_is_imported_when_it_is_asked_for():
    code = """
import sys
from actcache.lazy import lazily
ask = lazily("p", {"Decimal": "decimal"})
assert "decimal" not in sys.modules
print(ask("Decimal") is sys.modules["decimal"].Decimal)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("package", ["actcache", "trainer"])
def test_every_public_name_is_there_and_no_other(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Lodaer'"):
        _ = module.Lodaer
