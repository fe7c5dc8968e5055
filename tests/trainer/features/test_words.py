"""The words of a run are those of its tokenizer and of its logit lens."""

import json

import pytest
from support.tiny_caches import HOOKS
from support.tiny_saes import make_config, make_run

from actcache.errors import ManifestError
from trainer.features.build import build_features
from trainer.features.logit_lens import logit_lens
from trainer.features.token_strings import token_strings
from trainer.features.words import N_LENS, has_words, read_words, write_words
from trainer.formats.saelens import load_sae


def test_the_words_of_a_run(tiny_cache, tiny_model, tmp_path):
    config = make_config("topk", d_in=32, hook_name=HOOKS[2])
    run = make_run(tmp_path, config, tiny_cache.identity["model"])
    write_words(run, tiny_cache, tiny_model)
    words = read_words(run)
    ids = set(tiny_cache.sequences("validation").ravel().tolist())
    lens = logit_lens(load_sae(run), tiny_model, range(config.d_sae), N_LENS)
    shown = {token.token_id for latent in lens for token in (*latent.promoted, *latent.suppressed)}
    assert words.tokens == token_strings(tiny_model.tokenizer, ids | shown)
    assert words.lens is not None
    for got, wanted in zip(words.lens, lens, strict=True):
        assert [i for i, _ in got.promoted] == [token.token_id for token in wanted.promoted]
        assert [i for i, _ in got.suppressed] == [token.token_id for token in wanted.suppressed]
        for (_, logit), token in zip(got.promoted, wanted.promoted, strict=True):
            assert abs(logit - token.logit) <= 5e-4 * abs(token.logit), "four digits"
    assert words.text(10**6) == "[1000000]"

    before = (run / "features" / "tokens.json").stat().st_mtime_ns
    write_words(run, tiny_cache, tiny_model)
    assert (run / "features" / "tokens.json").stat().st_mtime_ns == before, "nothing to do"


def test_a_crosscoder_has_words_but_no_lens(tiny_cache, tiny_model, tmp_path):
    run = make_run(tmp_path, make_config("crosscoder"), tiny_cache.identity["model"])
    write_words(run, tiny_cache, tiny_model)
    assert read_words(run).lens is None


def test_a_lens_of_too_few_latents_or_too_many_tokens_is_named(tiny_cache, tiny_model, tmp_path):
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])
    build_features(run, tiny_cache)
    write_words(run, tiny_cache, tiny_model)
    (run / "features" / "crc32c.json").unlink()
    path = run / "features" / "lens.json"
    latents = json.loads(path.read_bytes())["latents"]
    for lie in (latents[:-1], [*latents, latents[0]], [{**latents[0], "promoted": [[1, 1.0]] * 11}, *latents[1:]]):
        path.write_text(json.dumps({"latents": lie}))
        with pytest.raises(ManifestError, match=r"lens\.json must hold .* the lens of each latent, got ValueError"):
            read_words(run)


def test_words_that_are_missing_or_damaged(tiny_cache, tiny_model, tmp_path):
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])
    with pytest.raises(ManifestError, match=r"it has no features/tokens\.json; run `actcache features"):
        read_words(run)
    write_words(run, tiny_cache, tiny_model)
    for name in ("lens.json", "tokens.json"):
        path = run / "features" / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"1", b"2", 1))
        with pytest.raises(ManifestError, match=rf"{name}: is damaged: .* remove .*features and build it anew"):
            read_words(run)
        path.write_bytes(whole)
    (run / "features" / "lens.json").rename(run / "aside")
    with pytest.raises(ManifestError, match=r"lens\.json: is missing"):
        read_words(run)
    (run / "aside").rename(run / "features" / "lens.json")
    (run / "features" / "tokens.json").unlink()
    assert has_words(run), "a report may not leave them out without a word"
    with pytest.raises(ManifestError, match=r"tokens\.json: is missing.* remove .*features and build it anew"):
        read_words(run)
    (run / "features" / "crc32c.json").unlink()
    assert not has_words(run)
    write_words(run, tiny_cache, tiny_model)
    (run / "features" / "crc32c.json").unlink()
    for pair in ([1], [1, 2, 3], [1, 10**400], [1, float("nan")], [True, 1.0], [[1], 1.0], ["1", 1.0], "ab", None):
        (run / "features" / "lens.json").write_text(json.dumps({"latents": [{"promoted": [pair], "suppressed": []}]}))
        with pytest.raises(
            ManifestError, match=r"lens\.json must hold .* the lens of each latent, got (Value|Type)Err"
        ):
            read_words(run)
