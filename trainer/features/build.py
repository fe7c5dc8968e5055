"""`build_features` encodes the validation split once, and writes beside the run what every latent fires on.

`read` says which files it writes. Every file is written aside and renamed. A build that was killed goes on after the
last file that is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Float, Float32, Int32, Int64, Shaped
from torch import Tensor

from actcache.arguments import local_path, shown, typed
from actcache.errors import CacheMismatch, ConfigError, DatasetError, ManifestError
from actcache.files import contents, is_file, remove_leftovers, write_atomically
from actcache.flow import HOLD_OUT_MORE
from actcache.format.manifest import rows_fingerprint
from actcache.loading.filters import RowFilter
from actcache.models.names import same_name
from actcache.store.cache import Cache
from actcache.store.reader import HookReader
from trainer.checksums import CHECKSUMS_FILE, add_checksums, checksums_of, read_checksums, sealed
from trainer.features.feature_acts import SparseEncoder, write_codes
from trainer.features.read import (
    CODES,
    FOLDER,
    FORMAT_VERSION,
    LATENTS_FILE,
    ROWS_FILE,
    SOURCE_FILE,
    SPLIT,
    Features,
    check_source,
    map_all_codes,
    only_builder,
    open_features,
    read_source,
    sae_checksums,
)
from trainer.formats.saelens import load_sae
from trainer.run_folder import CONFIG_FILE, FAILED_FILE, json_bytes, model_of_run, read_run_json
from trainer.sae.sae import SAE

FILE_ENTRIES = 1 << 22  # entries after which a file ends before its shard does; to sort so many takes 250 MB
Progress = Callable[[int, int], None]  # rows done, and rows of the split


def build_features(
    run: Path | str, cache: Cache, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Features:
    """Encode the validation split with the SAE of a RUN folder, and write RUN/features/, unless it is whole already.

    The memory does not depend on the length of the split, nor on how much fires. It is the sum of three parts:
        the stored rows of one shard of each hook that the SAE takes, at most 1 GiB a hook, and 32 bytes for each row;
        the buffers of one batch of `feature_acts.SparseEncoder`: 4,096 rows, or fewer where [batch, d_sae] would hold
            more than 2^24 numbers;
        64 bytes for each of FILE_ENTRIES entries, and for each entry of one batch.

    Args:
        run: a finished RUN folder. Its SAE may have any architecture that `load_sae` takes.
        cache: a cache of the model that the SAE was trained on, with its hooks.
        device: where rows are encoded.
        progress: called with the rows done and the rows in all. The first call counts the rows of earlier builds.

    Returns:
        The features, mapped.

    Raises:
        ConfigError: `device` is no device of this machine, or `cache` no Cache.
        ManifestError: `run` is no RUN folder, is not finished or diverged, or one of its files is damaged.
        CacheMismatch: the cache is of another model, lacks a hook or holds it with another width, or RUN/features is of
            another cache or SAE.
        DatasetError: the validation split has no token that is not special.
        NonFiniteActivations: a latent's activation is NaN or infinite.
        CorruptShard: a chunk of the cache is damaged.
        CacheLocked: another process is building them.
    """
    typed("features", "cache", cache, Cache)
    run = local_path(run)
    folder, config = run / FOLDER, _run_config(run)
    sae = load_sae(run, device=device)
    _check_cache(run, config, sae, cache)
    source, rows = _source(run, sae, cache), _rows_of(sae, cache)
    if is_file(folder / LATENTS_FILE):  # a look needs no lock, and the folder may be read-only
        _check_held(folder, source, rows, cache)
        return open_features(run)
    with only_builder(folder):
        if is_file(folder / SOURCE_FILE):
            _check_held(folder, source, rows, cache)
        else:
            files = {ROWS_FILE: json_bytes(rows), SOURCE_FILE: json_bytes(source)}
            add_checksums(folder / CHECKSUMS_FILE, checksums_of(files))
            for name, data in files.items():
                write_atomically(folder / name, [data])
        if not is_file(folder / LATENTS_FILE):
            remove_leftovers(folder)
            _write_codes(sae, cache, folder, progress)
            _write_latents(folder)
    return open_features(run)


def _run_config(run: Path) -> dict[str, Any]:
    """config.json of a run that did not diverge."""
    if not is_file(run / CONFIG_FILE):
        raise ManifestError(
            f"features: {run} must be a RUN folder, it has no {CONFIG_FILE}; pass what `actcache train` wrote (a "
            "SAELens directory becomes a RUN by `actcache import`)"
        )
    if is_file(run / FAILED_FILE):
        error = read_run_json(run, FAILED_FILE).get("error")
        raise ManifestError(f"features: {run} diverged: {error}; pass another run")
    return read_run_json(run, CONFIG_FILE)


def _check_cache(run: Path, config: Mapping[str, Any], sae: SAE, cache: Cache) -> None:
    """Raise CacheMismatch unless the cache holds the SAE's hooks, of the model that the run names."""
    (trained, revision), cached = model_of_run(run, config), cache.identity["model"]
    revisions = {revision, cached["revision"]} - {None}  # an imported SAE knows no revision
    if not same_name(trained, cached["name"]) or len(revisions) > 1:
        raise CacheMismatch(
            f"features: {run} was trained on activations of {shown(trained)} ({shown(revision)}), "
            f"{cache.path} holds those of {cached['name']!r} ({cached['revision']}); pass a cache of the same model"
        )
    if sae.reads_sequences:
        raise ConfigError(
            f"features: {run} is a {sae.architecture} SAE, which reads whole sequences, and rows are encoded one by "
            "one; pass another run, or look at texts with encode_text"
        )
    held = sum(cache.hook(name).d_in for name in sae.input_hooks)
    if not sae.takes(held):
        raise CacheMismatch(
            f"features: {run} takes {' + '.join(sae.input_hooks)} of width {sae.d_in}, {cache.path} holds {held}; "
            "pass the cache that it was trained on"
        )


