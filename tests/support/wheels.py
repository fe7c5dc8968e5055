"""A tiny package that pip can install without a network, and a place of its own for pip to install it to."""

import zipfile
from pathlib import Path

import pytest


def offer_wheel(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make `pip install NAME`, run by this process or its children, work; returns the folder that it installs to."""
    about = f"{name}-0.1.dist-info"
    wheel = folder / f"{name}-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    target = folder / "installed"
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))
    patch.setenv("PIP_TARGET", str(target))
    return target
