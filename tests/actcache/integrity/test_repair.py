"""A repaired cache is the cache that it was, byte for byte, and only what was damaged has been written."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.damages import (
    BESIDE_HOOKS,
    CACHE,
    HOOK,
    JOURNAL,
    OTHER,
    PLAN,
    TRAIN,
    VALIDATION,
    cut,
    drop,
    flip,
    hook_damages,
    lose_a_line,
)
from support.places import CHILD
from support.tiny_caches import HOOKS, harvest_tiny, promised_files
from support.tiny_models import D_MODEL

from actcache.errors import CacheLocked, CacheMismatch, DatasetError, ManifestError
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import Journal, read_journals

SETTINGS = {"tokens": 72 * 16, "holdout": 0.5}  # a partial last shard in both splits


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Several chunks in a shard, and several shards of sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache.format.arrays.MAX_CHUNK_BYTES", 32 * 2 * D_MODEL)
        patch.setattr("actcache.format.arrays.SEQUENCE_SHARD_TOKENS", 16 * 16)
        yield


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory, _small_chunks):
    """codec -> a cache; do not change them."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        codec: harvest_tiny(tiny_model, tiny_texts, folder / codec, codec=codec, **SETTINGS).path
        for codec in ("lossless", "raw", "int8")
    }


@pytest.fixture
def copied(sound, tmp_path):
    return shutil.copytree(sound["lossless"], tmp_path / "c")


def no_model(compute):
    raise AssertionError("the model was loaded")


def repaired(root, load_model=no_model, **arguments):
    """Repair the cache, which must be sound then, and must have been damaged; returns the report."""
    from actcache.integrity.repair import repair

    report = repair(root, load_model, **arguments)
    assert report.problems == ()
    assert report.found
    return report


