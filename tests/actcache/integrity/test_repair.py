"""A repaired cache is the cache that it was, byte for byte, and only what was damaged has been written."""

import logging
import os
import shutil
import threading
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
)
from support.forked_commands import Commands
from support.killed_forks import repair_after_kills
from support.repairs import SETTINGS, changed, no_model, repaired, stamps
from support.strangers import as_another_user, only_root
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheLocked, CacheMismatch, ManifestError
from actcache.integrity.verify import verify
from actcache.store.cache import open_cache
from actcache.store.journal import Journal
from actcache.store.locks import exclusive

pytestmark = pytest.mark.usefixtures("small_chunks")


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


def test_an_unfinished_harvest_is_finished(tiny_model, sound, copied):
    drop(copied / CACHE)
    journal = copied / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:4]))
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_what_is_no_cache_is_refused(tmp_path):
    from actcache.integrity.repair import repair

    with pytest.raises(ManifestError, match="not a cache"):
        repair(tmp_path, no_model)
    assert not list(tmp_path.iterdir())


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


def test_native_metadata_stays_and_what_is_lost_comes_back_in_the_form_of_the_others(copied):
    from actcache.integrity.relabel import relabel

    relabel(copied, native=True)
    path = copied / TRAIN / HOOK / "acts" / "zarr.json"
    drop(path)
    before = stamps(copied)
    repaired(copied)
    assert changed(before, stamps(copied)) == {path}
    assert '"bfloat16"' in path.read_text()


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


def test_others_wait_for_a_repair_and_say_so(tiny_model, copied, caplog):
    hook_damages("acts")["acts flipped"].to(copied)
    waiting = []

    def loaded(compute):
        waiting.append(threading.Thread(target=exclusive(copied, "settles the plan").__enter__))
        waiting[0].start()
        waiting[0].join(2)
        assert waiting[0].is_alive(), "the repair has the cache for itself"
        return tiny_model

    repaired(copied, loaded)
    waiting[0].join(20)
    assert not waiting[0].is_alive()
    assert [line for line in caplog.messages if f"waits for process {os.getpid()} on" in line and "(repairs it" in line]


@only_root
def test_a_cache_of_another_user_is_looked_at_and_refused_where_it_is_damaged(copied):
    from actcache.integrity.repair import repair

    before = stamps(copied)
    with as_another_user(copied):
        report = repair(copied, no_model)
        assert (report.found, report.redone, report.problems) == ((), (), ())
        assert verify(copied).problems == ()
    assert stamps(copied) == before
    hook_damages("acts")["acts flipped"].to(copied)
    before = stamps(copied)
    with (
        as_another_user(copied),
        pytest.raises(PermissionError, match=rf"this has to write the cache; .*: '{copied}'$"),
    ):
        repair(copied, no_model)
    assert stamps(copied) == before


def repaired_after_kills(folder, model_dir, attention, function, roots):
    """In each cache a repair is killed, at the call of the function whose number is its name, and repaired then."""
    exit_code, said = Commands(folder).run([model_dir, attention, function, *roots], int, repair_after_kills)
    assert exit_code == 0, said
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("None")] == ["None 0"] * len(roots), said
    return sum(line.endswith("killed") for line in lines)


EACH = pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])  # some kills here, all there


@EACH
def test_a_repair_may_be_killed_at_any_replaced_file(tiny_llama_dir, sound, tmp_path, step):
    roots = [shutil.copytree(sound["lossless"], tmp_path / str(number)) for number in range(2, 30, step)]
    for root in roots:
        everything(root)
        cut(root / CACHE)
    assert repaired_after_kills(tmp_path, tiny_llama_dir, "sdpa", "replace", roots) == len(roots)
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
    assert repaired_after_kills(tmp_path, tiny_llama_dir, "eager", "fsync", roots) == len(roots)
    for root in roots:
        assert promised_files(root) == promised_files(base)
