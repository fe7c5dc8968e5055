"""`actcache info`, `verify`, `repair` and `relabel`, as a person calls them."""

import os

import pytest
from support.damages import BESIDE_HOOKS, CACHE, PLAN, flip, hook_damages
from support.repairs import stamps
from support.strangers import as_another_user, copy_of_another_user, only_root
from support.surroundings import descriptors
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


@only_root
@pytest.mark.parametrize("key", ["acts.zarr/train/tokens/id/c/0", PLAN, "stats/train/blocks.0.hook_resid_post.json"])
def test_a_sound_file_of_another_user_is_no_damage(copied, key):
    """Both commands end in one line and touch nothing; the model is never asked for."""
    from support.command_line import actcache

    actcache("verify", copied)  # what is imported late is readable for us alone
    with copy_of_another_user(copied) as root:
        os.chown(root / key, 0, 0)
        (root / key).chmod(0o600)
        before = stamps(root)
        with as_another_user():
            for command in ("verify", "repair", "info"):
                if command == "info" and key != CACHE:
                    continue
                (line,) = actcache(command, root, code=1).stderr.splitlines()
                assert line.startswith("error: [Errno 13] Permission denied; ask its owner"), line
                assert line.endswith(f"'{root / key}'")
        assert stamps(root) == before


def test_too_few_descriptors_are_no_damage(copied):
    """A cache needs few; with none left at all the commands say what it is, and touch nothing."""
    from support.command_line import actcache

    with descriptors(64):
        for command in ("verify", "repair", "info"):
            actcache(command, copied)
    before = stamps(copied)
    with descriptors(3):
        for command in ("verify", "repair", "info"):
            (line,) = actcache(command, copied, code=1).stderr.splitlines()
            assert "error: [Errno 24] Too many open files; let this process open more files (`ulimit -n`)" in line
            assert str(copied) in line
    assert stamps(copied) == before