def stamps(root):
    """Path -> inode and time of every file but the locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def changed(before, after):
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}


def partial_of(shard: Path) -> Path:
    """The partial statistics of the shard file of a hook."""
    split, hook, _, _, index, _ = shard.parts[-6:]
    root = shard.parents[6]
    return root / "manifest" / "partials" / f"{split}-{int(index):06d}-{hook}.safetensors"


# --- each kind of damage ---


@pytest.mark.parametrize("name", BESIDE_HOOKS)
def test_what_can_be_made_from_the_rest_needs_no_model(tiny_model, sound, copied, name):
    damage = BESIDE_HOOKS[name]
    path = damage.to(copied)
    before = stamps(copied)
    report = repaired(copied, (lambda compute: tiny_model) if damage.needs else no_model)
    assert promised_files(copied) == promised_files(sound["lossless"])
    assert changed(before, stamps(copied)) == {path} == {Path(redone) for redone in report.redone}
    assert str(path) in {problem.path for problem in report.found} or "journal" in name


@pytest.mark.parametrize(("codec", "array"), [("lossless", "acts"), ("raw", "acts"), ("int8", "q8"), ("int8", "scale")])
def test_activations_are_made_again_as_they_were(tiny_model, sound, tmp_path, codec, array):
    for name, damage in hook_damages(array).items():
        if codec != "lossless" and name not in (f"{array} flipped", f"last {array} flipped"):
            continue
        root = shutil.copytree(sound[codec], tmp_path / name.replace("/", "-"))
        shards = [damage.to(root)]
        shards += [shards[0].parents[1] / "3" / "0"] if "swapped" in name else []
        before = stamps(root)
        computes = []
        repaired(root, lambda compute, computes=computes: computes.append(compute) or tiny_model)
        assert promised_files(root) == promised_files(sound[codec]), name
        together = {other for shard in shards for other in shard.parents[3].glob(f"*/c/{shard.parent.name}/0")}
        allowed = {*together, *map(partial_of, shards)}
        assert {*shards} <= changed(before, stamps(root)) <= allowed, name
        assert [compute["batch_size"] for compute in computes] == [8], name
        shutil.rmtree(root)


def test_a_sound_cache_is_not_touched(copied):
    from actcache.integrity.repair import repair

    before = stamps(copied)
    report = repair(copied, no_model)
    assert (report.found, report.redone, report.problems) == ((), (), ())
    assert stamps(copied) == before


def everything(root):
    """Damage of every kind at once, except what would leave nothing to go by."""
    for split in (TRAIN, VALIDATION):
        drop(root / split / HOOK / "acts" / "c" / "1" / "0")
        flip(root / split / "sequences" / "id" / "c" / "0" / "0")
        flip(root / split / "tokens" / "position" / "c" / "0")
        cut(root / split / OTHER / "acts" / "c" / "0" / "0")
        drop(root / split / "zarr.json")
    flip(root / TRAIN / "tokens" / "id" / "c" / "3")  # whose sequences are another shard of theirs
    drop(root / TRAIN / "sequences" / "document" / "c" / "1" / "0")
    flip(root / "manifest" / "partials" / f"train-000002-{HOOKS[2]}.safetensors")
    flip(root / "stats" / "validation" / f"{OTHER}.json")
    flip(root / JOURNAL, 5000)


def test_everything_at_once(tiny_model, sound, copied):
    everything(copied)
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


# --- manifest files ---


@pytest.mark.parametrize("how", [flip, drop, cut])
def test_the_manifest_is_made_from_plan_and_journal(sound, copied, how):
    how(copied / CACHE)
    before = stamps(copied)
    repaired(copied)
    assert promised_files(copied) == promised_files(sound["lossless"])
    assert changed(before, stamps(copied)) == {copied / CACHE}


@pytest.mark.parametrize("how", [lambda path: flip(path, 5000), lose_a_line, cut])
def test_without_the_manifest_shards_of_lost_lines_are_made_again(tiny_model, sound, copied, how):
    drop(copied / CACHE)
    n_lines = len(read_journals(copied))
    how(copied / JOURNAL)
    before = stamps(copied)
    report = repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])
    shards = {Path(p.path).parts[-2:] for p in report.found if "no line of a journal is left" in p.message}
    assert shards
    rewritten = {path for path in changed(before, stamps(copied)) if "acts" in path.parts}
    assert len(rewritten) == len(HOOKS), "one line was lost, of one shard"
    assert len(read_journals(copied)) == n_lines + 1, "tokens and activations apart"


def test_an_unfinished_harvest_is_finished(tiny_model, sound, copied):
    drop(copied / CACHE)
    journal = copied / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:4]))
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_a_harvest_of_no_shard_is_left_to_harvest(copied):
    from actcache.integrity.repair import repair

    drop(copied / CACHE)
    (copied / JOURNAL).write_bytes(b"")
    with pytest.raises(ManifestError, match="no finished shard is recorded; run the same `actcache harvest` again"):
        repair(copied, no_model)


def test_both_manifests_gone_is_the_end(copied):
    from actcache.integrity.repair import repair

    flip(copied / CACHE)
    flip(copied / PLAN)
    before = stamps(copied)
    with pytest.raises(ManifestError, match=r"plan\.json.*cache\.json.*restore one of them, or harvest again"):
        repair(copied, no_model)
    assert stamps(copied) == before


def test_what_is_no_cache_is_refused(tmp_path):
    from actcache.integrity.repair import repair

    with pytest.raises(ManifestError, match="not a cache"):
        repair(tmp_path, no_model)
    assert not list(tmp_path.iterdir())


def test_manifests_of_two_caches_are_told_apart_from_damage(tiny_model, tiny_texts, copied, tmp_path):
    from actcache.integrity.repair import repair

    other = harvest_tiny(tiny_model, tiny_texts, tmp_path / "other", seed=1, **SETTINGS).path
    shutil.copy(other / PLAN, copied / PLAN)
    with pytest.raises(CacheMismatch, match="are of two caches"):
        repair(copied, no_model)


@pytest.mark.parametrize("outdated", [CACHE, PLAN])
@pytest.mark.parametrize("first", [16 * 16 * 2, 700])
def test_a_manifest_from_before_the_cache_grew_is_outdated(tiny_model, tiny_texts, sound, tmp_path, outdated, first):
    """Whichever of the two it is, and even if its last shard was whole, the rows that came later are not lost."""
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **{**SETTINGS, "tokens": first}).path
    old = (root / outdated).read_bytes()
    harvest_tiny(tiny_model, tiny_texts, root, **SETTINGS)
    (root / outdated).write_bytes(old)
    before = stamps(root)
    repaired(root)
    assert promised_files(root) == promised_files(sound["lossless"])
    assert changed(before, stamps(root)) == {root / outdated}


def test_a_growing_cache_is_left_growing(tiny_model, tiny_texts, sound, tmp_path):
    """Damaged between the new plan and the first new shard."""
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **{**SETTINGS, "tokens": 700}).path
    n_lines = len((root / JOURNAL).read_bytes().splitlines())
    harvest_tiny(tiny_model, tiny_texts, root, **SETTINGS)
    lines = (root / JOURNAL).read_bytes().splitlines(keepends=True)
    (root / JOURNAL).write_bytes(b"".join(lines[:n_lines]))
    drop(root / CACHE)
    flip(root / TRAIN / HOOK / "acts" / "c" / "0" / "0")
    repaired(root, lambda compute: tiny_model)
    assert promised_files(root) == promised_files(sound["lossless"])


def test_a_kill_while_growing_may_be_repaired_to_what_it_was(tiny_model, tiny_texts, sound, tmp_path):
    """The sequences have changed and the plan has not: the tail that it speaks of is another file by then."""
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **{**SETTINGS, "tokens": 700}).path
    before = promised_files(root)
    drop(root / CACHE)
    for split in (TRAIN, VALIDATION):
        for name in ("id", "document"):
            tail = Path(split) / "sequences" / name / "c" / "1" / "0"
            shutil.copy(sound["lossless"] / tail, root / tail)
    repaired(root, lambda compute: tiny_model)
    assert promised_files(root) == before


def test_native_metadata_stays_and_what_is_lost_comes_back_in_the_first_form(copied):
    from actcache.integrity.relabel import relabel

    relabel(copied, native=True)
    path = copied / TRAIN / HOOK / "acts" / "zarr.json"
    drop(path)
    before = stamps(copied)
    repaired(copied)
    assert changed(before, stamps(copied)) == {path}
    assert '"uint16"' in path.read_text()


# --- the dataset ---


def test_ids_and_tokens_of_the_same_rows_come_from_the_dataset(tiny_model, sound, copied):
    flip(copied / TRAIN / "sequences" / "id" / "c" / "0" / "0")
    flip(copied / TRAIN / "tokens" / "id" / "c" / "1")
    drop(copied / TRAIN / HOOK / "acts" / "c" / "1" / "0")
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_a_dataset_that_has_moved_is_named(tiny_model, tiny_texts, tmp_path):
    texts = shutil.copy(tiny_texts, tmp_path / "first.jsonl")
    cache = harvest_tiny(tiny_model, texts, tmp_path / "c", **SETTINGS).path
    before = promised_files(cache)
    texts.rename(tmp_path / "second.jsonl")
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    drop(cache / TRAIN / "zarr.json")
    with pytest.raises(DatasetError, match=r"cannot load .*first\.jsonl"):
        repaired(cache, lambda compute: tiny_model)
    assert {problem.array for problem in verify(cache).problems} == {"sequences/document"}, "the rest is repaired"
    repaired(cache, lambda compute: tiny_model, dataset=str(tmp_path / "second.jsonl"))
    assert promised_files(cache) == before


def test_another_dataset_is_refused(tiny_model, copied, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "' + "another text " * 3000 + '"}\n')
    path = copied / TRAIN / "sequences" / "document" / "c" / "0" / "0"
    drop(path)
    with pytest.raises(CacheMismatch, match="the dataset does not give it again; pass its former revision"):
        repaired(copied, lambda compute: tiny_model, dataset=str(tmp_path / "other.jsonl"))
    assert not path.exists()


def test_a_dataset_in_memory_is_asked_for(tiny_model, tiny_texts, tmp_path):
    import json

    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import LoadedDataset

    texts = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    source = LoadedDataset(Dataset.from_dict({"text": texts}))
    config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, batch_size=8, tokens=640, holdout=0.0)
    cache = harvest(tiny_model, source, config, tmp_path / "c").path
    before = promised_files(cache)
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    with pytest.raises(DatasetError, match="where the dataset is was not remembered; pass --dataset"):
        repaired(cache, lambda compute: tiny_model)
    repaired(cache, lambda compute: tiny_model, dataset=source)
    assert promised_files(cache) == before
    drop(cache / TRAIN / "sequences" / "document" / "c" / "0" / "0")
    repaired(cache, lambda compute: tiny_model, dataset=str(tiny_texts))
    assert promised_files(cache) == before, "the same texts from a file"


# --- the model ---


def test_another_model_is_refused(tiny_gpt2_dir, copied):
    from actcache.models.load import load_model

    path = hook_damages("acts")["acts flipped"].to(copied)
    content = path.read_bytes()
    with pytest.raises(CacheMismatch, match=r"was harvested from .*tiny_llama.*, the model is .*tiny_gpt2.*pass that"):
        repaired(copied, lambda compute: load_model(str(tiny_gpt2_dir), device="cpu"))
    assert path.read_bytes() == content


def test_hooks_of_one_shard_are_run_in_the_batches_of_each(tiny_model, tiny_texts, tmp_path):
    """A hook that was added later, in other batches; the shard's record speaks of these alone."""
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[:1], batch_size=1, **SETTINGS).path
    harvest_tiny(tiny_model, tiny_texts, root, hook_names=HOOKS[1:], batch_size=8, **SETTINGS)
    assert open_cache(root).compute["batch_size"] == 8
    before = promised_files(root)
    for hook in HOOKS[:2]:
        flip(root / TRAIN / hook / "acts" / "c" / "1" / "0")
    batches = set()
    repaired(root, lambda compute: batches.add(compute["batch_size"]) or tiny_model)
    assert promised_files(root) == before


