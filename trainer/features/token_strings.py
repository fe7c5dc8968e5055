"""Token ids as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

UNDECODED = "\ufffd"  # a decoder gives it for bytes that are not a whole character


def token_string(tokenizer: Any, token_id: int) -> str:
    """A token as it stands in a text, with its leading space. A piece of a character becomes U+FFFD.

    tokenizer: any tokenizer of transformers; None if the model has none, and its tokens have no name but [id].
    """
    if tokenizer is None:
        return f"[{token_id}]"
    text = tokenizer.decode([token_id])
    # Decoded alone, a token of a SentencePiece tokenizer loses its leading space.
    marked = str(tokenizer.convert_ids_to_tokens(token_id)).startswith("▁")
    return f" {text}" if marked and not text.startswith(" ") else text


def token_strings(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Each token as it stands in a text, with its leading space.

    A special token keeps its name. A token that is only a piece of a character keeps the bytes that the vocabulary
    writes for it. A model may have more ids than its tokenizer knows; such an id becomes [id].

    tokenizer: as for `token_string`.
    """
    if tokenizer is None:
        return {token_id: token_string(None, token_id) for token_id in ids}
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    strings = {}
    for token_id in ids:
        text = token_string(tokenizer, token_id) if token_id < known else ""
        name = str(tokenizer.convert_ids_to_tokens(token_id)) if token_id < known else f"[{token_id}]"
        strings[token_id] = name if token_id in special or UNDECODED in text or not text else text
    return strings
