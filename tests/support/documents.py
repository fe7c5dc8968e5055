"""A few documents, one of them empty, and their token ids."""

from support.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = ["One document.", "", "Another, a little longer than the first one.", "x", "The end of it all, at last." * 5]


def token_lists() -> list[list[int]]:
    lists = TOKENIZER([text for text in TEXTS if text], add_special_tokens=False)["input_ids"]
    return [*lists, [0, 5, 6, 7], [0], list(range(2, 40)), [9]]  # two that begin with BOS themselves
