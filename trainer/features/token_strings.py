"""Token ids as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

UNDECODED = "\ufffd"  # what a decoder gives for bytes that are no whole character


def token_string(tokenizer: Any, token_id: int) -> str:
    """A token as it stands in a text, with its leading space; U+FFFD for a piece of a character."""
    text = tokenizer.decode([token_id])
    # a tokenizer of the SentencePiece kind takes the space of a first token for its own mark
    marked = str(tokenizer.convert_ids_to_tokens(token_id)).startswith("▁")
    return f" {text}" if marked and not text.startswith(" ") else text


def token_strings(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Each token as it stands in a text, with its leading space.

    A special token keeps its name, and so does one that is only a piece of a character: the bytes, as the vocabulary
    writes them. An id that the tokenizer does not know, as a model may be wider than its vocabulary, is [id].

    tokenizer: any of transformers.
    """
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    strings = {}
    for token_id in ids:
        text = token_string(tokenizer, token_id) if token_id < known else ""
        name = str(tokenizer.convert_ids_to_tokens(token_id)) if token_id < known else f"[{token_id}]"
        strings[token_id] = name if token_id in special or UNDECODED in text or not text else text
    return strings
