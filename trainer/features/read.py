"""What every latent of an SAE fires on: one pass over the validation split, sparse all the way, kept beside the run.

RUN/features/ holds source.json (of which SAE and which cache), one `codes-<first token>.safetensors` for each shard of
the split, or several where much fires (`feature_acts`), and at last latents.safetensors, n_fired and max_act. Every
file is written aside and renamed; a build that was killed goes on after the last one that is there. One process builds
at a time, by a lock on `lock`.

Special tokens are not encoded, as in training. Activations are those of `SAE.encode`; only abstopk has negative ones,
and wherever the largest is spoken of it is the largest in magnitude.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from actcache.errors import CacheMismatch, ConfigError, ManifestError
from actcache.format.codecs import crc32c
from trainer.features.feature_acts import Codes, damaged, map_arrays, map_codes
from trainer.formats.saelens import CONFIG_FILE as SAE_CONFIG_FILE
from trainer.formats.saelens import WEIGHTS_FILE
from trainer.run_folder import SAE_FOLDER, read_json

SPLIT = "validation"
FOLDER, SOURCE_FILE, LATENTS_FILE, CODES = "features", "source.json", "latents.safetensors", "codes-*.safetensors"
FORMAT_VERSION = 1
BINS = 40
WINDOW = (10, 10)  # tokens shown before and after the one that a context is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A token on which a latent fires, with the tokens around it in the same sequence.

    sequence, position: where it is in the split. act: its activation. token_ids, acts: of the tokens shown, 0.0 where
    the latent does not fire; `peak` is its own place among them.
    """

    sequence: int
    position: int
    act: float
    token_ids: tuple[int, ...]
    acts: tuple[float, ...]
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The features of one SAE on the validation split, read from mapped files.

    n_tokens: encoded, that is not special; n_fired: on how many of them each latent fires, so that n_fired / n_tokens
    is its density. max_act: its largest activation, in magnitude; 0 where it never fires. cache_fingerprint: of the
    cache that was encoded.

    Asking about a latent reads its own entries alone, 8 bytes for each token it fires on; `coactive` reads all latents
    of these tokens too, one file after the other.
    """

    d_sae: int
    n_tokens: int
    context_size: int
    cache_fingerprint: str
    n_fired: Int64[np.ndarray, " d_sae"]
    max_act: Float32[np.ndarray, " d_sae"]
    codes: tuple[Codes, ...]

    def top(self, latent: int, n: int = 20, *, window: tuple[int, int] = WINDOW) -> list[Context]:
        """The n tokens with the largest activations, largest first; of equal ones the first in the split.

        window: how many tokens of the sequence to show before and after each. Raises ConfigError if there is no such
        latent, or n is less than 1.
        """
        tokens, acts = self._entries(latent)
        return [self._context(tokens, acts, place, window) for place in _largest(np.abs(acts), n)]

    def bands(self, latent: int, n_bands: int = 5, n_each: int = 4) -> list[list[Context]]:
        """From each of n_bands equal parts of (0, max_act], the strongest first, up to n_each tokens, largest first.

        Which of a band's tokens is random, the same at every call. A band may be empty. Raises ConfigError as `top`.
        """
        _check_positive(n_bands=n_bands, n_each=n_each)
        tokens, acts = self._entries(latent)
        sizes = np.abs(acts).astype(np.float64)
        band = n_bands - np.ceil(sizes * n_bands / self.max_act[latent])
        drawn = np.random.Philox(key=latent).random_raw(len(tokens))
        inside = [np.flatnonzero(band == number) for number in range(n_bands)]
        chosen = [places[np.argsort(drawn[places], kind="stable")[:n_each]] for places in inside]
        ordered = [places[np.lexsort((places, -sizes[places]))] for places in chosen]
        return [[self._context(tokens, acts, place, WINDOW) for place in places.tolist()] for places in ordered]

    def histogram(self, latent: int) -> tuple[Int64[np.ndarray, " bins"], Float64[np.ndarray, " bins_plus_1"]]:
        """(counts, edges) of the activations on the tokens where it fires: BINS equal bins from 0 to the largest.

        The last bin holds its right edge. From the most negative activation where there is one (abstopk); all edges are
        0 where it never fires. Raises ConfigError if there is no such latent.
        """
        _, acts = self._entries(latent)
        edges = np.linspace(float(acts.min(initial=0.0)), float(acts.max(initial=0.0)), BINS + 1)
        counts, _ = np.histogram(acts.astype(np.float64), edges)
        return counts.astype(np.int64), edges

    def coactive(self, latent: int, n: int = 10) -> list[tuple[int, int]]:
        """(other latent, tokens on which both fire) of the n that fire together with it most, largest first.

        Of equal ones the lower latent; none that never does. Raises ConfigError as `top`.
        """
        self._check(latent)
        counts = np.zeros(self.d_sae, dtype=np.int64)
        for codes in self.codes:
            tokens = codes.token_by_latent[codes.of_latent(latent)]
            counts += np.bincount(codes.latents_at(tokens), minlength=self.d_sae)
        counts[latent] = 0
        return [(other, int(counts[other])) for other in _largest(counts, n) if counts[other] > 0]

    def _entries(self, latent: int) -> tuple[Int64[np.ndarray, " entry"], Float32[np.ndarray, " entry"]]:
        """(tokens of the split, activations) where the latent fires, tokens ascending."""
        self._check(latent)
        where = [codes.of_latent(latent) for codes in self.codes]
        tokens = [
            c.token_by_latent[at].astype(np.int64) + c.first_token for c, at in zip(self.codes, where, strict=True)
        ]
        acts = [c.act_by_latent[at] for c, at in zip(self.codes, where, strict=True)]
        return np.concatenate(tokens), np.concatenate(acts)

    def _context(
        self,
        tokens: Int64[np.ndarray, " entry"],
        acts: Float32[np.ndarray, " entry"],
        place: int,
        window: tuple[int, int],
    ) -> Context:
        """Of the place-th entry of a latent."""
        token = int(tokens[place])
        sequence, position = divmod(token, self.context_size)
        start = token - min(position, window[0])
        stop = token + min(self.context_size - 1 - position, window[1]) + 1
        first, last = np.searchsorted(tokens, (start, stop)).tolist()
        shown = np.zeros(stop - start, dtype=np.float32)
        shown[tokens[first:last] - start] = acts[first:last]
        return Context(
            sequence=sequence,
            position=position,
            act=float(acts[place]),
            token_ids=self._token_ids(start, stop),
            acts=tuple(shown.tolist()),
            peak=token - start,
        )

    def _token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Of tokens [start, stop) of the split, whichever files they are in."""
        ids: list[int] = []
        number = bisect.bisect_right(self.codes, start, key=lambda codes: codes.first_token) - 1
        while start < stop:
            codes = self.codes[number]
            end = min(stop, codes.stop)
            ids += codes.token_id[start - codes.first_token : end - codes.first_token].tolist()
            start, number = end, number + 1
        return tuple(ids)

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"features: a latent must be in [0, d_sae={self.d_sae}), got {latent}")


