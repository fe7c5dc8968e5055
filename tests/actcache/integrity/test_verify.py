"""Every kind of damage is found, and is told where it is."""

import json
import shutil
from dataclasses import asdict

import pytest
from support.damages import (
    BESIDE_HOOKS,
    CACHE,
    HOOK,
    JOURNAL,
    OTHER,
    TRAIN,
    VALIDATION,
    Damage,
    drop,
    flip,
    hook_damages,
)
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import D_MODEL

from actcache.errors import CorruptShard, ManifestError
from actcache.integrity.problems import Problem
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import Journal

SHARD_ROWS, CHUNK_ROWS, ROW_BYTES = 128, 32, 2 * D_MODEL


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Several chunks in a shard, and several shards of sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache.format.arrays.MAX_CHUNK_BYTES", CHUNK_ROWS * ROW_BYTES)
        patch.setattr("actcache.format.arrays.SEQUENCE_SHARD_TOKENS", 16 * 16)
        yield


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory, _small_chunks):
    """codec -> a cache with a partial last shard in both splits; do not change them."""
    settings = {"tokens": 72 * 16, "holdout": 0.5}
    folder = tmp_path_factory.mktemp("sound")
    return {
        codec: harvest_tiny(tiny_model, tiny_texts, folder / codec, codec=codec, **settings)
        for codec in ("lossless", "raw", "int8")
    }


@pytest.fixture
def copied(sound, tmp_path):
    return shutil.copytree(sound["lossless"].path, tmp_path / "c")


@pytest.mark.parametrize("codec", ["lossless", "raw", "int8"])
def test_a_sound_cache_has_no_problems(sound, codec):
    cache, seen = sound[codec], []
    assert (cache.manifest.shard_rows, cache.manifest.chunk_rows) == (SHARD_ROWS, CHUNK_ROWS)
    report = verify(cache.path, progress=lambda done, total: seen.append((done, total)))
    assert (report.problems, report.notes) == ((), ())
    assert report.n_rows == cache.n_rows("train") + cache.n_rows("validation")
    assert seen == [(done, report.n_chunks) for done in range(1, report.n_chunks + 1)]


def test_a_damaged_chunk_is_told_with_its_shard_and_rows(sound, tmp_path):
    """Chunks of `raw` are rows one after the other: which of them a byte belongs to can be counted."""
    root = shutil.copytree(sound["raw"].path, tmp_path / "c")
    path = root / TRAIN / HOOK / "acts" / "c" / "2" / "0"
    for row in (3, 70, 71, 127):
        flip(path, row * ROW_BYTES + 1)
    rows = {chunk: 2 * SHARD_ROWS + chunk * CHUNK_ROWS for chunk in (0, 2, 3)}
    expected = [
        Problem(
            path=str(path),
            split="train",
            array=f"{HOOK}/acts",
            shard=2,
            chunk=chunk,
            rows=(start, start + CHUNK_ROWS),
            message="does not match its checksum in the manifest",
        )
        for chunk, start in rows.items()
    ]
    problems = verify(root).problems
    assert list(problems) == expected
    where = "shard 2, chunk 2, rows 320 to 352: does not match its checksum in the manifest"
    assert str(problems[1]) == f"{path}: {where}"
    assert json.loads(json.dumps(asdict(problems[1])))["rows"] == [320, 352]


