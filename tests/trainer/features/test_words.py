"""Token strings join to the text they were cut from; the words of a run are those of its tokenizer and its lens."""

import json

import pytest
from support.tiny_caches import HOOKS
from support.tiny_models import TEXT, make_tokenizer
from support.tiny_saes import make_config, make_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actcache.errors import ManifestError
from trainer.features.logit_lens import logit_lens
from trainer.features.token_strings import token_strings
from trainer.features.words import N_LENS, read_words, write_words
from trainer.formats.saelens import load_sae


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, as Llama 2 and Gemma have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT.replace("\n", " ").split("."), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), sentencepiece_like()], ids=["bytes", "pieces"])
def test_the_strings_of_a_text_join_to_it(tokenizer):
    text = " the old lighthouse keeper climbed the stairs"
    ids = tokenizer.encode(text.removeprefix(" "), add_special_tokens=False)
    strings = token_strings(tokenizer, ids)
    assert "".join(strings[i] for i in ids).removeprefix(" ") == text.removeprefix(" ")
    assert any(string.startswith(" ") and len(string) > 1 for string in strings.values()), "a space is kept"


def test_what_is_no_text_keeps_its_name():
    tokenizer = make_tokenizer()
    pieces = tokenizer.encode("é", add_special_tokens=False)
    assert len(pieces) == 2, "two bytes, of which neither is a character"
    strings = token_strings(tokenizer, [0, 1, *pieces, len(tokenizer) + 3])
    assert list(strings.values()) == ["<bos>", "<eos>", "Ã", "©", f"[{len(tokenizer) + 3}]"]


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


def test_words_that_are_missing_or_damaged(tiny_cache, tiny_model, tmp_path):
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])
    with pytest.raises(ManifestError, match=r"it has no features/tokens\.json; run `actcache features"):
        read_words(run)
    write_words(run, tiny_cache, tiny_model)
    (run / "features" / "lens.json").write_text(json.dumps({"latents": [{"promoted": [[1]]}]}))
    with pytest.raises(ManifestError, match=r"lens\.json must hold .* the lens of each latent, got ValueError"):
        read_words(run)
