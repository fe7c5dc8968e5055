"""What growth replaces is kept: the cache can be read while it grows, after a kill, and as it was before."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny, promised_files
from typer.testing import CliRunner

import cli
from actcache.errors import CacheMismatch, ManifestError
from actcache.flow import SPLITS
from actcache.format.manifest import replaced_by_growth
from actcache.harvesting import run as harvesting
from actcache.integrity.relabel import relabel
from actcache.integrity.repair import repair
from actcache.integrity.verify import verify
from actcache.store.cache import Cache, earlier_caches, open_cache
from actcache.store.kept import CacheFiles, keep, kept_fingerprints

FEW, MANY = 1111, 2000


class Killed(BaseException):
    """In place of SIGKILL: no handler of errors takes it."""


@pytest.fixture(scope="module")
def few(tiny_model, tiny_texts, tmp_path_factory) -> Cache:
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("few") / "c", tokens=FEW)


@pytest.fixture(scope="module")
def many(tiny_model, tiny_texts, tmp_path_factory) -> Cache:
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("many") / "c", tokens=MANY)


@pytest.fixture
def root(few: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(few.path, tmp_path / "c"))


def check_equal(found: Cache, expected: Cache) -> None:
    """Every row, token, sequence and statistic."""
    assert found.fingerprint == expected.fingerprint
    for split in ("train", "validation"):
        assert found.sequences(split).tolist() == expected.sequences(split).tolist()
        assert found.documents(split).tolist() == expected.documents(split).tolist()
        for name in ("id", "sequence", "position"):
            readers = [cache.token_reader(split, name) for cache in (found, expected)]
            assert readers[0].read(0, readers[0].n_rows).tolist() == readers[1].read(0, readers[1].n_rows).tolist()
        for hook_name in HOOKS:
            rows = [cache.hook_reader(split, hook_name).read(0, cache.n_rows(split)) for cache in (found, expected)]
            assert torch.equal(*rows)
            statistics = [cache.statistics(hook_name, split=split).to_json() for cache in (found, expected)]
            assert statistics[0] == statistics[1]


def half_grown(model, texts, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard of the larger cache is there, and its manifest is not."""

    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "finalise", killed)
        with pytest.raises(Killed):
            harvest_tiny(model, texts, root, tokens=MANY)


def test_a_cache_is_read_before_during_and_after_its_growth(few, many, root, tiny_model, tiny_texts, monkeypatch):
    opened, sent = open_cache(root), pickle.dumps(open_cache(root))
    check_equal(opened, few)
    half_grown(tiny_model, tiny_texts, root, monkeypatch)
    for cache in (opened, open_cache(root), pickle.loads(sent)):
        check_equal(cache, few)
    report = verify(root)
    assert report.problems == ()
    assert "grows, and the harvest is unfinished" in "".join(report.notes)
    grown = harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    assert promised_files(root) == promised_files(many.path)
    check_equal(grown, many)
    (earlier,) = earlier_caches(grown)
    for cache in (opened, pickle.loads(sent), earlier, pickle.loads(pickle.dumps(earlier))):
        check_equal(cache, few)
    assert (verify(root).problems, verify(root).notes) == ((), ())


def test_what_is_kept_of_a_grown_cache_may_be_deleted(few, root, tiny_model, tiny_texts):
    opened = open_cache(root)
    grown = harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    shutil.rmtree(root / "kept")
    assert list(earlier_caches(grown)) == []
    said = rf"was cache {few.fingerprint} when it was opened, is {grown.fingerprint} now; .* again"
    split = next(split for split in SPLITS if few.n_rows(split) % few.manifest.shard_rows)
    last = few.n_rows(split) - 1
    with pytest.raises(CacheMismatch, match=said):
        opened.hook_reader(split, HOOKS[0]).read(last, last + 1)
    with pytest.raises(CacheMismatch, match=said):
        opened.statistics(HOOKS[0], split=split)


def test_growth_keeps_what_it_changes(few, root, tiny_model, tiny_texts):
    """All but journals, plan and logs, of which readers know nothing."""

    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    before = contents()
    harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    after, prefix = contents(), f"kept/{few.fingerprint}/"
    kept = {key.removeprefix(prefix): found for key, found in after.items() if key.startswith(prefix)}
    assert kept == {key: before[key] for key in replaced_by_growth(few.manifest)}
    changed = {key for key, found in before.items() if after[key] != found and not key.startswith("log/")}
    writers = {"manifest/plan.json", "manifest/writer-00.jsonl"}
    assert changed - writers <= {*kept}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV])
