"""Held-out evaluation: all metrics of many SAEs from one pass over the cache, and one walk through the language model.

The rows are those of the validation split. Special tokens are left out, unless they are asked for.
`trainer.sae.metrics` defines the metrics of a reconstruction. `downstream_loss` measures the losses with the model, as
SAELens does: the SAE's reconstruction replaces the hook's activation except at special tokens, zero ablation replaces
it at every token, and special tokens are left out of the means. `baselines` has what SAEs are compared with.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from actcache.arguments import local_path, shown, typed, whole_number
from actcache.errors import CacheMismatch, ConfigError, DatasetError, ManifestError
from actcache.files import is_file, is_folder, refuse_links, require_writable
from actcache.flow import HOLD_OUT_MORE, Batch
from actcache.format.identity import is_imported
from actcache.loading.loader import Loader
from actcache.models.names import same_name
from actcache.store.cache import Cache
from trainer.evaluation.baselines import baselines, is_baseline, trained_as, write_baseline
from trainer.evaluation.downstream_loss import (
    BATCH_TOKENS,
    MODEL_METRICS,
    Model,
    model_metrics,
    piece_rows,
    require_memory_for_logits,
)
from trainer.evaluation.pca import PCA
from trainer.formats.saelens import load_sae
from trainer.run_folder import (
    CONFIG_FILE,
    EVALUATION_FILE,
    FAILED_FILE,
    SAE_FOLDER,
    model_of_run,
    read_run_json,
    run_folders,
    write_run_json,
)
from trainer.sae.metrics import ReconstructionSums
from trainer.sae.sae import SAE

MODEL_TOKENS = 32_768  # tokens of the validation split that run through the model
DENSITY_EDGES = np.linspace(-8.0, 0.0, 33)  # log10 of feature density, in quarters of a decade

Progress = Callable[[int, int], None]  # rows and model tokens done, and rows and model tokens in all


def evaluate(
    run: Path | str | SAE | PCA,
    cache: Cache,
    model: Model | None = None,
    *,
    exclude_special_tokens: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The metrics of one SAE, as `evaluate_all` returns them for several.

    Args:
        run: an SAE, or a path that `load_sae` takes.
        cache: the cache whose validation split is read.
        model: the language model of the cache; without it, the metrics that need it are None.
        exclude_special_tokens: as `evaluate_all`.
        progress: as `evaluate_all`.

    Raises:
        ManifestError: as `load_sae`.
        CacheMismatch, DatasetError: as `evaluate_all`.
    """
    typed("evaluate", "cache", cache, Cache)
    how: dict[str, Any] = {"exclude_special_tokens": exclude_special_tokens, "progress": progress}
    if isinstance(run, SAE | PCA):
        return evaluate_all([run], cache, model, **how)[0]
    _check_run(local_path(run), cache)
    return evaluate_all([load_sae(run, device=_device(model))], cache, model, **how)[0]


