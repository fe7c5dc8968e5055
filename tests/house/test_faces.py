"""Each room's `__init__.py` says what the room is, what comes in and goes out, what is forbidden and what is public."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from support.places import ROOT

PACKAGES = ("actcache", "trainer")
ROOMS = sorted({path.parent for package in PACKAGES for path in (ROOT / package).glob("*/*.py")})
FACE = re.compile(r"[^\n]+\n\n(?P<sentences>[^\n]+(?:\n[^\n]+)*)\n\nPublic:\n(?P<entries>(?:    [^\n]+\n?)+)")
ENTRY = re.compile(r"    (?P<module>\w+)\.(?P<name>\w+): (?P<words>.+)")


def room_name(room: Path) -> str:
    return ".".join(room.relative_to(ROOT).parts)


def test_there_are_rooms_in_both_packages():
    assert {room_name(room).split(".")[0] for room in ROOMS} == {*PACKAGES}


@pytest.mark.parametrize("room", ROOMS, ids=room_name)
def test_a_face_is_a_docstring_alone(room):
    body = ast.parse((room / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr], "no code and no import, so that no room pulls in another"
    assert ast.get_docstring(ast.Module(body=body, type_ignores=[]))


@pytest.mark.parametrize("room", ROOMS, ids=room_name)
def test_a_face_says_three_sentences_and_names_what_is_public(room):
    face = FACE.fullmatch(ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "")
    assert face, f"{room}: needs a line, three sentences, and an indented list under `Public:`"
    assert len(re.findall(r"\.(?:\s|$)", face["sentences"])) == 3, face["sentences"]
    for line in face["entries"].splitlines():
        entry = ENTRY.fullmatch(line)
        assert entry, line
        module = importlib.import_module(f"{room_name(room)}.{entry['module']}")
        assert hasattr(module, entry["name"]), f"{room_name(room)} has no {entry['module']}.{entry['name']}"
        assert 3 <= len(entry["words"].split()) <= 8, line
