"""What every latent of an SAE fires on: one pass over the validation split, sparse all the way, kept beside the run.

RUN/features/ holds source.json (of which SAE and which cache), one `codes-<first token>.safetensors` for each shard of
the split, or several where much fires (`feature_acts`), and at last latents.safetensors, n_fired and max_act. Every
file is written aside and renamed; a build that was killed goes on after the last one that is there. One process builds
at a time, by a lock on `lock`.

Special tokens are not encoded, as in training. Activations are those of `SAE.encode`; only abstopk has negative ones,
and wherever the largest is spoken of it is the largest in magnitude.
"""

import bisect
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64, Shaped
from torch import Tensor

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, DatasetError, ManifestError
from actcache.format.codecs import crc32c
from actcache.loading.filters import RowFilter
from actcache.store.cache import Cache
from actcache.store.reader import HookReader
from actcache.store.zarr_metadata import make_folder, remove_partials, write_atomically
from trainer.features.feature_acts import Codes, SparseEncoder, damaged, map_arrays, map_codes, write_codes
from trainer.formats.saelens import CONFIG_FILE as SAE_CONFIG_FILE
from trainer.formats.saelens import SAE, WEIGHTS_FILE, load_sae
from trainer.training.run import CONFIG_FILE, FAILED_FILE, SAE_FOLDER, read_json, write_json

SPLIT = "validation"
FOLDER, SOURCE_FILE, LATENTS_FILE, CODES = "features", "source.json", "latents.safetensors", "codes-*.safetensors"
LOCK_FILE = "lock"
FORMAT_VERSION = 1
FILE_ENTRIES = 1 << 22  # after this many a file ends before its shard does: sorting them takes 250 MB
BINS = 40
WINDOW = (10, 10)  # tokens shown before and after the one that a context is about

Progress = Callable[[int, int], None]  # rows of the split done, and in all


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