def _source(run: Path, sae: SAE, cache: Cache) -> dict[str, Any]:
    """What source.json says: of which SAE and which cache the features are."""
    return {
        "format_version": FORMAT_VERSION,
        "sae_crc32c": sae_checksums(run),
        "cache_fingerprint": cache.fingerprint,
        "d_sae": sae.d_sae,
        "context_size": cache.context_size,
        "n_rows": cache.n_rows(SPLIT),
        "n_tokens": _n_tokens(cache),
    }


def _rows_of(sae: SAE, cache: Cache) -> dict[str, str]:
    """What rows.json says: which rows of each hook are encoded."""
    return {hook_name: rows_fingerprint(cache.manifest, SPLIT, hook_name) for hook_name in sae.input_hooks}


def _check_held(folder: Path, source: Mapping[str, Any], rows: Mapping[str, str], cache: Cache) -> None:
    """Raise CacheMismatch unless the features there, finished or begun, are of this SAE and of these rows.

    The cache may hold more hooks than it held. Features of older versions do not name their rows. They are taken where
    the split has the same tokens; whether its activations are stored in the same dtype and codec cannot be known.
    """
    checksums = read_checksums(folder / CHECKSUMS_FILE)
    held, named = read_source(folder, SOURCE_FILE, checksums), None
    if is_file(folder / ROWS_FILE) or ROWS_FILE in checksums:
        named = read_source(folder, ROWS_FILE, checksums)
    if held.get("cache_fingerprint") != cache.fingerprint:
        if named is not None:
            same = named == rows
        else:
            ids = [np.empty(0, np.int32), *(codes.token_id for codes in map_all_codes(folder, checksums))]
            same = np.array_equal(np.concatenate(ids), cache.sequences(SPLIT).flatten())
        source = {**source, "cache_fingerprint": held.get("cache_fingerprint")} if same else source
    check_source(folder, held, source)


