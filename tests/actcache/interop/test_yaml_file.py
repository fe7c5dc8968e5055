"""A sweep file of a stranger: aliases, nesting, digits, grids and sizes are bounded."""

import itertools
import os
import time
from pathlib import Path

import pytest

from actcache.errors import ConfigError
from trainer.config.sweep import SweepConfig

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LAUGHS}base: {{lr: *i}}", r"its aliases must come to at most 100,000 values"),
        ("base: &b {lr: *b}", r"at most 100,000 values, and to none that holds itself"),
        ("base: " + "[" * 20_000, r"is not YAML: .*recursion"),
        ("base: {d_sae: " + "9" * 5_000 + "}", r"is not YAML: Exceeds the limit"),
        (
            "grid: {" + ", ".join(f"k{i}: [{', '.join(map(str, range(100)))}]" for i in range(6)) + "}",
            r"at most 10,000 runs",
        ),
        ("base: {lr: [" + "x, " * 50_000 + "]}", r"lr must be float, got \['x', 'x', .*\.\.\.\]"),
        ("base: {lr: " + "x" * 500_000 + "}", r"lr must be float, got 'x+\.\.\.x+' \(str\)"),
        ("x" * (1 << 20) + "y", r"must have at most 1,048,576 bytes"),
        ("".join(f"k{i}: 1\n" for i in range(40_000)), r"unknown setting 'k0'"),
        ("base: {? [1] : 2}", r"is not YAML"),
        ('base: {k: !!int ""}', r"is not YAML: tag 'tag:yaml.org,2002:int': leave it out"),
        ("base: {lr: !!bool abc}", r"is not YAML: tag"),
        ("base: {lr: !!timestamp abc}", r"is not YAML: tag"),
        ("base: !!set {a, b}", r"is not YAML: tag"),
        ("base: ! x", r"is not YAML: tag '!'"),
        ("base: {lr: " + "1:" * 400 + "1.5}", r"lr must be float, got '1:1"),
        ("base: {k: 1" + ":1" * 200_000 + "}", r"k must be int, got '1:1"),
        ("base: {lr: 1" + "0" * 400 + "}", r"a whole number must be in \[-2\*\*63, 2\*\*63\), got '1000"),
        ("base: {d_sae: 0x" + "f" * 20_000 + "}", r"a whole number must be in"),
        ("seed: -0x" + "f" * 20_000, r"a whole number must be in"),
        (f"base: {{hook_names: [{'x, ' * 2000}]}}\ngrid: {{k: [{'1, ' * 1000}]}}", r"at most 1,000,000 values"),
        (
            f"base: {{{''.join(f'k{i}: 1, ' for i in range(30_000))}}}\nruns: [{'{}, ' * 9000}]",
            r"at most 1,000,000 values",
        ),
        (
            f"grid: {{k: [{'1, ' * 1000}], hook_names: [[{'x, ' * 2000}]]}}",
            r"its runs must hold at most 1,000,000 values, they hold 2,004,001",
        ),
        (f"base: {{lr: {'x' * 1000}, {'k' * 1000}: 2}}", r"unknown setting 'k+\.\.\.k+'"),
    ],
    ids=[
        "aliases",
        "itself",
        "nested",
        "digits",
        "grid",
        "long list",
        "long text",
        "long file",
        "many keys",
        "list as key",
        "tag of an int",
        "tag of a bool",
        "tag of a time",
        "tag of a set",
        "tag of nothing",
        "base 60",
        "long base 60",
        "long number",
        "long hexadecimal",
        "long negative",
        "long base and grid",
        "wide base and runs",
        "long grid",
        "long key",
    ],
)
def test_a_file_of_a_stranger_is_one_short_line_soon(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=message) as raised:
        SweepConfig.from_yaml(path)
    assert len(str(raised.value)) < 1000
    assert time.process_time() - began < 30, "it took for ever before"


def test_a_sweep_file_that_is_a_pipe_or_a_device_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read"):
            SweepConfig.from_yaml(path)