def test_the_last_chunk_of_a_split_is_told_with_the_rows_it_has(sound, tmp_path):
    root = shutil.copytree(sound["raw"].path, tmp_path / "c")
    n_rows = sound["raw"].n_rows("validation")
    shard, row = divmod(n_rows - 1, SHARD_ROWS)
    flip(root / VALIDATION / HOOK / "acts" / "c" / str(shard) / "0", row * ROW_BYTES)
    (problem,) = verify(root).problems
    start = (n_rows - 1) // CHUNK_ROWS * CHUNK_ROWS
    assert (problem.shard, problem.chunk, problem.rows) == (shard, row // CHUNK_ROWS, (start, n_rows))
    assert n_rows - start < CHUNK_ROWS


@pytest.mark.parametrize(("codec", "array"), [("lossless", "acts"), ("raw", "acts"), ("int8", "q8"), ("int8", "scale")])
def test_damaged_activations_are_found(sound, tmp_path, codec, array):
    for name, damage in hook_damages(array).items():
        root = shutil.copytree(sound[codec].path, tmp_path / name.replace("/", "-"))
        path = damage.to(root)
        problems = verify(root).problems
        swapped = {str(path), str(path.parents[1] / "3" / "0")} if "swapped" in name else {str(path)}
        assert {problem.path for problem in problems} == swapped, name
        assert all(p.array == f"{HOOK}/{array}" and p.split and p.rows for p in problems), name
        whole = any(word in name for word in ("index", "cut", "gone", "zeros"))
        assert all((problem.chunk is None) == whole for problem in problems if codec != "lossless"), name


@pytest.mark.parametrize("name", BESIDE_HOOKS)
def test_damage_beside_the_activations_is_found(copied, name):
    path = BESIDE_HOOKS[name].to(copied)
    problems = verify(copied).problems
    assert {problem.path for problem in problems} == {str(path)}
    assert len(problems) == 1 or name == "journal gone"
    json.dumps([asdict(problem) for problem in problems])


def test_what_follows_from_damage_is_not_told_as_damage(copied):
    """Statistics that cannot be held against a damaged partial, tokens that cannot be held against lost sequences."""
    paths = {BESIDE_HOOKS[name].to(copied) for name in ("partial flipped", "sequences/id flipped", "tokens/id flipped")}
    assert {problem.path for problem in verify(copied).problems} == {str(path) for path in paths}


def test_sound_tokens_of_other_rows_are_found(copied):
    """Two shards of a token array have changed places, and the manifest with them."""
    from actcache.format.manifest import Manifest
    from actcache.format.seal import seal, unseal

    path = copied / TRAIN / "tokens" / "id" / "c"
    contents = [(path / index).read_bytes() for index in "01"]
    for index, content in zip("10", contents, strict=True):
        (path / index).write_bytes(content)
    manifest = copied / CACHE
    values = unseal(manifest.read_bytes(), manifest)
    arrays = [values["shards"]["train"][index]["arrays"] for index in (0, 1)]
    arrays[0]["tokens/id"], arrays[1]["tokens/id"] = arrays[1]["tokens/id"], arrays[0]["tokens/id"]
    manifest.write_bytes(seal(Manifest.from_json(values).to_json()))
    found = [problem for problem in verify(copied).problems if "tokens of its sequences" in problem.message]
    assert [(p.path, p.rows) for p in found] == [
        (str(path / "0"), (0, SHARD_ROWS)),
        (str(path / "1"), (SHARD_ROWS, 2 * SHARD_ROWS)),
    ]


def test_files_that_nothing_speaks_of_are_noted(copied):
    stray = copied / TRAIN / HOOK / "acts" / "c" / "99" / "0"
    stray.parent.mkdir()
    stray.write_bytes(b"x")
    left = copied / TRAIN / ".zarr.json.0123.partial"
    left.write_bytes(b"x")
    report = verify(copied)
    assert report.problems == ()
    assert report.notes == (f"{left}: a killed writer left it", f"{stray}: no manifest speaks of it")
    with Journal(copied):
        assert verify(copied).notes == (), "they may be the running writer's"


def test_a_hook_that_is_being_added_is_no_stray(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[:1], tokens=640).path
    finished = (root / CACHE).read_bytes()
    harvest_tiny(tiny_model, tiny_texts, root, hook_names=HOOKS[1:], tokens=640)
    (root / CACHE).write_bytes(finished)
    for hook in HOOKS[1:]:
        for split in (TRAIN, VALIDATION):
            drop(root / split / hook / "acts" / "zarr.json")
            drop(root / split / hook / "zarr.json")
    report = verify(root)
    assert (report.problems, report.notes) == ((), ())


def test_missing_and_truncated_shards_are_refused_at_once(copied):
    path = copied / TRAIN / HOOKS[1] / "acts" / "c" / "1" / "0"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptShard, match=str(path)):
        open_cache(copied)
    path.unlink()
    with pytest.raises(CorruptShard, match="is missing"):
        open_cache(copied)


def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_told(copied):
    import os

    shard, metadata = copied / TRAIN / HOOK / "acts" / "c" / "1" / "0", copied / TRAIN / "zarr.json"
    partial = copied / "manifest" / "partials" / f"train-000000-{OTHER}.safetensors"
    for path in (shard, metadata, partial):
        path.unlink()
    shard.mkdir()
    os.mkfifo(metadata)
    os.mkfifo(partial)
    assert {problem.path for problem in verify(copied).problems} == {str(shard), str(metadata), str(partial)}


def test_a_damaged_manifest_and_a_mixed_identity_are_refused(copied):
    metadata = copied / "acts.zarr" / "zarr.json"
    values = json.loads(metadata.read_text())
    values["attributes"]["actcache"]["seed"] = 99
    metadata.write_text(json.dumps(values))
    with pytest.raises(ManifestError, match="another identity"):
        open_cache(copied)
    flip(copied / CACHE, 200)
    with pytest.raises(ManifestError, match="checksum does not match"):
        open_cache(copied)
    with pytest.raises(ManifestError, match="checksum does not match"):
        verify(copied)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="not a cache"):
        open_cache(tmp_path)
    with pytest.raises(ManifestError, match="not a cache"):
        open_cache(tmp_path / "none")


def test_a_damaged_line_of_a_journal_is_told_by_its_number(copied):
    path = Damage(file=JOURNAL, how=lambda p: flip(p, 30)).to(copied)
    (problem,) = verify(copied).problems
    assert str(problem) == f"{path}: cannot be read in line 1"