@pytest.fixture(scope="module")
def eager_model(tiny_llama_dir):
    """The tiny Llama with another attention kernel, whose activations differ in the last bits."""
    from actcache.models.load import load_model

    return load_model(str(tiny_llama_dir), device="cpu", attention="eager")


def test_another_kernel_gives_a_sound_cache_and_is_told(eager_model, tiny_model, tiny_texts, tmp_path, caplog):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype="float32", **SETTINGS).path
    fingerprint, other = open_cache(root).fingerprint, promised_files(root)
    hook_damages("acts")["acts flipped"].to(root)
    with caplog.at_level(logging.WARNING, "actcache"):
        repaired(root, lambda compute: eager_model)
    assert "was computed with another attention (sdpa; now eager); bytes may differ in the last bit" in caplog.text
    assert f"{HOOK}/acts/c/2/0: came out with other bytes than it had" in caplog.text
    cache = open_cache(root)
    assert cache.fingerprint != fingerprint
    assert cache.manifest.shards["train"][2].compute["attention"] == "eager"
    ours = promised_files(root)
    differing = {path for path in ours if ours[path] != other[path]}
    assert differing == {f"{TRAIN}/{HOOK}/acts/c/2/0", f"stats/train/{HOOK}.json", CACHE}
    flip(root / TRAIN / HOOK / "acts" / "c" / "2" / "0")
    flip(root / JOURNAL)
    repaired(root, lambda compute: {"eager": eager_model, "sdpa": tiny_model}[compute["attention"]])
    assert promised_files(root) == ours, "from then on it is what it is"
    grown = harvest_tiny(tiny_model, tiny_texts, root, dtype="float32", **{**SETTINGS, "tokens": 80 * 16})
    assert verify(grown.path).problems == ()
    assert grown.manifest.shards["train"][2].compute["attention"] == "eager"


