import logging
import shutil

import pytest
from support.tiny_caches import HOOKS, harvest_tiny, promised_files
from support.tiny_models import TEXT

from actcache.errors import CacheMismatch


def test_an_unfinished_harvest_is_not_taken_for_a_smaller_one(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (root / "manifest" / "cache.json").unlink()
    with pytest.raises(CacheMismatch, match=r"harvest of 1000 tokens, 500 asked; finish it with --tokens 1000"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=500)
    assert harvest_tiny(tiny_model, tiny_texts, root, tokens=1000).fingerprint


def one_document(folder):
    """A text file, which is one document unless it is asked for by line."""
    path = folder / "one.txt"
    path.write_text("\n".join(f"{number}. {TEXT}" for number in range(6)))
    return path


def harvest_one(model, path, out, caplog, **settings):
    """The rows of each split, and what was warned of."""
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import DatasetSource

    sample_by = settings.pop("sample_by", "document")
    config = HarvestConfig(**{"hook_names": HOOKS[:1], "context_size": 16, "batch_size": 8, **settings})
    caplog.clear()
    with caplog.at_level(logging.WARNING, "actcache"):
        cache = harvest(model, DatasetSource(path=str(path), sample_by=sample_by), config, out)
    return cache.n_rows("train"), cache.n_rows("validation"), caplog.text


def test_an_empty_validation_split_is_said_at_every_harvest(tiny_model, tmp_path, caplog):
    path, out = one_document(tmp_path), tmp_path / "c"
    for _ in range(2):  # the second finds it finished
        n_train, n_validation, said = harvest_one(tiny_model, path, out, caplog)
        assert (n_train > 0, n_validation) == (True, 0)
        for part in (str(out), "validation split is empty", "--holdout", "--sample-by line", "another --out"):
            assert part in said
    n_train, n_validation, said = harvest_one(tiny_model, path, tmp_path / "d", caplog, sample_by="line", holdout=0.3)
    assert (n_train > 0, n_validation > 0, said) == (True, True, "")


def test_held_out_documents_that_fill_no_sequence_are_an_empty_split(tiny_model, tiny_texts, tmp_path, caplog):
    *_, said = harvest_one(tiny_model, tiny_texts, tmp_path / "c", caplog, tokens=32, holdout=0.1)
    assert "validation split is empty (holdout 0.1)" in said


def test_nothing_held_out_on_purpose_is_no_warning(tiny_model, tmp_path, caplog):
    assert harvest_one(tiny_model, one_document(tmp_path), tmp_path / "c", caplog, holdout=0.0)[1:] == (0, "")


def test_an_empty_train_split_is_said(tiny_model, tmp_path, caplog):
    """The one document is held out."""
    n_train, _, said = harvest_one(tiny_model, one_document(tmp_path), tmp_path / "c", caplog, holdout=0.999)
    assert (n_train, "train split is empty" in said, "smaller --holdout" in said) == (0, True, True)


@pytest.mark.parametrize("gap", [(), (0,), (0, 1), (1,)], ids=str)
def test_unplanned_sequences_go_though_a_kill_left_a_gap(tiny_model, tiny_texts, sound, tmp_path, gap, small_chunks):
    """A run that asked for more tokens was killed, and so was the one that removed its shards."""
    from support.repairs import SETTINGS

    root = shutil.copytree(sound["lossless"], tmp_path / "c")
    (root / "manifest" / "cache.json").unlink()
    ids = root / "acts.zarr" / "train" / "sequences" / "id" / "c"
    planned = len(list(ids.iterdir()))
    for extra in {0, 1, 2, 3} - {*gap}:
        shutil.copytree(ids / "0", ids / f"{planned + extra}")
    for stray in ("01", "x", ".DS_Store"):
        (ids / stray).touch()
    harvest_tiny(tiny_model, tiny_texts, root, **SETTINGS)
    for stray in ("01", "x", ".DS_Store"):
        (ids / stray).unlink()
    assert promised_files(root) == promised_files(sound["lossless"])
