"""The words beside a run's features, so that nobody needs a language model to show them: token strings, logit lens.

RUN/features/lens.json says for each latent which token ids its decoder direction promotes and suppresses, and by how
much. RUN/features/tokens.json is {token id: string} of these and of all in the validation split. It is written last:
where it is, what a report draws of the run is complete.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import ConfigError, ManifestError, ModelError
from actcache.files import write_atomically
from actcache.store.cache import Cache
from trainer.features.logit_lens import LogitLens, TokenLogit, logit_lens
from trainer.features.read import FOLDER
from trainer.features.text import Model
from trainer.features.token_strings import token_strings
from trainer.formats.saelens import load_sae
from trainer.run_folder import read_json

TOKENS_FILE, LENS_FILE = "tokens.json", "lens.json"
N_LENS = 10  # tokens that are promoted, and as many that are suppressed, of each latent

Weighed = tuple[int, float]  # a token id, and what its logit gains from one unit of activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """The tokens whose logits a decoder direction raises, and lowers, most; the most changed first."""

    promoted: tuple[Weighed, ...]
    suppressed: tuple[Weighed, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What RUN/features says in words. lens: of each latent; None where a logit lens makes no sense."""

    tokens: dict[int, str]
    lens: tuple[Lens, ...] | None

    def text(self, token_id: int) -> str:
        """The token as it stands in a text; its number in brackets if it was not there when these were written."""
        return self.tokens.get(token_id, f"[{token_id}]")


def has_words(run: Path | str) -> bool:
    """Whether the words of a run's features are written, and so its features built."""
    return (Path(run) / FOLDER / TOKENS_FILE).is_file()


def write_words(run: Path | str, cache: Cache, model: Model) -> None:
    """Write RUN/features/lens.json and tokens.json, of an SAE that `load_sae` takes; nothing to do if they are there.

    No lens.json is written for an SAE whose latents are not directions of the residual stream, nor for a model without
    an output head.
    """
    folder = Path(run) / FOLDER
    if has_words(run):
        return
    lens = _logit_lens(run, model)
    if lens is not None:
        _write(folder / LENS_FILE, {"latents": [{"promoted": p, "suppressed": s} for p, s in lens]})
    shown = {token_id for ends in lens or () for end in ends for token_id, _ in end}
    ids = sorted(shown.union(np.unique(cache.sequences("validation")).tolist()))
    _write(folder / TOKENS_FILE, {str(i): text for i, text in token_strings(model.tokenizer, ids).items()})


def read_words(run: Path | str) -> Words:
    """What `write_words` wrote.

    Raises:
        ManifestError: tokens.json is not there, or a file is not what it should be.
    """
    folder = Path(run) / FOLDER
    if not has_words(run):
        raise ManifestError(
            f"{run}: must have its features built, it has no {FOLDER}/{TOKENS_FILE}; run `actcache features {run}`"
        )
    has_lens = (folder / LENS_FILE).is_file()
    try:
        tokens = {int(token_id): str(text) for token_id, text in read_json(folder / TOKENS_FILE).items()}
        lens = tuple(_lens(row) for row in read_json(folder / LENS_FILE)["latents"]) if has_lens else None
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"{folder}: {TOKENS_FILE} and {LENS_FILE} must hold strings and the lens of each latent, got "
            f"{type(error).__name__}: {error}; remove {folder} and build it anew"
        ) from error
    return Words(tokens=tokens, lens=lens)


def _logit_lens(run: Path | str, model: Model) -> list[tuple[list[Weighed], list[Weighed]]] | None:
    """(promoted, suppressed) of each latent; None where there is no lens to be had."""
    sae = load_sae(run)
    try:
        found: Sequence[LogitLens] = logit_lens(sae, model, range(sae.d_sae), N_LENS)
    except (ConfigError, ModelError):
        return None
    return [(_weighed(latent.promoted), _weighed(latent.suppressed)) for latent in found]


def _weighed(tokens: Sequence[TokenLogit]) -> list[Weighed]:
    """Four digits are more than anyone reads, and a fourth of the file."""
    return [(token.token_id, float(f"{token.logit:.4g}")) for token in tokens]


def _lens(row: dict[str, Any]) -> Lens:
    return Lens(
        promoted=tuple((int(token_id), float(logit)) for token_id, logit in row["promoted"]),
        suppressed=tuple((int(token_id), float(logit)) for token_id, logit in row["suppressed"]),
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    write_atomically(path, [text.encode()])