def test_where_there_are_no_links_files_are_copied(few, root, tiny_model, tiny_texts, monkeypatch, code):
    def refused(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    opened = open_cache(root)
    monkeypatch.setattr(os, "link", refused)
    harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    check_equal(opened, few)


def test_no_room_to_keep_is_an_error_and_the_cache_stays(few, root, tiny_model, tiny_texts, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = promised_files(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(OSError, match="No space left"):
            harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    assert (promised_files(root), kept_fingerprints(root)) == (before, [])
    assert list((root / "kept").iterdir()) == []
    check_equal(open_cache(root), few)


def test_a_kill_while_keeping_is_healed_by_the_next_growth(few, root, tiny_model, tiny_texts, monkeypatch):
    real, done = os.link, []

    def link(*args: Path) -> None:
        if len(done) == 5:
            os._exit(9)
        done.append(real(*args))

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "link", link)
        keep(root, few.fingerprint, replaced_by_growth(few.manifest))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    check_equal(open_cache(root), few)
    opened = open_cache(root)
    harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    check_equal(opened, few)
    assert kept_fingerprints(root) == [few.fingerprint]
    assert not list(root.rglob("*.partial"))


def test_a_growth_that_was_never_begun_leaves_nothing_kept(few, tiny_model, tiny_texts, tmp_path):
    """Killed before the plan was written; then another hook is asked for."""
    one = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=FEW, hook_names=HOOKS[:1])
    keep(one.path, one.fingerprint, replaced_by_growth(one.manifest))
    assert kept_fingerprints(one.path) == [one.fingerprint]
    check_equal(harvest_tiny(tiny_model, tiny_texts, one.path, tokens=FEW), few)
    assert kept_fingerprints(one.path) == []


def test_repair_is_not_hidden_by_what_a_kill_has_kept(few, root, tiny_model):
    keep(root, few.fingerprint, replaced_by_growth(few.manifest))
    last = max(
        (root / "acts.zarr" / "train" / HOOKS[0] / "acts" / "c").glob("*/0"), key=lambda path: int(path.parent.name)
    )
    damaged = bytearray(last.read_bytes())
    damaged[10] ^= 1
    last.write_bytes(damaged)  # the link has these bytes too
    assert verify(root).problems != ()
    assert repair(root, lambda _: tiny_model).problems == ()
    check_equal(open_cache(root), few)


def test_repair_finishes_a_growth(few, many, root, tiny_model, tiny_texts, monkeypatch):
    half_grown(tiny_model, tiny_texts, root, monkeypatch)
    report = repair(root, lambda _: tiny_model)
    assert report.problems == ()
    assert any("is from before the cache grew" in problem.message for problem in report.found)
    assert promised_files(root) == promised_files(many.path)


def test_relabel_waits_for_the_end_of_growth(root, tiny_model, tiny_texts, monkeypatch):
    half_grown(tiny_model, tiny_texts, root, monkeypatch)
    with pytest.raises(ManifestError, match=r"c: its growth is unfinished; run the same `actcache harvest` first"):
        relabel(root, native=True)
    harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    assert relabel(root, native=True) > 0


def test_fewer_tokens_are_refused_while_it_grows(root, tiny_model, tiny_texts, monkeypatch):
    half_grown(tiny_model, tiny_texts, root, monkeypatch)
    with pytest.raises(CacheMismatch, match=rf"unfinished harvest of {MANY} tokens, {FEW} asked; finish it with"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=FEW)


def test_info_shows_the_finished_part_while_it_grows(few, root, tiny_model, tiny_texts, monkeypatch):
    half_grown(tiny_model, tiny_texts, root, monkeypatch)
    said = CliRunner().invoke(cli.app, ["info", str(root)])
    assert (said.exit_code, f"{few.n_rows():,}" in said.output) == (0, True), said.output


def test_a_kept_manifest_that_is_damaged_is_named(few, root, tiny_model, tiny_texts):
    grown = harvest_tiny(tiny_model, tiny_texts, root, tokens=MANY)
    manifest = root / "kept" / few.fingerprint / "manifest" / "cache.json"
    manifest.unlink()
    with pytest.raises(ManifestError, match=rf"{manifest}: cannot be read .*delete"):
        list(earlier_caches(grown))
    manifest.write_text("{}")
    with pytest.raises(ManifestError, match=str(manifest)):
        list(earlier_caches(grown))


def test_a_file_that_growth_moves_while_it_is_read_is_read_again(tmp_path):
    """Growth begins between the look and the reading, and ends between the next two."""
    (tmp_path / "file").write_text("old")
    kept = tmp_path / "kept" / "f" / "file"
    seen = []

    def read(path: Path) -> str:
        seen.append(path)
        if len(seen) == 1:
            kept.parent.mkdir(parents=True)
            os.link(tmp_path / "file", kept)
            (tmp_path / "new").write_text("new")
            os.replace(tmp_path / "new", tmp_path / "file")
        return path.read_text()

    assert CacheFiles(root=tmp_path, fingerprint="f").read("file", read) == "old"
    assert seen == [tmp_path / "file", kept]
    assert CacheFiles(root=tmp_path).read("file", Path.read_text) == "new"
