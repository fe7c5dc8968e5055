"""The command line: parse, build a config, call one function, draw progress, print. Only JSON goes to stdout."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from actcache.commands.lines import cache_facts, cache_lines, estimate_line
from actcache.errors import ActcacheError, ConfigError, ManifestError
from actcache.flow import SPLITS
from actcache.integrity.relabel import relabel as run_relabel
from actcache.integrity.verify import verify as audit
from actcache.store.cache import Cache, open_cache, read_origin
from trainer.commands.lines import (
    attribution_lines,
    evaluation_lines,
    feature_facts,
    feature_lines,
    features_facts,
    features_lines,
    plan_lines,
    similar_facts,
    similar_lines,
    stability_facts,
    stability_lines,
    text_lines,
)
from trainer.config.presets import PRESETS
from trainer.config.settings import Architecture
from trainer.config.sweep import SweepConfig
from trainer.evaluation.evaluate import evaluate_runs
from trainer.features.attribution import logit_attribution
from trainer.features.build import build_features
from trainer.features.logit_lens import check_latents
from trainer.features.read import Features
from trainer.features.similarity import similar_features
from trainer.features.similarity import stability as measured_stability
from trainer.features.text import encode_text
from trainer.features.words import Labels, has_labels, read_labels, write_labels
from trainer.formats.foreign import Names
from trainer.formats.imports import import_release, import_sae
from trainer.formats.saelens import export_sae, load_sae
from trainer.interventions.steering import Add, Clamp, Scale
from trainer.interventions.steering import steer as run_steer
from trainer.publish.neuronpedia import export_neuronpedia
from trainer.report.report import write_report
from trainer.sae.sae import SAE
from trainer.training.plan import measured_seconds
from trainer.training.sweep import SweepProgress, plan
from trainer.training.sweep import train as run_train

if TYPE_CHECKING:
    from actcache.harvesting.tasks import Worker
    from actcache.integrity.spot_check import SampleReport
    from actcache.models.language_model import LanguageModel

BENCHES = (
    "harvest",
    "codecs",
    "write",
    "read",
    "feed",
    "shuffle",
    "kernels",
    "train",
    "sweep",
    "quality",
    "eval",
    "features",
)
STEERINGS = {"add": Add, "scale": Scale, "clamp": Clamp, "ablate": Clamp}
SIMILAR_SHOWN = 10  # of the other SAE, for one feature
EXPORTS = {"saelens": export_sae, "neuronpedia": export_neuronpedia}
DEMO_HOOK = "blocks.2.hook_resid_post"
DEMO_HOLDOUT = 0.1
DEMO_SWEEP = Path(__file__).parent / "trainer" / "demo.yaml"
ARGUMENTS_WRONG, FAILED, INTERRUPTED = 2, 1, 130


class _Commands(TyperGroup):
    """Turns every error that was raised on purpose into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on from here", INTERRUPTED)
        except ConfigError as error:
            _fail(error, ARGUMENTS_WRONG)
        except (ActcacheError, OSError) as error:
            _fail(error, FAILED)


def _fail(error: Exception | str, code: int) -> NoReturn:
    """Print one line, after the traceback if --debug asked for it, and exit."""
    if "--debug" in sys.argv and isinstance(error, Exception):
        traceback.print_exception(error)
    _say(f"error: {' '.join(str(error).split())}")
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Harvest a language model's activations once; train many sparse autoencoders from the cache.",
)

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder written by `actcache harvest`.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; the same command again goes on where it stopped.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda:0, ...")]