def build_features(
    run: Path | str, cache: Cache, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Features:
    """Encode the validation split with the SAE of a RUN folder into RUN/features/; nothing to do if that is there.

    Memory, however long the split and whatever fires: the stored rows of one shard of each hook that the SAE takes (at
    most 1 GiB a hook) and 32 bytes for each of them; the buffers of one batch of `feature_acts.SparseEncoder`
    (4,096 rows; fewer where [batch, d_sae] would be over 2^24 numbers); and 64 bytes for each of FILE_ENTRIES entries
    and of those of one batch.

    Args:
        run: a finished RUN folder; the SAE may be of any architecture that `load_sae` takes.
        cache: harvested from the model that it was trained on, with its hooks.
        device: where rows are encoded.
        progress: called with rows done, first of all with those that an earlier build did, and rows in all.

    Raises:
        ManifestError: `run` is no RUN folder, is not finished or diverged, or a file of it is damaged.
        CacheMismatch: the cache is of another model, lacks a hook or holds it with another width, or RUN/features is of
            another cache or SAE.
        DatasetError: the validation split has no token that is not special.
        NonFiniteActivations: a latent's activation is NaN or infinite.
        CorruptShard: a chunk of the cache is damaged.
        CacheLocked: another process is building them.
    """
    run = Path(run)
    folder, config = run / FOLDER, _run_config(run)
    sae = load_sae(run, device=device)
    _check_cache(run, config, sae, cache)
    source = _source(run, sae, cache)
    with _only_builder(folder):
        if (folder / SOURCE_FILE).is_file():
            _check_source(folder, read_json(folder / SOURCE_FILE), source)
        else:
            write_json(folder / SOURCE_FILE, source)
        if not (folder / LATENTS_FILE).is_file():
            remove_partials(folder)
            _write_codes(sae, cache, folder, progress)
            _write_latents(folder, _mapped(folder))
    return open_features(run)


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
    source, latents, codes = read_json(folder / SOURCE_FILE), map_arrays(folder / LATENTS_FILE), _mapped(folder)
    _check_source(folder, source, {"sae_crc32c": _sae_checksums(run), "format_version": FORMAT_VERSION})
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


def _run_config(run: Path) -> dict[str, Any]:
    """config.json of a run that did not diverge."""
    if not (run / CONFIG_FILE).is_file():
        raise ManifestError(
            f"features: {run} must be a RUN folder, it has no {CONFIG_FILE}; pass what `actcache train` wrote (a "
            "SAELens directory becomes a RUN by `actcache import`)"
        )
    if (run / FAILED_FILE).is_file():
        raise ManifestError(f"features: {run} diverged: {read_json(run / FAILED_FILE).get('error')}; pass another run")
    return read_json(run / CONFIG_FILE)


def _check_cache(run: Path, config: Mapping[str, Any], sae: SAE, cache: Cache) -> None:
    """The cache must hold the SAE's hooks, of the model that the run names."""
    trained, cached = config.get("model"), cache.identity["model"]
    if not isinstance(trained, dict) or "name" not in trained:
        raise ManifestError(f"features: {run / CONFIG_FILE} must name the model of the run; is it that of a run?")
    revisions = {trained.get("revision"), cached["revision"]} - {None}  # an imported SAE knows none
    if trained["name"] != cached["name"] or len(revisions) > 1:
        raise CacheMismatch(
            f"features: {run} was trained on activations of {trained['name']!r} ({trained.get('revision')}), "
            f"{cache.path} holds those of {cached['name']!r} ({cached['revision']}); pass a cache of the same model"
        )
    held = sum(cache.hook(name).d_in for name in sae.input_hooks)
    if held != sae.d_in:
        raise CacheMismatch(
            f"features: {run} takes {' + '.join(sae.input_hooks)} of width {sae.d_in}, {cache.path} holds {held}; "
            "pass the cache that it was trained on"
        )


def _source(run: Path, sae: SAE, cache: Cache) -> dict[str, Any]:
    """What the features are of, as source.json says it."""
    return {
        "format_version": FORMAT_VERSION,
        "sae_crc32c": _sae_checksums(run),
        "cache_fingerprint": cache.fingerprint,
        "d_sae": sae.d_sae,
        "context_size": cache.context_size,
        "n_rows": cache.n_rows(SPLIT),
        "n_tokens": _n_tokens(cache),
    }


def _n_tokens(cache: Cache) -> int:
    """Tokens of the validation split that are not special. Raises DatasetError if there is none."""
    n_tokens = 0
    if cache.n_rows(SPLIT) > 0:
        n_tokens = RowFilter(cache, SPLIT, (), exclude_special_tokens=True, positions=None, max_norm_ratio=None).n_rows
    if n_tokens == 0:
        raise DatasetError(
            f"features: {cache.path} has no token in its validation split that is not special (holdout "
            f"{cache.identity['holdout']}); harvest with a larger --holdout or more documents"
        )
    return n_tokens


def _sae_checksums(run: Path) -> list[int]:
    """CRC-32C of the two files of its SAE."""
    files = [run / SAE_FOLDER / name for name in (SAE_CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return [crc32c(np.memmap(path, dtype=np.uint8, mode="r")) for path in files]
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"features: {run / SAE_FOLDER} must hold the SAE of the run, {SAE_CONFIG_FILE} and {WEIGHTS_FILE}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_source(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [name for name, value in wanted.items() if held.get(name) != value]
    if differing:
        name = differing[0]
        raise CacheMismatch(
            f"{folder}: holds features of another cache or SAE: {name} is {held.get(name)} there, {wanted[name]} here; "
            "remove it to build them anew, or pass the cache that it is of"
        )


# --- the pass over the split -----------------------------------------------------------------------------------------


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    make_folder(folder)
    with open(folder / LOCK_FILE, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheLocked(f"{folder}: another process is building these features; wait for it") from None
        yield


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shard:
    """A shard of the split in token order. row: of each token, in the shard's rows as stored."""

    first_token: int
    token_id: Int32[np.ndarray, " token"]
    row: Int64[np.ndarray, " token"]
    stored: tuple[tuple[Shaped[np.ndarray, "token _"], ...], ...]  # for each hook, what its reader gave

    @property
    def stop(self) -> int:
        return self.first_token + len(self.token_id)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coded:
    """Consecutive tokens and what fires on them; `token` counts from first_token, on the CPU like the rest."""

    first_token: int
    token_id: Int32[np.ndarray, " batch"]
    ends_shard: bool
    token: Int32[Tensor, " entry"]
    latent: Int32[Tensor, " entry"]
    act: Float32[Tensor, " entry"]

    @property
    def stop(self) -> int:
        return self.first_token + len(self.token_id)


def _write_codes(sae: SAE, cache: Cache, folder: Path, progress: Progress | None) -> None:
    """Every file of codes that is not there yet. A file ends with its shard, or after FILE_ENTRIES entries."""
    there, n_rows = _mapped(folder), cache.n_rows(SPLIT)
    start = there[-1].stop if there else 0
    held: list[_Coded] = []
    if progress is not None:
        progress(start, n_rows)
    for batch in _coded(sae, cache, start):
        held.append(batch)
        if batch.ends_shard or sum(len(each.act) for each in held) >= FILE_ENTRIES:
            _write_file(folder, held, sae.d_sae)
            held = []
        if progress is not None:
            progress(batch.stop, n_rows)


def _write_file(folder: Path, held: Sequence[_Coded], d_sae: int) -> None:
    first = held[0].first_token
    write_codes(
        folder / CODES.replace("*", f"{first:012d}"),
        np.concatenate([batch.token_id for batch in held]),
        torch.cat([batch.token + (batch.first_token - first) for batch in held]),
        torch.cat([batch.latent for batch in held]),
        torch.cat([batch.act for batch in held]),
        d_sae,
    )


def _coded(sae: SAE, cache: Cache, start: int) -> Iterator[_Coded]:
    """All tokens of the split from `start` on, batch after batch; no batch spans two shards."""
    encoder, special = SparseEncoder(sae), np.array(cache.special_token_ids, dtype=np.int32)
    readers = [cache.hook_reader(SPLIT, hook_name) for hook_name in sae.input_hooks]
    for index in range(start // cache.manifest.shard_rows, len(cache.manifest.shards[SPLIT])):
        yield from _coded_shard(encoder, readers, _shard(cache, readers, index), special, start)


def _coded_shard(
    encoder: SparseEncoder,
    readers: Sequence[HookReader],
    shard: _Shard,
    special: Int32[np.ndarray, " special"],
    start: int,
) -> Iterator[_Coded]:
    """The tokens of a shard from `start` on, which may lie before it."""
    for first in range(max(start, shard.first_token), shard.stop, encoder.batch_rows):
        tokens = slice(first - shard.first_token, first - shard.first_token + encoder.batch_rows)
        token_id = shard.token_id[tokens]
        kept = np.flatnonzero(~np.isin(token_id, special))
        row, latent, act = encoder.entries(_rows(readers, shard, shard.row[tokens][kept]))
        yield _Coded(
            first_token=first,
            token_id=token_id,
            ends_shard=first + len(token_id) == shard.stop,
            token=torch.from_numpy(kept.astype(np.int32))[row.cpu()],
            latent=latent.int().cpu(),
            act=act.float().cpu(),
        )


def _shard(cache: Cache, readers: Sequence[HookReader], index: int) -> _Shard:
    first = index * cache.manifest.shard_rows
    stop = min(first + cache.manifest.shard_rows, cache.n_rows(SPLIT))
    token_id, sequence, position = (
        cache.token_reader(SPLIT, name).read(first, stop) for name in ("id", "sequence", "position")
    )
    row = np.argsort(sequence.astype(np.int64) * cache.context_size + position)
    stored = tuple(reader.read_stored(first, stop) for reader in readers)
    return _Shard(first_token=first, token_id=token_id[row], row=row, stored=stored)


def _rows(readers: Sequence[HookReader], shard: _Shard, row: Int64[np.ndarray, " kept"]) -> Float[Tensor, "kept d_in"]:
    """Stored rows of a shard in the order asked, those of all hooks side by side."""
    parts = [
        reader.values(reader.tensors([part[row] for part in stored]))
        for reader, stored in zip(readers, shard.stored, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _mapped(folder: Path) -> tuple[Codes, ...]:
    """The files of codes that are there, which follow each other from token 0 on. Raises ManifestError."""
    codes = tuple(map_codes(path, int(path.stem.partition("-")[2])) for path in sorted(folder.glob(CODES)))
    stop = 0
    for each in codes:
        if each.first_token != stop:
            raise ManifestError(f"{folder}: must hold the codes from token {stop} on; remove it and build it anew")
        stop = each.stop
    return codes


def _write_latents(folder: Path, codes: Sequence[Codes]) -> None:
    """n_fired and max_act of every latent, one file of codes after the other; this makes the features whole."""
    d_sae = len(codes[0].latent_start) - 1
    n_fired, max_act = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae, dtype=np.float32)
    for each in codes:
        fired = np.diff(each.latent_start)
        n_fired += fired
        there = np.flatnonzero(fired)
        if len(there):
            largest = np.maximum.reduceat(np.abs(each.act_by_latent), each.latent_start[there])
            max_act[there] = np.maximum(max_act[there], largest)
    stored = safetensors.numpy.save({"n_fired": n_fired, "max_act": max_act})
    write_atomically(folder / LATENTS_FILE, [stored])


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
