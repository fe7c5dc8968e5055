"""Python text of a stranger is read and never run: its values, and its bounds."""

import time

import pytest

from actcache.errors import ConfigError
from actcache.interop.python_call import CLASS, Unread, read_calls, shown_source


def arguments(inside: str, before: str = "") -> dict:
    (call,) = read_calls("f.py", f"{before}\nimport x\ncfg = x.RunnerConfig({inside})", ["RunnerConfig"])
    assert call.pop(CLASS) == "RunnerConfig"
    return call


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "768*8",
            "100_000_000",
            "4e-4",
            "-2**3",
            "7 // 2 + 7 % 4",
            "1 / 8",
            "+3",
            "True",
            "None",
            "'a' 'b'",
            "0.5**2",
        ),
        *("[1, (2, None)]", "int(0.2 * 5e3)", "{'k': 3, 'w': [1.5]}", "()", "dict(k=4)", "2**62 - 1 + 2**62"),
    ],
)
def test_a_literal_is_what_python_makes_of_it(expression):
    (value,) = arguments(f"a={expression}").values()
    assert value == eval(expression)
    assert type(value) is type(eval(expression))


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "open('x')",
            "device",
            "[0] * 3",
            "'a' * 3",
            "2**64",
            "9**9**9",
            "1 / 0",
            "1e999",
            "0 * 1e999",
            "f'{1}'",
            "b'a'",
        ),
        *(
            "x[0]",
            "1 if True else 2",
            "not True",
            "True + 1",
            "(-8) ** 0.5",
            "int('3')",
            "int(2.5, 3)",
            "lambda: 1",
            "{**b}",
            "10**100 * 0.1",
        ),
    ],
)
def test_anything_else_is_kept_as_text_alone(expression):
    value = arguments(f"a={expression}")["a"]
    assert isinstance(value, Unread)
    assert repr(value) == shown_source(__import__("ast").parse(expression, mode="eval").body)


def test_nothing_of_the_text_is_run(tmp_path):
    mark = tmp_path / "ran"
    assert isinstance(arguments(f"a=open({str(mark)!r}, 'w')", before=f"open({str(mark)!r}, 'w')")["a"], Unread)
    assert not mark.exists()


def test_names_have_the_value_that_the_text_gave_them_last():
    before = "steps = 30_000\nbatch = 4096\ntotal = steps * batch\nbatch = 1\nunread = f(batch)\nbatch = unread"
    given = arguments("a=total, b=batch, c=steps // 5, d=later", before=before)
    assert given["a"] == 30_000 * 4096
    assert given["c"] == 6_000
    assert given["b"] == Unread("f(batch)")
    assert given["d"] == Unread("later")


def test_configs_inside_are_mappings_that_say_their_class():
    given = arguments("sae=s.TopKConfig(d_sae=2*3), 5, **more, dtype=torch.float32".replace("5, ", ""))
    assert given == {"sae": {CLASS: "TopKConfig", "d_sae": 6}, "*": Unread("**"), "dtype": "torch.float32"}
    assert arguments("5")["*"] == Unread("5")


HOSTILE = {
    "signs": "x = " + "-" * 90_000 + "1",
    "parentheses": "x = " + "(" * 40_000 + ")" * 40_000,
    "sum": "x = " + "1+" * 45_000 + "1",
    "attributes": "x = a" + ".b" * 45_000,
    "subscripts": "x = a" + "[0]" * 30_000,
    "lambdas": "x = " + "lambda:" * 10_000 + "1",
    "digits": "x = " + "9" * 5_000,
    "a null": "x = \0",
    "nested calls": "RunnerConfig(a=" * 3_000 + "1" + ")" * 3_000,
    "long": "x = 1\n" * 20_000,
    "no Python": "cfg = RunnerConfig(",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_too_deep_or_no_python_is_one_error(text):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"f\.py: (is not Python|must have at most 100,000 characters)"):
        read_calls("f.py", text, ["RunnerConfig"])
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "before",
    ["a = 3\n" + "a = a * a\n" * 9_000, "a = 1.5\n" + "a = a ** 64\n" * 5_000, "a = [1]\n" + "a = [a, a]\n" * 60],
    ids=["squares", "powers", "doubled lists"],
)
def test_no_value_grows_without_bound(before):
    started = time.monotonic()
    arguments("a=a", before=before)
    assert time.monotonic() - started < 2
