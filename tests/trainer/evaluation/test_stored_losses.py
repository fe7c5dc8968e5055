"""What is kept of the losses below the cache, when it is read again, and when not."""

import re
from pathlib import Path

import pytest
from support.evaluation_cases import HOOK, counted, make_sae, new_cache, new_model
from support.tiny_caches import promised_files

from actcache.errors import ManifestError
from actcache.format.seal import seal, unseal
from actcache.integrity.verify import verify
from actcache.models.language_model import LanguageModel
from actcache.store.cache import Cache
from trainer.evaluation.evaluate import evaluate_all
from trainer.evaluation.stored_losses import LOSSES


@pytest.fixture
def cache(model: LanguageModel, tmp_path: Path) -> Cache:
    """A cache of which nothing is kept yet."""
    return new_cache(tmp_path / "cache", model)


def test_kept_losses_are_no_part_of_the_cache(cache, model):
    before = promised_files(cache.path)
    evaluate_all([make_sae()], cache, model, model_tokens=96)
    assert sorted(path.name.rpartition("-")[0] for path in (cache.path / LOSSES).iterdir()) == [
        HOOK,
        f"mean-{HOOK}",
        "original",
    ]
    assert promised_files(cache.path) == before
    assert not verify(cache.path).problems


def test_losses_of_something_else_are_not_taken(cache, model, tmp_path):
    """Of fewer tokens, of special ones too, of a copy that says another name: their passes are made."""
    counted([make_sae()], cache, model)
    for options in ({"model_tokens": 64}, {"exclude_special_tokens": False}):
        assert counted([make_sae()], cache, model, **options)[1] == {"whole": 1, HOOK: 3}
    renamed = new_model()
    renamed.identity["name"] = "a copy of tiny"
    assert counted([make_sae()], cache, renamed)[1] == {"whole": 1, HOOK: 3}
    grown = new_cache(tmp_path / "grown", model, tokens=2560)
    (cache.path / LOSSES).rename(grown.path / LOSSES)
    assert counted([make_sae()], grown, model)[1] == {"whole": 1, HOOK: 3}
    assert counted([make_sae()], grown, model)[1] == {"whole": 1, HOOK: 1}


WRONG = ["", "{", "[]", '{"ce": [1.0], "kl": 0.0}', '{"ce": "no", "kl": null}']


@pytest.mark.parametrize("damage", [*WRONG, "other key", "digit", "larger than a float"])
def test_damaged_losses_are_made_anew(damage, cache, model):
    rows, _ = counted([make_sae()], cache, model)
    (path,) = (cache.path / LOSSES).glob(f"{HOOK}-*")
    sound = path.read_text()
    other = {"other key": sound.replace('"tiny"', '"tony"'), "digit": re.sub(r'("kl":\d+\.)\d', r"\g<1>7", sound)}
    values = unseal(sound.encode(), path)
    other["larger than a float"] = seal({"ce": [10**400], "kl": 0, "key": values["key"]}).decode()
    assert sound not in other.values()
    path.write_text(other.get(damage, damage))
    again, passes = counted([make_sae()], cache, model)
    assert (again, passes) == (rows, {"whole": 1, HOOK: 2}), "the mean's losses are sound"
    assert path.read_text() == sound


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only file system")])
def test_a_cache_that_may_not_be_written_to_keeps_nothing(error, cache, model, monkeypatch):
    def refuse(*_: object) -> None:
        raise error

    expected, _ = counted([make_sae()], cache, model)
    for path in (cache.path / LOSSES).iterdir():
        path.unlink()
    # the superuser, who may run this, may write anything
    monkeypatch.setattr("trainer.evaluation.stored_losses.write_atomically", refuse)
    assert counted([make_sae()], cache, model) == (expected, {"whole": 1, HOOK: 3})
    error.errno = 28
    with pytest.raises(OSError, match=r"denied|read-only"):
        counted([make_sae()], cache, model)


def test_losses_are_kept_through_no_link(cache, model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (cache.path / LOSSES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match=r"log/losses: is a link to .*, and nothing is read or written"):
        evaluate_all([make_sae()], cache, model, model_tokens=96)
    assert list((tmp_path / "elsewhere").iterdir()) == []
