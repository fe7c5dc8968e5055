"""The features of a run, read: `open_features` maps what `build_features` wrote, and `Features` answers questions.

RUN/features/ holds these files.

    source.json                        which SAE and which cache the features are of
    rows.json                          the rows of each hook that were encoded, whatever other hooks the cache holds
    codes-<first token>.safetensors    what fires on the tokens of a shard (`feature_acts`); several where much fires
    latents.safetensors                n_fired and max_act of every latent; it is written last
    crc32c.json                        checksums of these files, and of those of `words`
    lock                               one process at a time builds the features

Special tokens are not encoded. Activations are those of `SAE.encode`. Only abstopk has negative ones, and "largest"
always means largest in magnitude.
"""

import bisect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from actcache.arguments import local_path, shown, typed, whole_number
from actcache.errors import CacheMismatch, ConfigError, ManifestError
from actcache.files import NoFile, is_file, listed, refuse_links
from trainer.checksums import CHECKSUMS_FILE, Checksums, check_file, file_crc32c, read_checksums
from trainer.features.feature_acts import WAY_OUT, Codes, damaged, map_arrays, map_codes
from trainer.formats.saelens import CONFIG_FILE as SAE_CONFIG_FILE
from trainer.formats.saelens import WEIGHTS_FILE, check_sae
from trainer.run_folder import SAE_FOLDER, only_writer, read_json