@app.callback()
def settings(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Harvest a language model's activations once; train many sparse autoencoders from the cache."""


@app.command()
def harvest(
    model: Annotated[str, typer.Option(help="Hugging Face name or local directory.")],
    hook: Annotated[list[str], typer.Option(help="Hook name, such as blocks.8.hook_resid_post; repeat for several.")],
    dataset: Annotated[str, typer.Option(help="Hub name, local text, jsonl, parquet or arrow file, or folder.")],
    out: Out,
    tokens: Annotated[
        int | None, typer.Option(help="Rows to store, of both splits; all there are if left out.")
    ] = None,
    context_size: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    codec: Annotated[str, typer.Option(help="lossless, fast, raw, int8, or auto to measure.")] = "lossless",
    dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
    model_dtype: Annotated[str, typer.Option(help="The model runs in float32, bfloat16, float16, or auto.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a forward pass; chosen if left out.")] = None,
    device: Device = "auto",
    device_map: Annotated[str | None, typer.Option(help="auto spreads the model over all devices.")] = None,
    attention: Annotated[str, typer.Option(help="auto, sdpa, eager or flash_attention_2.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model's blocks through torch.compile.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    column: Annotated[
        str | None, typer.Option(help="Text or token-id column; text, input_ids or tokens if left out.")
    ] = None,
    sample_by: Annotated[
        str, typer.Option(help="A document of a text file is a line, paragraph or document.")
    ] = "document",
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download a hub dataset first.")] = False,
    prepend_bos: Annotated[bool, typer.Option(help="Begin every sequence with BOS.")] = True,
    separator: Annotated[str, typer.Option(help="Token between documents: bos, eos or none.")] = "bos",
    seed: Annotated[int, typer.Option(help="Of the row order and the holdout.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of documents in the validation split.")] = 0.01,
    backend: Annotated[str, typer.Option(help="hf, or transformer_lens for every other hook.")] = "hf",
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="One of N processes on this cache; else as torchrun or srun say.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and time, and stop there.")] = False,
) -> None:
    """Run the model once and store every asked hook.

    A finished cache that holds them is reused; a new hook is added over its tokens; more tokens make it grow.
    """
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import dry_run, harvest_share  # with transformers, which takes seconds to import
    from actcache.models.load import load_model
    from actcache.text.sources import DatasetSource

    config = HarvestConfig(
        hook_names=tuple(hook),
        tokens=tokens,
        context_size=context_size,
        codec=codec,
        dtype=dtype,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        separator=separator,
        seed=seed,
        holdout=holdout,
    )
    source = DatasetSource(
        path=dataset,
        config=dataset_config,
        split=split,
        revision=dataset_revision,
        column=column,
        sample_by=sample_by,
        streaming=streaming,
    )
    share = _worker(worker)
    language_model = load_model(
        model,
        revision=revision,
        device=_local_device(device, device_map),
        device_map=device_map,
        dtype=model_dtype,
        attention=attention,
        compile=compiled,
        backend=backend,
    )
    if estimate:
        return _say(estimate_line(dry_run(language_model, source, config, out)))
    with closing(_Bar("harvest", "tok")) as progress:
        cache = harvest_share(language_model, source, config, out, share, progress=progress)
    if cache is not None:
        _say(f"{out} is finished" if progress.touched else f"{out} was already there, nothing was done")
        _say(cache_lines(cache))


@app.command()
def info(cache: CachePath, as_json: Json = False) -> None:
    """Say what a cache holds."""
    opened = open_cache(cache)
    if as_json:
        _print_json(cache_facts(opened))
    else:
        _say(cache_lines(opened))


