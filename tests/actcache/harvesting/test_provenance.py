import shutil

import pytest
from support.adapters import activated, scaled, with_adapters
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import make_model, make_tokenizer

from actcache.errors import CacheMismatch
from actcache.harvesting.provenance import refuse_other_model


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("seed", 1, "seed is 0 there, 1 here"),
        ("context_size", 8, "context_size is 16 there, 8 here"),
        ("codec", "raw", "codec is 'lossless' there, 'raw' here"),
    ],
)
def test_another_configuration_is_refused(tiny_model, tiny_texts, tiny_cache, setting, value, message):
    with pytest.raises(CacheMismatch, match=message):
        harvest_tiny(tiny_model, tiny_texts, tiny_cache.path, **{setting: value})


def test_another_model_is_refused(tiny_gpt2_dir, tiny_texts, tiny_cache):
    from actcache.models.load import load_model

    other = load_model(str(tiny_gpt2_dir), device="cpu")
    with pytest.raises(
        CacheMismatch, match=r"model is .*tiny_llama.* there, .*tiny_gpt2.* here: its weights are others"
    ):
        harvest_tiny(other, tiny_texts, tiny_cache.path)


def test_other_compute_is_warned_about(tiny_model, tiny_texts, tiny_cache, tmp_path, caplog):
    shutil.copytree(tiny_cache.path, tmp_path / "c")
    (tmp_path / "c" / "manifest" / "cache.json").unlink()
    with caplog.at_level("WARNING", logger="actcache"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", batch_size=4)
    assert "another batch_size (8; now 4)" in caplog.text


def test_a_model_that_runs_other_code_is_another_model(tiny_model, tiny_cache):
    brought = {**tiny_cache.identity["model"], "code_sha256": "abc"}
    with pytest.raises(CacheMismatch, match=r"code_sha256 abc there, None here\); .* with --trust-remote-code"):
        refuse_other_model(tiny_cache.path, {**tiny_cache.identity, "model": brought}, tiny_model)
    refuse_other_model(tiny_cache.path, tiny_cache.identity, tiny_model)


def test_a_cache_of_another_revision_of_the_same_model_grows(tiny_llama_dir, tiny_texts, tmp_path, monkeypatch):
    """Formerly no commit was recorded; and a commit may change a README alone."""
    from actcache.models.load import load_model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_llama_dir, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        model = load_model("owner/model", device="cpu")
        assert model.identity["revision"] == commit
        cache = harvest_tiny(model, tiny_texts, tmp_path / "c", tokens=320 if commit < "b" else 640)
        assert cache.identity["model"]["revision"] == "a" * 40
    assert cache.n_rows("train") + cache.n_rows("validation") == 640


def test_an_adapter_that_is_switched_is_another_model(tiny_texts, tmp_path):
    from actcache.models.load import wrap_model

    module = with_adapters()
    model = wrap_model(module, make_tokenizer(), name="adapted")
    harvest_tiny(model, tiny_texts, tmp_path / "c", tokens=640, hook_names=HOOKS[:1])
    for change in (lambda: activated(module, "second"), lambda: scaled(activated(module, "first"), 2)):
        change()
        for settings in ({"tokens": 640}, {"tokens": 800}, {"tokens": 640, "hook_names": HOOKS[:2]}):
            with pytest.raises(
                CacheMismatch, match="its model is 'adapted' there, 'adapted' here: its weights are oth"
            ):
                harvest_tiny(model, tiny_texts, tmp_path / "c", **{"hook_names": HOOKS[:1], **settings})
    scaled(module, 0.5)
    assert harvest_tiny(model, tiny_texts, tmp_path / "c", tokens=800, hook_names=HOOKS[:2]).hook_names == HOOKS[:2]


def test_a_cache_goes_on_where_rounding_differs(tiny_llama_dir, tiny_texts, tmp_path):
    """Its identity keeps the values that the first model gave."""
    from actcache.models.load import load_model

    first, second = (
        load_model(tiny_llama_dir, device="cpu", dtype="bfloat16", attention=attention)
        for attention in ("eager", "sdpa")
    )
    assert first.probe() != second.probe()
    begun = harvest_tiny(first, tiny_texts, tmp_path / "c", tokens=640, hook_names=HOOKS[:1])
    grown = harvest_tiny(second, tiny_texts, tmp_path / "c", tokens=800, hook_names=HOOKS[:2])
    assert grown.identity == begun.identity
    assert begun.identity["model"]["probe"] == first.probe()


def test_a_cache_under_another_name_goes_on(tiny_texts, tmp_path):
    from actcache.models.load import wrap_model

    names = ("gpt2-small", "openai-community/gpt2")
    first, second = (wrap_model(make_model("gpt2", 512), make_tokenizer(), name=name) for name in names)
    begun = harvest_tiny(first, tiny_texts, tmp_path / "c", tokens=640, hook_names=HOOKS[:1])
    grown = harvest_tiny(second, tiny_texts, tmp_path / "c", tokens=800, hook_names=HOOKS[:2])
    assert grown.identity == begun.identity