def open_features(run: Path | str) -> Features:
    """What `build_features` wrote, mapped.

    Raises:
        ManifestError: it was not built, not to the end, or is damaged.
        CacheMismatch: it is of another SAE than the run holds now.
    """
    run = Path(run)
    folder = run / FOLDER
    if not (folder / LATENTS_FILE).is_file():
        found = "only a part of them is there" if (folder / SOURCE_FILE).is_file() else f"there is no {FOLDER}/"
        raise ManifestError(f"{run}: its features must be built, {found}; run `actcache features {run}`")
    source, latents, codes = read_json(folder / SOURCE_FILE), map_arrays(folder / LATENTS_FILE), map_all_codes(folder)
    check_source(folder, source, {"sae_crc32c": sae_checksums(run), "format_version": FORMAT_VERSION})
    try:
        whole = codes[-1].stop == source["n_rows"] and all(len(c.latent_start) == source["d_sae"] + 1 for c in codes)
        fields = {name: source[name] for name in ("d_sae", "n_tokens", "context_size", "cache_fingerprint")}
        features = Features(**fields, n_fired=latents["n_fired"], max_act=latents["max_act"], codes=codes)
    except (KeyError, IndexError, TypeError) as error:
        raise damaged(folder / SOURCE_FILE, error) from error
    if not whole:
        raise ManifestError(f"{folder}: its files must hold all {source['n_rows']} rows; remove it and build it anew")
    return features


# --- what is encoded -----------------------------------------------------------------------------------------------


def sae_checksums(run: Path) -> list[int]:
    """CRC-32C of the two files of its SAE."""
    files = [run / SAE_FOLDER / name for name in (SAE_CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return [crc32c(np.memmap(path, dtype=np.uint8, mode="r")) for path in files]
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"features: {run / SAE_FOLDER} must hold the SAE of the run, {SAE_CONFIG_FILE} and {WEIGHTS_FILE}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def check_source(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [name for name, value in wanted.items() if held.get(name) != value]
    if differing:
        name = differing[0]
        raise CacheMismatch(
            f"{folder}: holds features of another cache or SAE: {name} is {held.get(name)} there, {wanted[name]} here; "
            "remove it to build them anew, or pass the cache that it is of"
        )


# --- the pass over the split -----------------------------------------------------------------------------------------


def map_all_codes(folder: Path) -> tuple[Codes, ...]:
    """The files of codes that are there, which follow each other from token 0 on. Raises ManifestError."""
    codes = tuple(map_codes(path, int(path.stem.partition("-")[2])) for path in sorted(folder.glob(CODES)))
    stop = 0
    for each in codes:
        if each.first_token != stop:
            raise ManifestError(f"{folder}: must hold the codes from token {stop} on; remove it and build it anew")
        stop = each.stop
    return codes


# --- choosing -------------------------------------------------------------------------------------------------------


def _largest(sizes: Shaped[np.ndarray, " n"], n: int) -> list[int]:
    """Places of the n largest, largest first; of equal ones the first."""
    _check_positive(n=n)
    cut = np.partition(sizes, len(sizes) - n)[len(sizes) - n] if n < len(sizes) else sizes.min(initial=0)
    candidates = np.flatnonzero(sizes >= cut)
    return candidates[np.argsort(-sizes[candidates], kind="stable")[:n]].tolist()


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"features: {name} must be at least 1, got {count}")
