"""A module's test is found by its path: tests/actcache/store/test_reader.py tests actcache/store/reader.py."""

import ast
from pathlib import Path

import pytest
from support.places import ROOT

PACKAGES = ("actcache", "trainer")
LONG = 60  # lines; a shorter module without a function or class has nothing to test
# Test files that mirror no module, and why.
ACROSS = {
    "actcache/harvesting/test_memory.py": "the memory of a whole harvest, measured in a process of its own",
    "actcache/loading/test_loader_consumers.py": "a torch DataLoader and SAELens over our loader",
    "trainer/evaluation/test_evaluate_saelens.py": "our metrics against SAELens' own evaluation of the same SAEs",
    "trainer/formats/test_first_day.py": "the first day of a SAELens user, in SAELens' words",
    "trainer/formats/test_saelens_classes.py": "an SAE of each class of SAELens: read, encoded, spliced into models",
    "trainer/formats/test_saelens_in_a_model.py": "exported SAEs at work in SAELens' own model",
    "trainer/kernels/test_waits.py": "no step on CUDA waits for the device: kernels, sae and training together",
    "trainer/report/test_browser.py": "the pages that a report is, in a browser",
}
TESTS = ROOT / "tests"


def mirrored(module: Path) -> str:
    """The path, below tests, of the test of a module."""
    inside = module.relative_to(ROOT)
    return str(inside.with_name(f"test_{inside.name}"))


def needs_a_test(module: Path) -> bool:
    text = module.read_text()
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(text)))
    return module.name != "__init__.py" and (defines or len(text.splitlines()) > LONG)


MODULES = sorted(module for package in PACKAGES for module in (ROOT / package).rglob("*.py"))
TEST_FILES = sorted(
    str(path.relative_to(TESTS)) for package in PACKAGES for path in (TESTS / package).rglob("test_*.py")
)


@pytest.mark.parametrize("module", [module for module in MODULES if needs_a_test(module)], ids=mirrored)
def test_every_module_has_its_test(module):
    path = TESTS / mirrored(module)
    assert path.is_file(), f"{module.relative_to(ROOT)} has no tests/{mirrored(module)}"
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert any(name.startswith("test_") for name in names), f"tests/{mirrored(module)} holds no test"


@pytest.mark.parametrize("path", TEST_FILES)
def test_every_test_file_mirrors_a_module_or_says_why_not(path):
    mirrors = path in {mirrored(module) for module in MODULES}
    assert mirrors != (path in ACROSS), f"tests/{path}: is of no module; move its tests, or say in ACROSS why it stands"


def test_what_goes_across_modules_is_still_there():
    assert {*ACROSS} <= {*TEST_FILES}