def evaluate_all(
    saes: Sequence[SAE | PCA],
    cache: Cache,
    model: Model | None = None,
    *,
    model_tokens: int = MODEL_TOKENS,
    exclude_special_tokens: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The metrics of several SAEs on the validation split, which is read once for all of them.

    With a model, the first `model_tokens` tokens of the split run through it, in whole sequences, at least one. They
    run once as they are, once for each SAE, and for each hook once with zeros and once with the mean, unless an earlier
    call has stored these losses below the cache.

    Args:
        saes: at least one, all on one device. Their hooks may be any of the cache.
        cache: the cache whose validation split is read.
        model: the language model of the cache; without it, the metrics that need it are None.
        model_tokens: how many tokens run through the model.
        exclude_special_tokens: leave BOS, EOS and other special tokens out of every mean, and leave their activations
            in the model as they are.
        progress: called with the rows and model tokens done, and with those in all.

    Returns:
        For each SAE a dict of plain JSON values, in the order given. A metric that is not finite is None. The page
        docs/reference/metrics.md says what each key means.

    Raises:
        ConfigError: an argument is out of range or of another type, or an SAE reads whole sequences.
        CacheMismatch: the cache lacks a hook, holds it with another width, or was harvested from another model; or an
            SAE is of a stream that the model cannot have (see `SAE.check`).
        DatasetError: the validation split is empty.
        MemoryError: the model is on a CPU that has no room for the logits of BATCH_TOKENS tokens, twice.
    """
    typed("evaluate", "exclude_special_tokens", exclude_special_tokens, bool)
    whole_number("evaluate", "model_tokens", model_tokens, 1)
    _check_fit(saes, cache, model)
    with torch.no_grad():
        spliced = model is not None and any(len(sae.output_hooks) == 1 for sae in saes)
        sequences = _sequences(cache, model_tokens if spliced else 0)
        if model is not None:
            require_memory_for_logits(model, sequences)  # now: all rows of the cache are read before
        sums = _reconstructions(saes, cache, exclude_special_tokens, sequences.size, progress)
        losses: list[dict[str, Any]] = [dict.fromkeys(MODEL_METRICS) for _ in saes]
        if model is not None:
            later = None if progress is None else _later(progress, sums[0].n_rows, sequences.size)
            how: dict[str, Any] = {"exclude_special_tokens": exclude_special_tokens, "progress": later}
            losses = model_metrics(saes, cache, model, sequences, **how)
    source = {
        "split": "validation",
        "exclude_special_tokens": exclude_special_tokens,
        "cache_fingerprint": cache.fingerprint,
        "model": cache.identity["model"]["name"],
    }
    return [_row(sae, _cache_metrics(part) | loss | source) for sae, part, loss in zip(saes, sums, losses, strict=True)]


def evaluate_runs(
    runs: Path | str,
    cache: Cache,
    model: Model | None = None,
    *,
    model_tokens: int = MODEL_TOKENS,
    exclude_special_tokens: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one RUN folder, or every run below RUNS with its baselines, and write each eval.json.

    The SAEs are put on the model's device, on the CPU without one. Runs that diverged (failed.json) have nothing to
    evaluate and are left out.

    Two baselines are made for every distinct (hook_name, k) of the runs that have a k up to d_in, with a config.json
    each: RUNS/pca-k{k}-{hook_name}, of k principal components, and RUNS/random-k{k}-{hook_name}, of a random dictionary
    (`random_sae`) that is as wide as the widest of these runs.

    Returns:
        What each eval.json says, with the `name` of its folder; runs first, by name, then baselines.

    Raises:
        ManifestError: there is no run, or one has not finished training.
        CacheMismatch, DatasetError: as `evaluate_all`, or a run was trained on another model than the cache's.
        OSError: a folder cannot be written.
    """
    typed("evaluate", "cache", cache, Cache)
    runs = local_path(runs)
    check_writable(runs)
    folders = _finished(runs)
    configs = [_check_run(folder, cache) for folder in folders]
    saes: list[SAE | PCA] = [load_sae(folder, device=_device(model)) for folder in folders]
    if runs not in folders:
        settings = [config["sae"] for config in configs]
        compared = [
            (each["hook_name"], each.get("k"), sae.d_sae)
            for each, sae in zip(settings, saes, strict=True)
            if isinstance(sae, SAE)
            and not sae.is_centred
            and sae.hook_head_index is None  # baselines are of whole rows
        ]
        for baseline in baselines(compared, cache, _device(model)):
            folders.append(write_baseline(runs, baseline, cache))
            saes.append(baseline)
    how: dict[str, Any] = {"exclude_special_tokens": exclude_special_tokens, "progress": progress}
    rows = evaluate_all(saes, cache, model, model_tokens=model_tokens, **how)
    for folder, row in zip(folders, rows, strict=True):
        write_run_json(folder, EVALUATION_FILE, row)
    return [{"name": folder.name, **row} for folder, row in zip(folders, rows, strict=True)]


def check_writable(runs: Path) -> None:
    """Raise OSError, naming the folder, if an eval.json cannot be written, ManifestError if it would be elsewhere.

    Better now than after the work.
    """
    refuse_links(runs)
    for folder in (runs, *_finished(runs)):  # baselines go into RUNS itself
        require_writable(folder, folder, "eval.json cannot be written; pass a copy of the runs")


def _later(progress: Progress, n_before: int, n_here: int) -> Callable[[int], None]:
    """The progress of n_here model tokens that come after n_before rows."""
    return lambda n_done: progress(n_before + n_done, n_before + n_here)


def _device(model: Model | None) -> torch.device:
    return torch.device("cpu") if model is None else model.device


def _row(sae: SAE | PCA, metrics: Mapping[str, Any]) -> dict[str, Any]:
    row = {"architecture": trained_as(sae), "hook_name": sae.hook_name, "d_in": sae.d_in, "d_sae": sae.d_sae, **metrics}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _reconstructions(
    saes: Sequence[SAE | PCA], cache: Cache, exclude_special_tokens: bool, n_later: int, progress: Progress | None
) -> list[ReconstructionSums]:
    """The sums of every SAE over the validation split, which is read once for all of them.

    n_later: how many model tokens follow, for the progress.
    """
    hook_names = list(dict.fromkeys(name for sae in saes for name in (*sae.input_hooks, *sae.output_hooks)))
    sums: list[ReconstructionSums] = []
    n_done = 0
    how: dict[str, Any] = {"exclude_special_tokens": exclude_special_tokens, "device": saes[0].device}
    with Loader(cache, hook_names, split="validation", batch_tokens=BATCH_TOKENS, **how) as loader:
        for batch in loader:
            parts = [_reconstruction(sae, batch) for sae in saes]
            sums = [old.merge(new) for old, new in zip(sums, parts, strict=True)] if sums else parts
            n_done += len(batch.row)
            if progress is not None:
                progress(n_done, loader.n_rows + n_later)
    if not sums:
        raise DatasetError(f"evaluate: {cache.path} holds only special tokens in its validation split; harvest more")
    return sums


def _reconstruction(sae: SAE | PCA, batch: Batch) -> ReconstructionSums:
    """The sums of a batch. It is cut into pieces, because [batch, d_sae] of a wide SAE may not fit into the memory."""
    pieces = (
        _side_by_side(batch, hook_names).split(piece_rows(sae.d_sae))
        for hook_names in (sae.input_hooks, sae.output_hooks)
    )
    return reduce(
        ReconstructionSums.merge,
        (ReconstructionSums.of(sae.target(y), *sae.reconstruct(x)) for x, y in zip(*pieces, strict=True)),
    )


def _side_by_side(batch: Batch, hook_names: Sequence[str]) -> Float[Tensor, "batch width"]:
    return batch.x[hook_names[0]] if len(hook_names) == 1 else torch.cat([batch.x[name] for name in hook_names], dim=1)


def _cache_metrics(sums: ReconstructionSums) -> dict[str, Any]:
    density = sums.feature_density.numpy()
    fired = np.maximum(density[density > 0], 10.0 ** DENSITY_EDGES[0])
    counts, _ = np.histogram(np.log10(fired), bins=DENSITY_EDGES)
    return {
        **({"worse_than_zeros": True} if sums.is_worse_than_zeros else {}),
        "n_tokens": sums.n_rows,
        "l0": sums.l0,
        "l1": sums.l1,
        "explained_variance": sums.explained_variance,
        "mse": sums.mse,
        "cossim": sums.cossim,
        "l2_ratio": sums.l2_ratio,
        "relative_reconstruction_bias": sums.relative_reconstruction_bias,
        "dead_fraction": sums.dead_fraction,
        "feature_density": {
            "log10_edges": DENSITY_EDGES.tolist(),
            "counts": counts.tolist(),
            "never_fired": int((density == 0).sum()),
        },
    }


def _sequences(cache: Cache, model_tokens: int) -> Int32[np.ndarray, "sequence position"]:
    """The first validation sequences that hold `model_tokens` tokens. The last one is whole."""
    return cache.sequences("validation")[: -(-model_tokens // cache.context_size)]


def _finished(runs: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs below it by name, without baselines and diverged runs."""
    folders = run_folders(runs)
    if folders != [runs]:
        folders = [each for each in folders if not is_file(each / FAILED_FILE) and not is_baseline(each)]
    if not folders:
        raise ManifestError(f"evaluate: {runs} must be a RUN or a folder of runs, it holds no config.json; train first")
    if is_file(runs / FAILED_FILE):
        error = read_run_json(runs, FAILED_FILE).get("error")
        raise ManifestError(f"evaluate: {runs} diverged: {error}; pass another run")
    unfinished = [folder.name for folder in folders if not is_folder(folder / SAE_FOLDER)]
    if unfinished:
        raise ManifestError(
            f"evaluate: every run must have finished training, {', '.join(unfinished)} of {runs} has no sae/; "
            "give the same train command again, or evaluate a finished RUN alone"
        )
    return folders


def _check_fit(saes: Sequence[SAE | PCA], cache: Cache, model: Model | None) -> None:
    """Raise unless the SAEs and the model fit the cache, and the validation split has rows."""
    for sae in saes:
        if isinstance(sae, SAE) and sae.reads_sequences:
            raise ConfigError(
                f"evaluate: {sae.hook_name}: a {sae.architecture} SAE reads whole sequences, and rows of a cache are "
                "read in any order; pass another run"
            )
        hooks = ((sae.input_hooks, sae.d_in, sae.takes), (sae.output_hooks, sae.d_out, sae.gives))
        for hook_names, width, fits in hooks:
            held = sum(cache.hook(name).d_in for name in hook_names)
            if not fits(held):
                raise CacheMismatch(
                    f"evaluate: the SAE takes {' + '.join(hook_names)} of width {width}, {cache.path} holds {held}; "
                    "pass the cache that it was trained on"
                )
    if cache.n_rows("validation") == 0:
        raise DatasetError(
            f"evaluate: {cache.path} has an empty validation split (holdout {cache.identity['holdout']}); "
            f"{HOLD_OUT_MORE}"
        )
    if model is not None:
        _check_model(model, cache)
        for sae in saes:
            if isinstance(sae, SAE):
                sae.check(model)


def _check_model(model: Model, cache: Cache) -> None:
    """Raise CacheMismatch unless the model is the one that was harvested.

    An imported cache knows nothing but the name that it was given.
    """
    wanted, name = cache.identity["model"], model.identity["name"]
    differences = model.differences(wanted)
    if not differences:
        return
    if is_imported(wanted):
        raise CacheMismatch(
            f"evaluate: {cache.path} was imported and knows no weights and no tokenizer of its model, only the name "
            f"{wanted['name']!r}, the model is {name!r}; pass the model that it was made with, or import the cache "
            f"again with --model {name}"
        )
    code = " and with --trust-remote-code" if wanted.get("code_sha256") else ""
    raise CacheMismatch(
        f"evaluate: {cache.path} was harvested from {wanted['name']!r}, the model is {name!r}: "
        f"{'; '.join(differences)}; pass that model, loaded in the same dtype{code}"
    )


def _check_run(run: Path, cache: Cache) -> dict[str, Any]:
    """config.json of a run; {} for a SAELens directory, which has none.

    Raises CacheMismatch unless the run was trained on activations of the cache's model.
    """
    if not is_file(run / CONFIG_FILE):
        return {}
    config = read_run_json(run, CONFIG_FILE)
    trained, revision = model_of_run(run, config)
    k, hook_name = (sae.get("k"), sae.get("hook_name")) if isinstance(sae := config.get("sae"), dict) else (None, None)
    if not isinstance(hook_name, str) or not (k is None or (type(k) is int and k > 0)):
        raise ManifestError(
            f"evaluate: {run}/config.json is not that of a run, it says hook_name={shown(hook_name)} and k={shown(k)}"
        )
    cached = cache.identity["model"]["name"]
    revisions = {revision, cache.identity["model"]["revision"]}
    if not same_name(trained, cached) or (len(revisions) > 1 and "imported" not in config):
        way_out = f"import it again with --model-name {cached} if that is it, or " if "imported" in config else ""
        raise CacheMismatch(
            f"evaluate: {run} was trained on activations of {trained!r}, {cache.path} holds those of {cached!r}; "
            f"{way_out}pass the cache that it was trained on"
        )
    return config
