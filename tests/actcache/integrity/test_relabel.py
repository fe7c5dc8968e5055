import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from support.no_locks import forbid_locks
from support.repairs import stamps
from support.strangers import as_another_user, only_root
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheMismatch, LocksMissing, ManifestError
from actcache.flow import SPLITS
from actcache.integrity.relabel import relabel
from actcache.integrity.repair import repair
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.locks import without_locks

N_FILES = len(SPLITS) * len(HOOKS)  # one bfloat16 array of each hook in each split
PLAIN_ZARR = """
import sys
from importlib.metadata import entry_points
import numpy as np
import zarr
if tuple(int(part) for part in zarr.__version__.split(".")[:3]) < (3, 4, 1):
    for data_type in entry_points(group="zarr.data_type"):
        data_type.load()  # later versions load them by themselves
array = zarr.open_array(sys.argv[1], mode="r")
np.save(sys.argv[2], array[:].view(np.uint16))
print(array.dtype)
"""
KILLED = """
import os, signal, sys
from actcache.flow import SPLITS
from actcache.integrity.relabel import relabel
real, calls = os.replace, []
def replace(*args, **folders):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args, **folders)
os.replace = replace
relabel(sys.argv[1], native=True)
"""


@pytest.fixture
def copied(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache.path, tmp_path / "c")


def python(script, *arguments):
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def bits(cache, split, hook_name):
    reader = cache.hook_reader(split, hook_name)
    return reader.read(0, reader.n_rows).view(torch.uint16).numpy()


def array_path(root, split="train", hook_name=HOOKS[0], name="acts"):
    return root / "acts.zarr" / split / hook_name / name


def data_types(root):
    files = sorted(root.glob("acts.zarr/*/*/*/zarr.json"))
    return {str(file.relative_to(root)): json.loads(file.read_text())["data_type"] for file in files}


def assert_sound(root, tiny_cache):
    assert verify(root).problems == ()
    cache = open_cache(root)
    for hook_name in HOOKS:
        assert np.array_equal(bits(cache, "validation", hook_name), bits(tiny_cache, "validation", hook_name))


def test_native_and_back(copied, tiny_cache):
    before = promised_files(copied)
    metadata = (array_path(copied) / "zarr.json").read_text()
    assert relabel(copied, native=True) == N_FILES
    assert relabel(copied, native=True) == 0
    native, after = json.loads((array_path(copied) / "zarr.json").read_text()), promised_files(copied)
    assert (native["data_type"], native["fill_value"]) == ("bfloat16", 0.0)
    assert native == {**json.loads(metadata), "data_type": "bfloat16", "fill_value": 0.0}
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {
        f"acts.zarr/{split}/{hook}/acts/zarr.json" for split in ("train", "validation") for hook in HOOKS
    }
    assert_sound(copied, tiny_cache)
    assert relabel(copied, native=False) == N_FILES
    assert relabel(copied, native=False) == 0
    assert promised_files(copied) == before


def test_other_readers_see_bfloat16(copied, tiny_cache, tmp_path):
    relabel(copied, native=True)
    expected = bits(tiny_cache, "train", HOOKS[0])
    done = python(PLAIN_ZARR, array_path(copied), tmp_path / "bits.npy")
    assert done.stdout.strip() == "bfloat16", done.stderr
    assert np.array_equal(np.load(tmp_path / "bits.npy"), expected)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array_path(copied))}}
    theirs = tensorstore.open(spec, read=True).result()
    assert theirs.dtype.name == "bfloat16"
    assert np.array_equal(theirs.read().result().view(np.uint16), expected)


def test_a_kill_between_two_files_leaves_a_sound_cache(copied, tiny_cache):
    done = python(KILLED, copied)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(data_types(copied).values()).count("bfloat16") == 3
    assert_sound(copied, tiny_cache)
    assert relabel(copied, native=True) == N_FILES - 3
    assert_sound(copied, tiny_cache)


def test_of_int8_only_the_scales_follow(tiny_model, tiny_texts, tmp_path):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", codec="int8")
    assert relabel(cache.path, native=True) == N_FILES
    scale, q8 = (
        zarr.open_array(array_path(cache.path, name=name), mode="r", zarr_format=3) for name in ("scale", "q8")
    )
    assert (scale.dtype, q8.dtype) == (ml_dtypes.bfloat16, np.int8)
    stored = cache.hook_reader("train", HOOKS[0]).arrays[1].read(0, cache.n_rows("train"))
    assert np.array_equal(np.asarray(scale[:]).view(np.uint16), stored)
    assert verify(cache.path).problems == ()


def test_a_cache_without_bfloat16_is_refused(tiny_model, tiny_texts, tmp_path):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype="float16")
    for native in (True, False):
        with pytest.raises(CacheMismatch, match="stores float16"):
            relabel(cache.path, native)