SPLIT = "validation"
FOLDER, SOURCE_FILE, LATENTS_FILE, CODES = "features", "source.json", "latents.safetensors", "codes-*.safetensors"
LOCK_FILE, ROWS_FILE = "lock", "rows.json"
FORMAT_VERSION = 1
BINS = 40  # of a histogram of activations
WINDOW = (10, 10)  # tokens shown before and after the one that a context is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A token on which a latent fires, with the tokens around it in the same sequence.

    Attributes:
        sequence: the sequence of the split that holds the token.
        position: the position of the token in the sequence.
        act: the latent's activation on it.
        token_ids: the ids of the tokens shown.
        acts: the latent's activation on each of these, 0.0 where it does not fire.
        peak: the index of the token among these.
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

    A question about a latent reads its own entries alone, 8 bytes for each token on which it fires. `coactive` also
    reads all latents of these tokens, one file after another.

    Attributes:
        d_sae: the number of latents.
        n_tokens: how many tokens were encoded. Special tokens are not.
        context_size: tokens in a sequence.
        cache_fingerprint: the fingerprint of the cache that was encoded.
        n_fired: on how many tokens each latent fires; n_fired / n_tokens is its density.
        max_act: the largest activation of each latent, in magnitude; 0 where it never fires.
        codes: the entries of all tokens, in the order of the split.
    """

    d_sae: int
    n_tokens: int
    context_size: int
    cache_fingerprint: str
    n_fired: Int64[np.ndarray, " d_sae"]
    max_act: Float32[np.ndarray, " d_sae"]
    codes: tuple[Codes, ...]

    def top(self, latent: int, n: int = 20, *, window: tuple[int, int] = WINDOW) -> list[Context]:
        """The n tokens with the largest activations of a latent, largest first; of equal ones the first in the split.

        Args:
            latent: the number of the latent.
            n: how many tokens.
            window: how many tokens of the sequence to show before and after each.

        Raises:
            ConfigError: there is no such latent, or n is less than 1.
        """
        tokens, acts = self._entries(latent)
        return [self._context(tokens, acts, entry, window) for entry in _largest(np.abs(acts), n)]

    def bands(self, latent: int, n_bands: int = 5, n_each: int = 4) -> list[list[Context]]:
        """Some tokens from each band of a latent's activations. The bands cut (0, max_act] into equal parts.

        The strongest band comes first. A band's tokens are drawn at random, the same at every call, and ordered by
        their activations, largest first. A band may be empty.

        Args:
            latent: the number of the latent.
            n_bands: how many bands.
            n_each: how many tokens of a band, at most.

        Raises:
            ConfigError: there is no such latent, or a number is less than 1.
        """
        whole_number("features", "n_bands", n_bands, 1)
        whole_number("features", "n_each", n_each, 1)
        tokens, acts = self._entries(latent)
        sizes = np.abs(acts).astype(np.float64)
        band = n_bands - np.ceil(sizes * n_bands / self.max_act[latent])
        drawn = np.random.Philox(key=latent).random_raw(len(tokens))
        inside = [np.flatnonzero(band == number) for number in range(n_bands)]
        chosen = [entries[np.argsort(drawn[entries], kind="stable")[:n_each]] for entries in inside]
        ordered = [entries[np.lexsort((entries, -sizes[entries]))] for entries in chosen]
        return [[self._context(tokens, acts, entry, WINDOW) for entry in entries.tolist()] for entries in ordered]

    def histogram(self, latent: int) -> tuple[Int64[np.ndarray, " bins"], Float64[np.ndarray, " bins_plus_1"]]:
        """(counts, edges) of a latent's activations on the tokens on which it fires, in BINS equal bins.

        The bins go from 0, or from the most negative activation if there is one (abstopk), to the largest. The last bin
        includes its right edge. All edges are 0 if the latent never fires. Raises ConfigError if there is no such
        latent.
        """
        _, acts = self._entries(latent)
        edges = np.linspace(float(acts.min(initial=0.0)), float(acts.max(initial=0.0)), BINS + 1)
        counts, _ = np.histogram(acts.astype(np.float64), edges)
        return counts.astype(np.int64), edges

    def coactive(self, latent: int, n: int = 10) -> list[tuple[int, int]]:
        """(other latent, number of tokens on which both fire) of the n latents that fire most often with this one.

        The largest number comes first, and of equal ones the lower latent. A latent that never fires with this one is
        left out. Raises ConfigError as `top`.
        """
        self._check(latent)
        counts = np.zeros(self.d_sae, dtype=np.int64)
        for codes in self.codes:
            tokens, _ = codes.of_latent(latent)
            counts += np.bincount(codes.latents_at(tokens), minlength=self.d_sae)
        counts[latent] = 0
        return [(other, int(counts[other])) for other in _largest(counts, n) if counts[other] > 0]

    def _entries(self, latent: int) -> tuple[Int64[np.ndarray, " entry"], Float32[np.ndarray, " entry"]]:
        """(tokens of the split, activations) on which the latent fires, with ascending tokens."""
        self._check(latent)
        found = [codes.of_latent(latent) for codes in self.codes]
        tokens = [at.astype(np.int64) + codes.first_token for codes, (at, _) in zip(self.codes, found, strict=True)]
        return np.concatenate(tokens), np.concatenate([acts for _, acts in found])

    def _context(
        self,
        tokens: Int64[np.ndarray, " entry"],
        acts: Float32[np.ndarray, " entry"],
        entry: int,
        window: tuple[int, int],
    ) -> Context:
        """The context of one entry of a latent, given all of its entries."""
        token = int(tokens[entry])
        sequence, position = divmod(token, self.context_size)
        start = token - min(position, window[0])
        stop = token + min(self.context_size - 1 - position, window[1]) + 1
        first, last = np.searchsorted(tokens, (start, stop)).tolist()
        shown = np.zeros(stop - start, dtype=np.float32)
        shown[tokens[first:last] - start] = acts[first:last]
        return Context(
            sequence=sequence,
            position=position,
            act=float(acts[entry]),
            token_ids=self._token_ids(start, stop),
            acts=tuple(shown.tolist()),
            peak=token - start,
        )

    def _token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """The ids of tokens [start, stop) of the split, which several files may hold."""
        ids: list[int] = []
        number = bisect.bisect_right(self.codes, start, key=lambda codes: codes.first_token) - 1
        while start < stop:
            codes = self.codes[number]
            end = min(stop, codes.stop)
            ids += codes.ids(start - codes.first_token, end - codes.first_token)
            start, number = end, number + 1
        return tuple(ids)

    def _check(self, latent: int) -> None:
        if not 0 <= typed("features", "a latent", latent, int) < self.d_sae:
            raise ConfigError(f"features: a latent must be in [0, d_sae={self.d_sae}), got {latent}")


def only_builder(folder: Path) -> AbstractContextManager[None]:
    """Let no other process write into a RUN/features meanwhile. Raises as `only_writer`."""
    refuse_links(folder.parent)  # the folder itself may be one
    return only_writer(
        folder, LOCK_FILE, "is building these features", "features cannot be written; pass a copy of the run"
    )


def open_features(run: Path | str) -> Features:
    """Map the features that `build_features` wrote for a RUN folder.

    Raises:
        ManifestError: they were not built, the build did not end, or a file is damaged.
        CacheMismatch: they are of another SAE than the run holds now.
    """
    run = local_path(run)
    folder = run / FOLDER
    if not is_file(folder / LATENTS_FILE):
        found = "only a part of them is there" if is_file(folder / SOURCE_FILE) else f"there is no {FOLDER}/"
        raise ManifestError(f"{run}: its features must be built, {found}; run `actcache features {run}`")
    checksums = read_checksums(folder / CHECKSUMS_FILE, warns=True)
    source, codes = read_source(folder, SOURCE_FILE, checksums), map_all_codes(folder, checksums)
    latents = map_arrays(folder / LATENTS_FILE, checksums)
    check_source(folder, source, {"sae_crc32c": sae_checksums(run), "format_version": FORMAT_VERSION})
    try:
        whole = codes[-1].stop == source["n_rows"] and all(len(c.latent_start) == source["d_sae"] + 1 for c in codes)
        fields = {name: source[name] for name in ("d_sae", "n_tokens", "context_size", "cache_fingerprint")}
        are_counts = all(
            type(fields[name]) is int and fields[name] >= 1 for name in ("d_sae", "n_tokens", "context_size")
        )
        if not are_counts or fields["n_tokens"] > codes[-1].stop or codes[-1].stop % fields["context_size"]:
            raise damaged(folder / SOURCE_FILE, ValueError(f"its counts are {shown(fields)}"))
        _check_latents(folder / LATENTS_FILE, latents, fields["d_sae"], fields["n_tokens"])
        features = Features(**fields, n_fired=latents["n_fired"], max_act=latents["max_act"], codes=codes)
    except (KeyError, IndexError, TypeError) as error:
        raise damaged(folder / SOURCE_FILE, error) from error
    if not whole:
        raise ManifestError(f"{folder}: its files must hold all {source['n_rows']} rows; remove it and build it anew")
    return features


def _check_latents(path: Path, latents: Mapping[str, np.ndarray], d_sae: int, n_tokens: int) -> None:
    """Raise ManifestError unless latents.safetensors holds a count and a finite activation for each latent."""
    n_fired, max_act = latents["n_fired"], latents["max_act"]
    for name, dtype in (("n_fired", np.int64), ("max_act", np.float32)):
        values = latents[name]
        if values.shape != (d_sae,) or values.dtype != dtype:
            raise damaged(path, ValueError(f"{name} has the shape {values.shape} and the dtype {values.dtype}"))
    if n_fired.min() < 0 or n_fired.max() > n_tokens:
        raise damaged(path, ValueError(f"n_fired must be in [0, n_tokens={n_tokens}]"))
    if not np.isfinite(max_act).all() or max_act.min() < 0:
        raise damaged(path, ValueError("max_act must be finite and at least 0"))


def read_source(folder: Path, name: str, checksums: Checksums) -> dict[str, Any]:
    """source.json or rows.json of RUN/features/. Raises ManifestError if it is missing, damaged or malformed."""
    check_file(folder / name, checksums, WAY_OUT.format(folder))
    return read_json(folder / name)


def sae_checksums(run: Path) -> list[int]:
    """CRC-32C of the two files of a run's SAE. Raises ManifestError if they are damaged or missing."""
    check_sae(run / SAE_FOLDER)
    files = [run / SAE_FOLDER / name for name in (SAE_CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return [file_crc32c(path) for path in files]
    except NoFile as error:
        raise ManifestError(
            f"features: {run / SAE_FOLDER} must hold the SAE of the run, {SAE_CONFIG_FILE} and {WEIGHTS_FILE}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def check_source(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CacheMismatch unless source.json, which holds `held`, says what is wanted."""
    differing = [
        f"{name} is {shown(held.get(name))} there, {shown(value)} here"
        for name, value in wanted.items()
        if held.get(name) != value
    ]
    if differing:
        raise CacheMismatch(
            f"{folder}: holds features of another cache or SAE: {', '.join(differing)}; remove it to build them anew, "
            "or pass the cache that it is of"
        )


def map_all_codes(folder: Path, checksums: Checksums) -> tuple[Codes, ...]:
    """Map every file of codes, in the order of the split. Raises ManifestError if they leave out a token."""
    paths = [path for path in listed(folder) if path.match(CODES)]
    for path in paths:
        if not re.fullmatch(r"codes-[0-9]{1,18}", path.stem):
            raise ManifestError(f"{path}: must be named for its first token; remove it")
    codes = tuple(map_codes(path, int(path.stem.partition("-")[2]), checksums) for path in paths)
    stop = 0
    for each in codes:
        if each.first_token != stop:
            raise ManifestError(f"{folder}: must hold the codes from token {stop} on; remove it and build it anew")
        stop = each.stop
    return codes


def _largest(sizes: Shaped[np.ndarray, " n"], n: int) -> list[int]:
    """Indices of the n largest sizes, largest first; of equal ones the first."""
    whole_number("features", "n", n, 1)
    cut = np.partition(sizes, len(sizes) - n)[len(sizes) - n] if n < len(sizes) else sizes.min(initial=0)
    candidates = np.flatnonzero(sizes >= cut)
    return candidates[np.argsort(-sizes[candidates], kind="stable")[:n]].tolist()