@app.command()
def verify(
    cache: CachePath,
    as_json: Json = False,
    sampled: Annotated[bool, typer.Option("--sample-model", help="Run sequences through the model again.")] = False,
    model: Annotated[str | None, typer.Option(help="The model; as the cache remembers it if left out.")] = None,
    sequences: Annotated[int, typer.Option(help="How many to run through the model.")] = 16,
    device: Device = "auto",
) -> None:
    """Read every byte of a cache and hold it against the manifest; exit code 1 if anything is wrong."""
    with closing(_Bar("verify", "chunk")) as progress:
        found = audit(cache, progress=progress)
    sample = _sample(cache, model, sequences, device) if sampled and not found.problems else None
    if as_json:
        _print_json({**asdict(found), "sample": asdict(sample) if sample else None})
    if sampled and sample is None:
        _say(f"{cache}: not sampled, for it is damaged")
    problems = [*found.problems, *(sample.problems if sample else ())]
    for line in (*problems, *found.notes, *(sample.notes if sample else ())):
        _say(str(line))
    if problems:
        raise ManifestError(f"{cache}: {len(problems)} problems found; `actcache repair` rebuilds what is damaged")
    _say(f"{cache}: {found.n_rows} rows in {found.n_chunks} chunks are sound")
    if sample:
        _say(f"{cache}: {sample.n_rows} rows of {sample.n_sequences} sequences are what the model gives")


@app.command()
def repair(
    cache: CachePath,
    model: Annotated[str | None, typer.Option(help="The model; as the cache remembers it if left out.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset; as the cache remembers it if left out.")] = None,
    device: Device = "auto",
) -> None:
    """Rebuild what is damaged and nothing else; the model is loaded only if activations are."""
    from actcache.integrity.repair import repair as run_repair

    with closing(_StageBar()) as progress:
        done = run_repair(cache, _as_harvested(cache, model, device), dataset=dataset, progress=progress)
    for problem in done.found:
        _say(str(problem))
    for path in done.redone:
        _say(f"{path}: written anew")
    for problem in done.problems:
        _say(f"still wrong: {problem}")
    if done.problems:
        raise ManifestError(f"{cache}: {len(done.problems)} problems are left; is the disk sound?")
    _say(f"{cache} is sound")


@app.command()
def relabel(
    cache: CachePath,
    native: Annotated[
        bool, typer.Option("--native-bf16/--no-native-bf16", help="Call bfloat16 arrays bfloat16, or uint16 again.")
    ],
) -> None:
    """Change what zarr.json says of bfloat16 arrays, for other Zarr readers; no shard is touched."""
    _say(f"{cache}: {run_relabel(cache, native)} zarr.json files changed")


