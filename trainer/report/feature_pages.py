"""What the report shows of a run's features, as plain JSON values: the contexts and counts of some latents."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.features.read import Context, Features
from trainer.features.words import Lens, Words

N_TOP = 10  # contexts with the largest activations of a latent
N_BANDS, N_EACH = 5, 3  # bands of the activations, and contexts from each
N_COACTIVE = 8
MIN_FIRED = 10  # tokens on which a latent must fire, so that there are contexts to judge it by
DIGITS = 3  # of a number that is shown


def feature_pages(features: Features, words: Words, n_features: int) -> dict[str, Any]:
    """The pages of the `n_features` most informative latents, in that order.

    Each token string is given once, in `tokens`; a context holds indices into that list. Activations have three digits.

    Args:
        features: the features of the run.
        words: its token strings and logit lens.
        n_features: how many latents to show, at most.
    """
    vocabulary = _Vocabulary(words)
    chosen = most_informative(features, n_features)
    pages = [_page(features, latent, words, vocabulary) for latent in chosen]
    return {
        "n_tokens": features.n_tokens,
        "d_sae": features.d_sae,
        "n_dead": int((features.n_fired == 0).sum()),
        "tokens": vocabulary.strings,
        "latents": pages,
    }


def most_informative(features: Features, n: int) -> list[int]:
    """Up to n latents with the largest max_act * log2(n_tokens / n_fired), of those that fire on MIN_FIRED tokens.

    max_act is how far a latent moves the reconstruction at most, if all decoder rows have the same length. The
    logarithm is the information of its firing, in bits. A latent that fires nearly everywhere tells nothing, and one
    that is always weak moves nothing.
    """
    bits = np.log2(np.maximum(features.n_tokens / np.maximum(features.n_fired, 1), 1.0))
    informs = np.where(features.n_fired >= MIN_FIRED, features.max_act.astype(np.float64) * bits, 0.0)
    ranked = np.argsort(-informs, kind="stable")[:n]
    return [int(latent) for latent in ranked if informs[latent] > 0]


class _Vocabulary:
    """The token strings that contexts use, each once, in the order of their first use."""

    def __init__(self, words: Words):
        self._words, self._indices = words, dict[int, int]()
        self.strings: list[str] = []

    def indices(self, token_ids: Iterable[int]) -> list[int]:
        """The index of each token's string in `strings`."""
        return [self._index(token_id) for token_id in token_ids]

    def _index(self, token_id: int) -> int:
        if token_id not in self._indices:
            self._indices[token_id] = len(self.strings)
            self.strings.append(self._words.text(token_id))
        return self._indices[token_id]


def _page(features: Features, latent: int, words: Words, vocabulary: _Vocabulary) -> dict[str, Any]:
    counts, edges = features.histogram(latent)
    return {
        "latent": latent,
        "n_fired": int(features.n_fired[latent]),
        "max_act": _short(float(features.max_act[latent])),
        "histogram": {"counts": counts.tolist(), "edges": [_short(edge) for edge in edges.tolist()]},
        "top": _contexts(features.top(latent, N_TOP), vocabulary),
        "bands": _bands(features, latent, vocabulary),
        "coactive": [list(pair) for pair in features.coactive(latent, N_COACTIVE)],
        "lens": None if words.lens is None else _lens(words.lens[latent], words),
    }


def _bands(features: Features, latent: int, vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    """The bands of (0, max_act] in which the latent fires, the strongest first."""
    bands = features.bands(latent, n_bands=N_BANDS, n_each=N_EACH)
    limits = np.linspace(float(features.max_act[latent]), 0.0, N_BANDS + 1).tolist()
    return [
        {"from": _short(low), "to": _short(high), "contexts": _contexts(band, vocabulary)}
        for band, (high, low) in zip(bands, pairwise(limits), strict=True)
        if band
    ]


def _contexts(contexts: Sequence[Context], vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "at": [context.sequence, context.position],
            "peak": context.peak,
            "tokens": vocabulary.indices(context.token_ids),
            "acts": [_short(act) for act in context.acts],
        }
        for context in contexts
    ]


def _lens(lens: Lens, words: Words) -> dict[str, list[list[Any]]]:
    return {
        "promoted": [[words.text(token_id), _short(logit)] for token_id, logit in lens.promoted],
        "suppressed": [[words.text(token_id), _short(logit)] for token_id, logit in lens.suppressed],
    }


def _short(value: float) -> float | int:
    """The value with DIGITS digits. A whole number becomes an int."""
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