def _n_tokens(cache: Cache) -> int:
    """How many tokens of the validation split are not special. Raises DatasetError if there is none."""
    n_tokens = 0
    if cache.n_rows(SPLIT) > 0:
        n_tokens = RowFilter(cache, SPLIT, (), exclude_special_tokens=True, positions=None, max_norm_ratio=None).n_rows
    if n_tokens == 0:
        raise DatasetError(
            f"features: {cache.path} has no token in its validation split that is not special (holdout "
            f"{cache.identity['holdout']}); {HOLD_OUT_MORE}"
        )
    return n_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shard:
    """A shard of the split, with its tokens in the order of the split.

    Attributes:
        first_token: number of the first token in the split.
        token_id: the id of each token.
        row: the stored row of each token, counted from the shard's first row.
        stored: the stored rows of each hook, as `HookReader.read_stored` gives them.
    """

    first_token: int
    token_id: Int32[np.ndarray, " token"]
    row: Int64[np.ndarray, " token"]
    stored: tuple[tuple[Shaped[np.ndarray, "token _"], ...], ...]

    @property
    def stop(self) -> int:
        return self.first_token + len(self.token_id)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coded:
    """Consecutive tokens and the entries that fire on them, on the CPU.

    Attributes:
        first_token: number of the first token in the split.
        token_id: the id of each token.
        ends_shard: whether the last token ends a shard.
        token: the token of each entry, counted from first_token.
        latent: the latent of each entry.
        act: the activation of each entry.
    """

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
    """Write every file of codes that is not there yet. A file ends with its shard, or after FILE_ENTRIES entries."""
    there, n_rows = map_all_codes(folder, read_checksums(folder / CHECKSUMS_FILE)), cache.n_rows(SPLIT)
    for codes in there:  # of an earlier call, and worth no more work if they are damaged
        codes.file.check(codes.file.bytes)
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
    """Encode all tokens of the split from `start` on, batch after batch. No batch spans two shards."""
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
    """Encode the tokens of one shard from `start` on, or all of them if `start` lies before the shard."""
    for first in range(max(start, shard.first_token), shard.stop, encoder.batch_rows):
        tokens = slice(first - shard.first_token, first - shard.first_token + encoder.batch_rows)
        token_id = shard.token_id[tokens]
        encoded = np.flatnonzero(~np.isin(token_id, special))
        row, latent, act = encoder.entries(_rows(readers, shard, shard.row[tokens][encoded]))
        yield _Coded(
            first_token=first,
            token_id=token_id,
            ends_shard=first + len(token_id) == shard.stop,
            token=torch.from_numpy(encoded.astype(np.int32))[row.cpu()],
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


def _rows(
    readers: Sequence[HookReader], shard: _Shard, row: Int64[np.ndarray, " chosen"]
) -> Float[Tensor, "chosen d_in"]:
    """The chosen rows of a shard, in the order of `row`, with all hooks side by side."""
    parts = [
        reader.values(reader.tensors([part[row] for part in stored]))
        for reader, stored in zip(readers, shard.stored, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _write_latents(folder: Path) -> None:
    """Write n_fired and max_act of every latent, which make the features whole, after their checksum.

    What an older version began has no checksums of its codes: they are of what is there.
    """
    checksums = read_checksums(folder / CHECKSUMS_FILE)
    codes = map_all_codes(folder, checksums)
    d_sae = len(codes[0].latent_start) - 1
    n_fired, max_act = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae, dtype=np.float32)
    for each in codes:
        each.file.check(each.file.bytes)
        fired = np.diff(each.latent_start)
        n_fired += fired
        there = np.flatnonzero(fired)
        if len(there):
            largest = np.maximum.reduceat(np.abs(each.act_by_latent), each.latent_start[there])
            max_act[there] = np.maximum(max_act[there], largest)
    stored = safetensors.numpy.save({"n_fired": n_fired, "max_act": max_act})
    files = {each.file.path.name: each.file.bytes for each in codes}
    files |= {name: contents(folder / name) for name in (SOURCE_FILE, ROWS_FILE) if is_file(folder / name)}
    new = checksums_of({name: data for name, data in files.items() if name not in checksums} | {LATENTS_FILE: stored})
    stray = {name for name in checksums if Path(name).match(CODES)} - {*files}  # a kill left that of a file to come
    held = {name: of for name, of in checksums.items() if name not in stray}
    write_atomically(folder / CHECKSUMS_FILE, [sealed(held | new)])
    write_atomically(folder / LATENTS_FILE, [stored])
