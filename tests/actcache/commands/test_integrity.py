"""`actcache info`, `verify`, `repair` and `relabel`, as a person calls them."""

import pytest
from support.damages import BESIDE_HOOKS, CACHE, PLAN, flip, hook_damages
from support.tiny_caches import promised_files

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_the_command_says_what_was_wrong_and_what_it_wrote(sound, copied):
    from support.command_line import actcache

    paths = [
        hook_damages("acts")["acts cut"].to(copied),
        BESIDE_HOOKS["sequences/document cut"].to(copied),
        BESIDE_HOOKS["array gone"].to(copied),
    ]
    said = actcache("verify", copied, "--sample-model", code=1).stderr
    assert "3 problems found; `actcache repair` rebuilds what is damaged" in said
    assert "not sampled" in said
    done = actcache("repair", copied, "--device", "cpu")
    assert done.stdout == ""
    for path in paths:
        assert f"{path}: written anew" in done.stderr.splitlines()
    assert f"{paths[0]}: shard 2, rows 256 to 384: must be" in done.stderr
    assert done.stderr.splitlines()[-1] == f"{copied} is sound"
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_the_command_ends_in_one_line_where_nothing_can_be_done(copied):
    from support.command_line import actcache

    flip(copied / CACHE)
    flip(copied / PLAN)
    said = actcache("repair", copied, code=1).stderr
    assert said.startswith("error: ")
    assert said.count("\n") == 1