# --- other processes, and kills ---


def test_a_cache_that_is_being_written_is_refused(copied):
    from actcache.integrity.repair import repair

    drop(copied / PLAN)
    for slot in (0, 1):
        with Journal(copied, slot), pytest.raises(CacheLocked, match="other processes write this cache"):
            repair(copied, no_model)
    assert not (copied / PLAN).exists()


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # the process forks below
from actcache import load_model
from actcache.format import arrays
from actcache.integrity.repair import repair
arrays.SEQUENCE_SHARD_TOKENS = 16 * 16
model = load_model(sys.argv[1], device="cpu", attention=sys.argv[2])

def die_at(name, count):
    real, calls = getattr(os, name), [0]
    def patched(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, patched)

for root in sys.argv[4:]:
    for point in (int(Path(root).name), None):
        child = os.fork()
        if child == 0:
            if point:
                die_at(sys.argv[3], point)
            left = repair(root, lambda compute: model).problems
            os._exit(len(left))
        status = os.waitpid(child, 0)[1]
        print(point, "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)
"""


def repaired_after_kills(model_dir, attention, function, roots):
    """In each cache a repair is killed, at the call of the function whose number is its name, and repaired then."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, model_dir, attention, function, *roots],
        capture_output=True,
        text=True,
        env={**CHILD, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("None")] == ["None 0"] * len(roots), done.stdout + done.stderr
    return sum(line.endswith("killed") for line in lines)


EACH = pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])  # some kills here, all there


