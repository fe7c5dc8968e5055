"""Token strings join to the text they were cut from."""

import pytest
from support.tiny_models import TEXT, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.features.token_strings import token_string, token_strings


def test_tokens_keep_their_leading_space():
    byte_level = make_tokenizer()
    assert "".join(token_string(byte_level, i) for i in byte_level("the old cat").input_ids) == "<bos>the old cat"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(["the old cat and the old mat"] * 9, trainers.BpeTrainer(show_progress=False))
    sentence_piece = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = sentence_piece("the old cat").input_ids
    assert sentence_piece.decode(ids[-1:]) == "cat", "decoded alone it loses the space"
    assert [token_string(sentence_piece, i) for i in ids] == [" the", " old", " cat"]


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