def edited(root, **changes):
    path = array_path(root, "validation", HOOKS[-1]) / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"data_type": "int16"}, "data_type"),
        ({"data_type": "float16", "fill_value": 0.0}, "data_type"),
        ({"data_type": "bfloat16", "fill_value": "NaN"}, "fill_value"),
        ({"fill_value": 1}, "fill_value"),
        ({"attributes": {}}, "attributes"),
        ({"dimension_names": ["row", "d_in"]}, "dimension_names"),
        ({"shape": [1, 1]}, "shape"),
    ],
    ids=str,
)
def test_any_third_form_is_a_problem(copied, changes, wrong):
    edited(copied, **changes)
    before = promised_files(copied)
    (problem,) = verify(copied).problems
    assert problem.path.endswith(f"validation/{HOOKS[-1]}/acts/zarr.json")
    assert f"says {{'{wrong}': " in problem.message
    with pytest.raises(ManifestError, match="does not describe"):
        relabel(copied, native=True)
    assert promised_files(copied) == before, "nothing is changed"


def test_unreadable_metadata_is_refused(copied):
    (array_path(copied) / "zarr.json").write_text("{")
    with pytest.raises(ManifestError, match="cannot be read"):
        relabel(copied, native=True)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_growth_and_a_new_hook_keep_the_native_form(codec, tiny_model, tiny_texts, tmp_path):
    def harvest(out, hooks, tokens):
        return harvest_tiny(tiny_model, tiny_texts, out, hook_names=hooks, tokens=tokens, codec=codec).path

    cache = harvest(tmp_path / "c", HOOKS[:1], 1000)
    assert relabel(cache, native=True) == len(SPLITS)
    harvest(cache, HOOKS[:1], 1500)
    assert bfloat16_types(cache) == ["bfloat16"] * len(SPLITS)
    harvest(cache, HOOKS[1:], 1500)
    assert bfloat16_types(cache) == ["bfloat16"] * N_FILES
    assert verify(cache).problems == ()
    assert relabel(cache, native=False) == N_FILES
    whole = harvest(tmp_path / "whole", HOOKS, 1500)
    assert promised_files(cache) == promised_files(whole)


def test_an_array_keeps_its_form_where_a_kill_left_both(tiny_model, tiny_texts, tmp_path):
    """The new hook then has the plain form; the same relabel does the rest."""
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[:2], tokens=1000).path
    assert relabel(cache, native=True) == 4
    path = array_path(cache) / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_type": "uint16", "fill_value": 0}))
    harvest_tiny(tiny_model, tiny_texts, cache, hook_names=HOOKS[2:], tokens=1000)
    plain = {file for file, data_type in data_types(cache).items() if data_type == "uint16"}
    assert plain == {f"acts.zarr/train/{HOOKS[0]}/acts/zarr.json"} | {
        f"acts.zarr/{split}/{HOOKS[2]}/acts/zarr.json" for split in SPLITS
    }


def test_a_torn_file_is_repaired_to_the_form_of_the_others(copied):
    relabel(copied, native=True)
    before = promised_files(copied)
    path = array_path(copied) / "zarr.json"
    path.write_bytes(path.read_bytes()[:100])
    assert repair(copied, refuse_to_load).problems == ()
    assert promised_files(copied) == before


def test_a_repaired_file_keeps_its_own_form(copied):
    relabel(copied, native=True)
    before = promised_files(copied)
    edited(copied, shape=[1, 1])
    assert repair(copied, refuse_to_load).problems == ()
    assert promised_files(copied) == before


def test_it_waits_while_a_harvest_finalises(copied):
    before = promised_files(copied)
    with open(copied / "manifest" / "settling.lock", "ab") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        changed = pool.submit(relabel, copied, True)
        time.sleep(0.3)
        assert (changed.done(), promised_files(copied) == before) == (False, True)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert changed.result(timeout=30) == N_FILES


def bfloat16_types(root):
    files = [json.loads(file.read_text()) for file in sorted(root.glob("acts.zarr/*/*/*/zarr.json"))]
    return [file["data_type"] for file in files if file["attributes"]["actcache"]["dtype"] == "bfloat16"]


def refuse_to_load(compute):
    raise AssertionError("no activation is damaged")


@only_root
def test_a_cache_of_another_user_is_refused_before_anything_changes(copied):
    before = stamps(copied)
    with as_another_user(copied):
        assert relabel(copied, native=False) == 0
        with pytest.raises(PermissionError, match=rf"this has to write the cache; .*: '{copied}'$"):
            relabel(copied, native=True)
    assert stamps(copied) == before


def test_without_locks_a_change_is_refused(copied, monkeypatch):
    forbid_locks(monkeypatch, copied)
    assert relabel(copied, native=False) == 0
    with pytest.raises(LocksMissing, match="pass --no-lock"):
        relabel(copied, native=True)
    with without_locks():
        assert relabel(copied, native=True) == N_FILES