@EACH
def test_a_repair_may_be_killed_at_any_replaced_file(tiny_llama_dir, sound, tmp_path, step):
    roots = [shutil.copytree(sound["lossless"], tmp_path / str(number)) for number in range(2, 30, step)]
    for root in roots:
        everything(root)
        cut(root / CACHE)
    assert repaired_after_kills(tiny_llama_dir, "sdpa", "replace", roots) == len(roots)
    for root in roots:
        assert promised_files(root) == promised_files(sound["lossless"])


@EACH
def test_a_repair_with_another_kernel_may_be_killed_at_any_sync(
    eager_model, tiny_model, tiny_texts, tiny_llama_dir, tmp_path, step
):
    """Between shards that differ from the manifest, the lines that say so, and the manifest that is written last."""
    base = harvest_tiny(tiny_model, tiny_texts, tmp_path / "base", dtype="float32", **SETTINGS).path
    for split, index in ((TRAIN, "0"), (TRAIN, "2"), (VALIDATION, "1")):
        flip(base / split / HOOK / "acts" / "c" / index / "0")
    roots = [shutil.copytree(base, tmp_path / str(number)) for number in range(2, 23, step)]
    repaired(base, lambda compute: eager_model)
    assert repaired_after_kills(tiny_llama_dir, "eager", "fsync", roots) == len(roots)
    for root in roots:
        assert promised_files(root) == promised_files(base)


# --- journals that are replaced ---


def test_a_lock_on_a_journal_that_was_replaced_is_no_lock(tmp_path, monkeypatch):
    """Opened before a repair put another file in its place, locked after."""
    import fcntl

    from actcache.files import write_atomically

    path, real = tmp_path / JOURNAL, fcntl.flock

    def replaced_meanwhile(descriptor, kind):
        write_atomically(path, [path.read_bytes()])
        return real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with pytest.raises(CacheLocked, match="as worker 0"):
        Journal(tmp_path)
    monkeypatch.undo()
    with Journal(tmp_path) as journal:
        assert os.path.samefile(journal.path, path)


def test_a_damaged_journal_that_is_being_written_is_left_alone(copied):
    from actcache.store.journal import salvage

    with Journal(copied):
        flip(copied / JOURNAL)
        before = stamps(copied)
        with pytest.raises(CacheLocked, match="another process writes this damaged journal"):
            salvage(copied)
        assert stamps(copied) == before


# --- the command line ---


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


def test_the_commands_find_the_model_or_ask_for_it(sound, copied, tiny_llama_dir):
    import json

    from support.command_line import actcache

    sampled = ("verify", copied, "--sample-model", "--sequences", 3, "--device", "cpu", "--json")
    report = json.loads(actcache(*sampled).stdout)
    assert (report["problems"], report["sample"]["problems"], report["sample"]["n_sequences"]) == ([], [], 3)
    drop(copied / "log" / "origin.json")
    BESIDE_HOOKS["statistics gone"].to(copied)
    actcache("repair", copied)
    hook_damages("acts")["acts cut"].to(copied)
    assert "pass --model" in actcache("repair", copied, code=1).stderr
    (copied / "log" / "origin.json").write_text('{"model": "", "revision": null, "dataset": null}')
    assert "was harvested from a model in memory; pass --model" in actcache("repair", copied, code=1).stderr
    actcache("repair", copied, "--model", tiny_llama_dir, "--device", "cpu")
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_the_command_ends_in_one_line_where_nothing_can_be_done(copied):
    from support.command_line import actcache

    flip(copied / CACHE)
    flip(copied / PLAN)
    said = actcache("repair", copied, code=1).stderr
    assert said.startswith("error: ")
    assert said.count("\n") == 1
