"""The words beside a run's features: token strings and the logit lens. With them no one needs the model to show them.

RUN/features/lens.json holds the logit lens: for each latent the token ids that its decoder direction promotes and
suppresses, and by how much. RUN/features/tokens.json holds {token id: string} of these tokens and of all tokens in the
validation split. It is written last, so a run that has it has all that a report draws.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.arguments import local_path, shown
from actcache.errors import ConfigError, ManifestError, ModelError
from actcache.files import is_file, is_writable, write_atomically
from actcache.store.cache import Cache
from trainer.checksums import CHECKSUMS_FILE, add_checksums, check_file, checksums_of, read_checksums
from trainer.features.feature_acts import WAY_OUT
from trainer.features.logit_lens import LogitLens, TokenLogit, logit_lens
from trainer.features.read import FOLDER, LOCK_FILE, SOURCE_FILE, only_builder
from trainer.features.text import Model
from trainer.features.token_strings import token_strings
from trainer.formats.saelens import load_sae
from trainer.run_folder import finite, read_json

TOKENS_FILE, LENS_FILE = "tokens.json", "lens.json"
N_LENS = 10  # promoted tokens of each latent, and as many suppressed ones

TokenWeight = tuple[int, float]  # a token id, and what its logit gains from one unit of activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """The tokens whose logits a decoder direction raises most and lowers most, the most changed first."""

    promoted: tuple[TokenWeight, ...]
    suppressed: tuple[TokenWeight, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What RUN/features says in words.

    Attributes:
        tokens: the string of each token id.
        lens: the logit lens of each latent; None where the SAE or its model has no logit lens.
    """

    tokens: dict[int, str]
    lens: tuple[Lens, ...] | None

    def text(self, token_id: int) -> str:
        """The token as it stands in a text. A token that has no string here becomes [id]."""
        return self.tokens.get(token_id, f"[{token_id}]")


def has_words(run: Path | str) -> bool:
    """Whether the words of a run's features are written, or were. They are written after the features."""
    folder = local_path(run) / FOLDER
    return is_file(folder / TOKENS_FILE) or TOKENS_FILE in read_checksums(folder / CHECKSUMS_FILE)


def may_write_words(run: Path | str) -> bool:
    """Whether this user may write the words of a run's features."""
    return is_writable(local_path(run) / FOLDER / LOCK_FILE)


def write_words(run: Path | str, cache: Cache, model: Model) -> None:
    """Write RUN/features/lens.json and RUN/features/tokens.json. Where they are written already, do nothing.

    No lens.json is written for an SAE whose latents are not directions of the residual stream, nor for a model without
    an output head.

    Args:
        run: a RUN folder whose features are built.
        cache: the cache that they were built from; its validation split says which tokens need strings.
        model: the language model of the cache.

    Raises:
        ManifestError, CacheMismatch: as `load_sae`.
        CacheLocked: another process is building features of this run.
    """
    folder = local_path(run) / FOLDER
    if has_words(run):
        return
    with only_builder(folder):
        lens = _logit_lens(run, model)
        files: dict[str, bytes] = {}  # tokens.json comes last
        if lens is not None:
            files[LENS_FILE] = _json({"latents": [{"promoted": p, "suppressed": s} for p, s in lens]})
        shown = {token_id for ends in lens or () for end in ends for token_id, _ in end}
        ids = sorted(shown.union(np.unique(cache.sequences("validation")).tolist()))
        files[TOKENS_FILE] = _json({str(i): text for i, text in token_strings(model.tokenizer, ids).items()})
        for name, data in files.items():
            write_atomically(folder / name, [data])
        add_checksums(folder / CHECKSUMS_FILE, checksums_of(files))  # last: it says that they were written


def read_words(run: Path | str) -> Words:
    """Read what `write_words` wrote.

    Raises:
        ManifestError: there is no tokens.json, or a file is malformed.
    """
    folder = local_path(run) / FOLDER
    if not has_words(run):
        raise ManifestError(
            f"{run}: must have its features built, it has no {FOLDER}/{TOKENS_FILE}; run `actcache features {run}`"
        )
    checksums = read_checksums(folder / CHECKSUMS_FILE)
    has_lens = is_file(folder / LENS_FILE) or LENS_FILE in checksums
    for name in (TOKENS_FILE, *((LENS_FILE,) if has_lens else ())):
        check_file(folder / name, checksums, WAY_OUT.format(folder))
    try:
        tokens = {int(token_id): str(text) for token_id, text in read_json(folder / TOKENS_FILE).items()}
        lens = tuple(_lens(row) for row in read_json(folder / LENS_FILE)["latents"]) if has_lens else None
        d_sae = read_json(folder / SOURCE_FILE)["d_sae"] if is_file(folder / SOURCE_FILE) else None
        if None not in (lens, d_sae) and len(lens or ()) != d_sae:
            raise ValueError(f"{len(lens or ())} latents, where d_sae is {shown(d_sae)}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ManifestError(
            f"{folder}: {TOKENS_FILE} and {LENS_FILE} must hold strings and the lens of each latent, got "
            f"{type(error).__name__}: {error}; remove {folder} and build it anew"
        ) from error
    return Words(tokens=tokens, lens=lens)


def _logit_lens(run: Path | str, model: Model) -> list[tuple[list[TokenWeight], list[TokenWeight]]] | None:
    """(promoted, suppressed) of each latent; None where the SAE or the model has no logit lens."""
    sae = load_sae(run)
    try:
        found: Sequence[LogitLens] = logit_lens(sae, model, range(sae.d_sae), N_LENS)
    except (ConfigError, ModelError):
        return None
    return [(_token_weights(latent.promoted), _token_weights(latent.suppressed)) for latent in found]


def _token_weights(tokens: Sequence[TokenLogit]) -> list[TokenWeight]:
    """The tokens with logits of four digits: nobody reads more, and the file is a quarter as long."""
    return [(token.token_id, float(f"{token.logit:.4g}")) for token in tokens]


def _lens(row: dict[str, Any]) -> Lens:
    if max(len(row["promoted"]), len(row["suppressed"])) > N_LENS:
        raise ValueError(f"more than {N_LENS} tokens of a latent")
    return Lens(
        promoted=tuple(_token_weight(*pair) for pair in row["promoted"]),
        suppressed=tuple(_token_weight(*pair) for pair in row["suppressed"]),
    )


def _token_weight(token_id: object, logit: object) -> TokenWeight:
    number = finite(logit)
    if type(token_id) is not int or number is None:
        raise ValueError(f"a token {shown(token_id)} with logit {shown(logit)}")
    return token_id, float(number)


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