@app.command()
def train(
    cache: CachePath,
    out: Out,
    sweep: Annotated[Path | None, typer.Argument(metavar="[SWEEP.yaml]", help="Sweep file.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Sweep file, another way to name it.")] = None,
    hook: Annotated[str | None, typer.Option(help="One SAE without a sweep file: the hook it reads.")] = None,
    hook_out: Annotated[str | None, typer.Option(help="Of a transcoder: the hook that it predicts.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="One of " + ", ".join(get_args(Architecture)) + ". [default: topk]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A paper's settings: " + ", ".join(PRESETS) + ".")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents.")] = None,
    k: Annotated[int | None, typer.Option(help="Active latents per token (TopK family).")] = None,
    sparsity_coefficient: Annotated[
        float | None, typer.Option(help="Of the penalty (all but the TopK family).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the preset's if left out.")] = None,
    sae_seed: Annotated[int | None, typer.Option(help="Of the initial weights.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows to train on; every row of every epoch if left out.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that a row may be read.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Rows of a step. [default: 4096]")] = None,
    exclude_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--exclude-special-tokens/--keep-special-tokens", help="Drop rows of BOS, EOS, ... [default: drop]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data.")] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations on held-out rows; never if left out.")
    ] = None,
    logger: Annotated[
        list[str] | None, typer.Option(help="wandb, trackio or tensorboard, besides metrics.jsonl; repeat for several.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB to train in, in several passes if need be. [default: most of it]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    device: Device = "auto",
) -> None:
    """Train the SAEs of a sweep file, or one SAE given by options; each batch is read once for all of them."""
    single = {
        "hook_name": hook,
        "hook_name_out": hook_out,
        "architecture": architecture,
        "preset": preset,
        "d_sae": d_sae,
        "k": k,
        "sparsity_coefficient": sparsity_coefficient,
        "lr": lr,
        "seed": sae_seed,
    }
    shared = {
        "tokens": tokens,
        "epochs": epochs,
        "batch_tokens": batch_tokens,
        "exclude_special_tokens": exclude_special_tokens,
        "seed": seed,
        "eval_every": eval_every,
    }
    sweep_config = _sweep_config(sweep or config, _given(single), _given(shared))
    opened, device = open_cache(cache), _device(device)
    memory_bytes = None if memory is None else int(memory * 1e9)
    planned = plan(opened, sweep_config, out, device=device, memory_bytes=memory_bytes)
    _say(plan_lines(planned))
    if dry_run:
        seconds = measured_seconds(planned.configs, planned.batch_tokens, device)
        return _say(f"about {seconds:,.0f} s of steps, by one of each kind on random rows")
    more = {"device": device, "memory_bytes": memory_bytes, "loggers": tuple(logger or ())}
    with closing(_TrainBar()) as progress:
        records = run_train(opened, sweep_config, out, **more, progress=progress)
    for record in records:
        _say(f"{record.folder}: {record.error or 'finished'}")
    failed = [record.config.name for record in records if record.error]
    if failed:
        raise ActcacheError(f"train: {len(failed)} of {len(records)} SAEs diverged: {', '.join(failed)}")


@app.command("eval")
def evaluate(
    runs: Annotated[Path, typer.Argument(metavar="RUN|RUNS", help="One run, or a folder of runs.")],
    cache: Annotated[Path | None, typer.Option(help="The cache; as the runs remember it if left out.")] = None,
    model: Annotated[str | None, typer.Option(help="The model; as the cache remembers it if left out.")] = None,
    exclude_special_tokens: Annotated[
        bool,
        typer.Option("--exclude-special-tokens/--keep-special-tokens", help="Leave out BOS, EOS, ..."),
    ] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate on the held-out split, with the model in the loop; writes eval.json beside each run."""
    opened = open_cache(cache or _remembered_cache(runs))
    rows = _evaluate(runs, opened, model, device, exclude_special_tokens)
    if as_json:
        _print_json({"runs": rows})
    else:
        _say(evaluation_lines(rows))


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder of runs.")],
    out: Annotated[Path, typer.Option(help="The page to write.")],
) -> None:
    """Draw a sweep as one HTML file that needs no network."""
    _say(f"report: {write_report(runs, out).resolve()}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layout: Annotated[str, typer.Option("--format", help="saelens, or neuronpedia for its features.")] = "saelens",
) -> None:
    """Write a run's SAE where SAELens' `SAE.load_from_disk` can load it, or its features for Neuronpedia's import."""
    if layout not in EXPORTS:
        raise ConfigError(f"export: --format must be one of {', '.join(EXPORTS)}, got {layout!r}")
    _say(f"export: {EXPORTS[layout](run, out).resolve()}")


@app.command()
def steer(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a SAELens directory.")],
    feature: Annotated[int, typer.Option(help="Which latent.")],
    text: Annotated[str, typer.Option(help="What the model goes on from.")],
    strength: Annotated[float | None, typer.Option(help="In units of the activation; with scale, a factor.")] = None,
    mode: Annotated[str, typer.Option(help="add, scale, clamp, or ablate (clamp to 0).")] = "add",
    tokens: Annotated[int, typer.Option(help="To write at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with and without.")] = 0,
    keep_error: Annotated[
        bool, typer.Option("--keep-error/--drop-error", help="Keep what the SAE does not reconstruct.")
    ] = True,
    model: Annotated[str | None, typer.Option(help="The model; as the run's cache remembers it if left out.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let the model write on, without and with one feature changed at every token."""
    change = _change(mode, strength)
    sae, language_model = load_sae(run, device=_device(device)), _model_of(run, model, device)
    steered = run_steer(
        language_model,
        sae,
        text,
        features={feature: change},
        n_tokens=tokens,
        temperature=temperature,
        seed=seed,
        keep_error=keep_error,
    )
    if as_json:
        _print_json({"feature": feature, "mode": mode, "strength": strength, **asdict(steered)})
    else:
        _say(f"without: {steered.prompt}{steered.before}\nwith:    {steered.prompt}{steered.after}")


@app.command()
def similar(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A finished run, or a SAELens directory.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another, of the same width.")],
    feature: Annotated[int | None, typer.Option(help="Of RUN_A; all of them if left out.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the features of RUN_B with the decoder directions nearest to those of RUN_A."""
    a, b = (load_sae(run, device=_device(device)) for run in (run_a, run_b))
    n, latents = (1, None) if feature is None else (min(SIMILAR_SHOWN, b.d_sae), [feature])
    found = similar_features(a, b, n, latents=latents)
    if as_json:
        _print_json(similar_facts(found, feature))
    else:
        _say(similar_lines(found, feature))


@app.command()
def stability(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a SAELens directory.")],
    others: Annotated[list[Path], typer.Argument(metavar="OTHERS...", help="The same with other seeds.")],
    feature: Annotated[int | None, typer.Option(help="Of RUN; all of them if left out.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say how surely the features of RUN are found in others: the mean of their largest cosine in each."""
    saes = [load_sae(each, device=_device(device)) for each in (run, *others)]
    if feature is not None:
        check_latents(saes[0], [feature])
    found = measured_stability(saes)
    if as_json:
        _print_json(stability_facts(found, feature))
    else:
        _say(stability_lines(found, len(others), feature))


@app.command()
def features(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    cache: Annotated[Path | None, typer.Option(help="The cache; as the run remembers it if left out.")] = None,
    feature: Annotated[int | None, typer.Option(help="Show what this one fires on.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Contexts of a feature, or rows of the table.")] = 10,
    text: Annotated[str | None, typer.Option(help="Show what fires on each token of this text.")] = None,
    predict: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Show what fires after --text adds to the logit of this token.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model; as the cache remembers it if left out.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find what each feature of a run fires on in the held-out split, which is read once; later calls look it up."""
    opened = open_cache(cache or _remembered_cache(run))
    if text is not None:
        language_model = _as_harvested(opened.path, model, device)(opened.compute)
        facts, lines = _of_text(load_sae(run, device=_device(device)), language_model, text, predict, top)
        return _print_json(facts) if as_json else _say(lines)
    if predict is not None:
        raise ConfigError("features: --predict says what --text adds to a logit; give --text too")
    built, rate = _built_features(run, opened, device)
    _describe(run, opened, model, device)
    labels = read_labels(run) if has_labels(run) else Labels(tokens={}, lens=None)  # nobody knows the model
    if feature is not None:
        facts, described = feature_facts(built, feature, top, labels), feature_lines
    else:
        facts, described = features_facts(built, top, labels, rate), features_lines
    if as_json:
        _print_json(facts)
    else:
        _say(described(facts))


@app.command("import")
def import_run(
    out: Annotated[Path, typer.Option(help="The RUN folder to write.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="SAE saved by SAELens, sparsify or dictionary_learning.")
    ] = None,
    release: Annotated[str | None, typer.Option(help="Of SAELens' pretrained SAEs, in place of DIR.")] = None,
    sae_id: Annotated[str | None, typer.Option(help="Which SAE of the release.")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="As the caches of the model call it, if DIR says otherwise.")
    ] = None,
    hook_name: Annotated[str | None, typer.Option(help="If DIR does not say it, or says otherwise.")] = None,
    hook_name_out: Annotated[str | None, typer.Option(help="Of a transcoder: the hook that it predicts.")] = None,
) -> None:
    """Make a RUN of an SAE that was trained elsewhere, to evaluate and look at like our own."""
    names = Names(model_name=model_name, hook_name=hook_name, hook_name_out=hook_name_out)
    if folder is not None and release is None and sae_id is None:
        return _say(f"import: {import_sae(folder, out, names).resolve()}")
    if folder is None and release is not None and sae_id is not None:
        return _say(f"import: {import_release(release, sae_id, out, names).resolve()}")
    raise ConfigError("import: name a folder DIR, or else a --release with its --sae-id")


@app.command("import-cache")
def import_arrow(
    source: Annotated[Path, typer.Argument(metavar="ARROW_DIR", help="Folder that SAELens cached activations in.")],
    out: Out,
    model: Annotated[str, typer.Option(help="The model that it was made with: Hugging Face name or local directory.")],
    special_token: Annotated[
        list[int] | None, typer.Option(help="Id of BOS, EOS, ..., whose rows training leaves out; repeat for several.")
    ] = None,
    codec: Annotated[str, typer.Option(help="lossless, fast, raw or int8.")] = "lossless",
    dtype: Annotated[
        str | None, typer.Option(help="Stored as bfloat16, float16 or float32; as it is if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the row order and the holdout.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of sequences in the validation split.")] = 0.01,
) -> None:
    """Make a cache of one that SAELens wrote with its CacheActivationsRunner."""
    from actcache.interop.arrow_import import ArrowImport, import_cache  # with datasets, which takes seconds to import

    special = tuple(special_token or ())
    config = ArrowImport(model=model, special_token_ids=special, codec=codec, dtype=dtype, seed=seed, holdout=holdout)
    with closing(_Bar("import", "tok")) as progress:
        cache = import_cache(source, config, out, progress=progress)
    _say(f"{out} is finished" if progress.touched else f"{out} was already there, nothing was done")
    _say(cache_lines(cache))


@app.command("export-cache")
def export_arrow(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
) -> None:
    """Write a split where SAELens trains from it, as `new_cached_activations_path` of CacheActivationsRunnerConfig."""
    from actcache.interop.arrow_export import export_cache

    if split not in SPLITS:
        raise ConfigError(f"export-cache: --split must be one of {', '.join(SPLITS)}, got {split!r}")
    with closing(_Bar("export", "tok")) as progress:
        written = export_cache(open_cache(cache), out, split=split, progress=progress)
    _say(f"export-cache: {written}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="|".join(BENCHES), help="What to measure.")],
    as_json: Annotated[bool, typer.Option("--json", help="Nothing but the JSON object.")] = False,
) -> None:
    """Measure ours and the bare bound in the same run, with the ratio; the last line on stdout is one JSON object."""
    if what not in BENCHES:
        raise ConfigError(f"bench: must be one of {', '.join(BENCHES)}, got {what!r}")
    module = importlib.import_module(f"benchmarks.bench_{what}")
    _print_json(module.run(say=_ignore if as_json else _say))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo")) -> None:
    """Harvest, train, evaluate and report on the bundled model and Python's own documentation; under three minutes."""
    from actcache.bundled.documents import bundled_model_path, write_documents

    texts = write_documents(out / "documents.jsonl")
    harvest(
        model=str(bundled_model_path()),
        hook=[DEMO_HOOK],
        dataset=str(texts),
        out=out / "cache",
        holdout=DEMO_HOLDOUT,
        device="cpu",
    )
    train(cache=out / "cache", sweep=DEMO_SWEEP, out=out / "runs", device="cpu")
    cache = open_cache(out / "cache")
    rows = _evaluate(out / "runs", cache, model=None, device="cpu")
    for run in sorted(path.parent for path in (out / "runs").glob("*/sae")):
        _built_features(run, cache, device="cpu")
        _describe(run, cache, model=None, device="cpu")
    page = write_report(out / "runs", out / "report.html")
    _say(evaluation_lines(rows))
    _say(f"report: {page.resolve()}")


def main() -> None:
    """Run the command line: exit code 0 when all was done, 2 for wrong arguments, 1 for everything else."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("actcache").setLevel(logging.INFO)
    app()


# --- progress ------------------------------------------------------------------------------------------------------


class _Bar:
    """A tqdm bar on stderr that is fed (done, all)."""

    def __init__(self, title: str, unit: str):
        self._bar = tqdm(desc=title, unit=unit, unit_scale=True, file=sys.stderr, disable=None)
        self.touched = False

    def __call__(self, done: int, total: int) -> None:
        if not self.touched:
            self._bar.reset(total)
            self._bar.initial = self._bar.n = 0
        self.touched = True
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _StageBar:
    """A bar for one thing after the other, each fed (what is being done, done, in all)."""

    def __init__(self) -> None:
        self._bar, self._stage, self._done = None, "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage or done < self._done:
            self.close()
            self._bar, self._stage = _Bar(stage, {"verify": "chunk", "harvest": "tok"}[stage]), stage
        self._done = done
        self._bar(done, total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _TrainBar:
    """A tqdm bar over steps, with tokens/s, SAE*tokens/s and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._bar = tqdm(desc="train", unit="step", file=sys.stderr, disable=None)

    def __call__(self, progress: SweepProgress) -> None:
        self._bar.total = progress.n_steps
        self._bar.set_postfix_str(
            f"{progress.n_saes} SAEs, {progress.n_tokens / progress.seconds:,.0f} tok/s, "
            f"{progress.n_sae_tokens / progress.seconds:,.0f} SAE*tok/s, "
            f"waiting {progress.wait_seconds / progress.seconds:.1%}",
            refresh=False,
        )
        self._bar.update(progress.step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


# --- what harvest and others need of the machine ---------------------------------------------------------------------


def _worker(share: str | None) -> Worker:
    """The worker that --worker i/n names, else the one that torchrun or srun made this process."""
    from actcache.harvesting.tasks import Worker

    if share is None:
        index = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        share = f"{index}/{os.environ.get('WORLD_SIZE', os.environ.get('SLURM_NTASKS', '1'))}"
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if match is None:
        raise ConfigError(f"harvest: --worker must be i/n, such as 0/4, got {share!r}")
    return Worker(index=int(match[1]), count=int(match[2]))


def _local_device(device: str, device_map: str | None) -> str:
    """With several processes on one machine, each takes its own CUDA device."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    mine = device == "auto" and device_map is None and rank is not None and torch.cuda.device_count() > 1
    return f"cuda:{int(rank or 0) % torch.cuda.device_count()}" if mine else device


# --- what commands share -------------------------------------------------------------------------------------------


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _sweep_config(path: Path | None, single: dict[str, Any], shared: dict[str, Any]) -> SweepConfig:
    """The sweep of a file or of one SAE given by options; shared settings given as options win over the file's."""
    if path is None and "hook_name" not in single:
        raise ConfigError("train: name a sweep file, or give --hook with --d-sae and --k or --sparsity-coefficient")
    if path is None:
        named = {} if "architecture" in single or "preset" in single else {"architecture": "topk"}
        return SweepConfig.from_dict({**shared, "runs": [single | named]})
    if single:
        raise ConfigError(f"train: {path} says what to train; leave out the options for one SAE: {', '.join(single)}")
    config = SweepConfig.from_yaml(path)
    return replace(config, train=replace(config.train, **shared))


def _as_harvested(root: Path, model: str | None, device: str) -> Callable[[Mapping[str, Any]], LanguageModel]:
    """Loads the model of a cache as it ran then, given how; from where the cache remembers it if `model` is None."""

    def load(compute: Mapping[str, Any]) -> LanguageModel:
        from actcache.models.load import load_model

        origin = {"model": model, "revision": None} if model else read_origin(root)
        if not origin["model"]:
            raise ManifestError(f"{root}: was harvested from a model in memory; pass --model, or load it in Python")
        same_device = torch.device(_device(device)).type == compute["device"]
        return load_model(
            origin["model"],
            revision=origin["revision"],
            device=device,
            dtype=compute["model_dtype"],
            backend=compute["backend"],
            attention=compute["attention"] if same_device else "auto",
            compile=compute.get("compiled", False),
        )

    return load


def _sample(root: Path, model: str | None, sequences: int, device: str) -> SampleReport:
    from actcache.integrity.spot_check import sample_model

    opened = open_cache(root)
    return sample_model(opened, _as_harvested(root, model, device)(opened.compute), sequences)


def _evaluate(
    runs: Path, cache: Cache, model: str | None, device: str, exclude_special_tokens: bool = True
) -> list[dict[str, Any]]:
    from actcache.models.load import load_model

    name, revision = (model, None) if model else (cache.origin["model"], cache.origin["revision"])
    how = {"dtype": cache.compute["model_dtype"], "backend": cache.compute["backend"]}
    language_model = load_model(name, revision=revision, device=device, **how)
    with closing(_Bar("evaluate", "tok")) as progress:
        return evaluate_runs(
            runs, cache, language_model, exclude_special_tokens=exclude_special_tokens, progress=progress
        )


def _model_of(run: Path, model: str | None, device: str) -> LanguageModel:
    """The model that a run's cache remembers, loaded as it ran there; or the one that is named."""
    from actcache.models.load import load_model

    if model:
        return load_model(model, device=device)
    cache = open_cache(_remembered_cache(run))
    return _as_harvested(cache.path, None, device)(cache.compute)


def _change(mode: str, strength: float | None) -> Add | Clamp | Scale:
    """What `steer` does to the feature."""
    if mode not in STEERINGS:
        raise ConfigError(f"steer: --mode must be one of {', '.join(STEERINGS)}, got {mode!r}")
    if (strength is None) != (mode == "ablate"):
        raise ConfigError("steer: --strength must be given with add, scale and clamp, and left out with ablate")
    return STEERINGS[mode](strength or 0.0)


def _built_features(run: Path, cache: Cache, device: str) -> tuple[Features, float | None]:
    """The features of a run, and the rows that were encoded a second; None where they were there already."""
    done: list[int] = []
    started = time.perf_counter()
    with closing(_Bar("features", "tok")) as bar:

        def progress(n_rows: int, total: int) -> None:
            done.append(n_rows)
            bar(n_rows, total)

        built = build_features(run, cache, device=_device(device), progress=progress)
    return built, (done[-1] - done[0]) / (time.perf_counter() - started) if done else None


def _describe(run: Path, cache: Cache, model: str | None, device: str) -> None:
    """Write the words of a run's features, which a report shows, unless they are there; the model is loaded for it."""
    if has_labels(run):
        return
    if not (model or cache.origin["model"]):
        return _say(f"{run}: a report cannot show its features, for nobody knows the model; pass --model")
    write_labels(run, cache, _as_harvested(cache.path, model, device)(cache.compute))


def _of_text(sae: SAE, model: LanguageModel, text: str, predicted: str | None, top: int) -> tuple[dict[str, Any], str]:
    """Facts and lines of what fires on a text, or of what that adds to the logit of the token predicted after it."""
    if predicted is None:
        tokens = encode_text(sae, model, text)
        return {"tokens": [asdict(token) for token in tokens]}, text_lines(tokens)
    found = logit_attribution(sae, model, text, -1, predicted)
    return asdict(found), attribution_lines(found, top)


def _remembered_cache(runs: Path) -> Path:
    """The cache that the first run of a folder says it was trained on."""
    configs = [runs / "config.json", *sorted(runs.glob("*/config.json"))]
    for config in configs:
        if config.is_file():
            cache = json.loads(config.read_bytes()).get("cache")
            if cache:
                return Path(cache["path"])
    raise ManifestError(f"{runs} holds no run that remembers its cache; train first, or pass --cache or --model")


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _ignore(line: str) -> None:
    """For a bench whose lines nobody asked for."""


def _print_json(values: object) -> None:
    print(json.dumps(values, allow_nan=False))


if __name__ == "__main__":
    main()
