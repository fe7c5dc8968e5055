"""`actcache features`, `steer`, `similar` and `stability`: what latents fire on and do, and which are alike."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actcache.arguments import one_of
from actcache.commands.remembered import ModelOfCache
from actcache.commands.terminal import (
    MODEL,
    OUTPUT,
    Adapter,
    AllowPickle,
    Bar,
    Device,
    Json,
    Model,
    TrustRemoteCode,
    print_json,
    resolved_device,
    say,
    say_owner,
)
from actcache.errors import ConfigError
from trainer.commands.evaluate import RememberedCache, cache_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actcache.models.language_model import LanguageModel
    from actcache.store.cache import Cache
    from trainer.features.read import Features
    from trainer.interventions.splice import Add, Clamp, Scale
    from trainer.sae.sae import SAE

STEERINGS = ("add", "scale", "clamp", "ablate")
SIMILAR_SHOWN = 10  # features of the other SAE that are shown for one feature

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a SAELens directory.")]


def features(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    cache: RememberedCache = None,
    feature: Annotated[
        int | None, typer.Option(help="Show what this feature fires on.", rich_help_panel=OUTPUT)
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="How many contexts of a feature, or rows of the table.", rich_help_panel=OUTPUT)
    ] = 10,
    text: Annotated[
        str | None, typer.Option(help="Show what fires on each token of this text.", rich_help_panel=OUTPUT)
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Show what fires after --text adds to the logit of this token.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Find what each feature of a run fires on in the held-out split.

    The split is read once. Later calls look it up.
    """
    from trainer.commands.lines import feature_facts, feature_lines, features_facts, features_lines
    from trainer.features.words import Words, has_words, read_words
    from trainer.formats.saelens import load_sae

    opened = cache_of(cache, run)
    remembered = ModelOfCache(
        model=model, adapter=adapter, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    if text is not None:
        language_model = remembered.load(opened.path, opened.compute)
        facts, lines = _of_text(load_sae(run, device=resolved_device(device)), language_model, text, predict, top)
        return print_json(facts) if as_json else say(*lines)
    if predict is not None:
        raise ConfigError("features: --predict says what --text adds to a logit; give --text too")
    say_owner(run)
    built, rate = built_features(run, opened, device)
    describe(run, opened, remembered)
    words = read_words(run) if has_words(run) else Words(tokens={}, lens=None)  # without a model there are no words
    if feature is not None:
        facts, described = feature_facts(built, feature, top, words), feature_lines
    else:
        facts, described = features_facts(built, top, words, rate), features_lines
    if as_json:
        print_json(facts)
    else:
        say(*described(facts))


def built_features(run: Path, cache: Cache, device: str) -> tuple[Features, float | None]:
    """(the features of a run, rows encoded a second). The rate is None if the features were built already."""
    from trainer.features.build import build_features

    done: list[int] = []
    started = time.perf_counter()
    with closing(Bar("features", "tok")) as bar:

        def progress(n_rows: int, total: int) -> None:
            done.append(n_rows)
            bar(n_rows, total)

        built = build_features(run, cache, device=resolved_device(device), progress=progress)
    return built, (done[-1] - done[0]) / (time.perf_counter() - started) if done else None


def describe(run: Path, cache: Cache, model: ModelOfCache) -> None:
    """Write the words of a run's features, which a report shows, if they can be written and are not there yet."""
    from trainer.features.words import has_words, may_write_words, write_words

    if has_words(run):
        return
    if not may_write_words(run):
        return say(f"{run}: a report cannot show its features, for this user may not write there; ask its owner")
    if not (model.model or cache.origin["model"]):
        return say(f"{run}: a report cannot show its features, for nobody knows the model; pass --model")
    write_words(run, cache, model.load(cache.path, cache.compute))


def _of_text(
    sae: SAE, model: LanguageModel, text: str, predicted: str | None, top: int
) -> tuple[dict[str, Any], list[str]]:
    """(facts, lines) about what fires on a text, or about what it adds to the logit of `predicted` as next token."""
    from trainer.commands.lines import attribution_lines, text_lines
    from trainer.features.attribution import logit_attribution
    from trainer.features.text import encode_text

    if predicted is None:
        tokens = encode_text(sae, model, text)
        return {"tokens": [asdict(token) for token in tokens]}, text_lines(tokens)
    found = logit_attribution(sae, model, text, -1, predicted)
    return asdict(found), attribution_lines(found, top)


def steer(
    run: Run,
    feature: Annotated[int, typer.Option(help="Which feature to change.")],
    text: Annotated[str, typer.Option(help="The text that the model continues.")],
    cache: RememberedCache = None,
    strength: Annotated[
        float | None, typer.Option(help="How much, in units of the activation. With scale it is a factor.")
    ] = None,
    mode: Annotated[str, typer.Option(help="What to do: add, scale, clamp, or ablate, which clamps to 0.")] = "add",
    tokens: Annotated[int, typer.Option(help="The most tokens to write.", rich_help_panel=OUTPUT)] = 40,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the draws. 0 takes the likeliest token.", rich_help_panel=MODEL)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws, the same without and with.", rich_help_panel=MODEL)] = 0,
    keep_error: Annotated[
        bool, typer.Option("--keep-error/--drop-error", help="Keep or drop what the SAE does not reconstruct.")
    ] = True,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Let the model write on, without and with one feature changed at every token."""
    from trainer.formats.saelens import load_sae
    from trainer.interventions.steering import steer as steered_texts

    change = _change(mode, strength)
    sae = load_sae(run, device=resolved_device(device))
    remembered = ModelOfCache(
        model=model, adapter=adapter, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    # a named model needs no cache: an SAE of others has none
    language_model = remembered.load(*((None, {}) if model and cache is None else _cache_of(run, cache)))
    steered = steered_texts(
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
        print_json({"feature": feature, "mode": mode, "strength": strength, **asdict(steered)})
    else:
        say(f"without: {steered.prompt}{steered.before}", f"with:    {steered.prompt}{steered.after}")


def _change(mode: str, strength: float | None) -> Add | Clamp | Scale:
    """The change of the feature's activation that --mode and --strength ask for."""
    from trainer.interventions.splice import Add, Clamp, Scale

    one_of("steer", "--mode", mode, STEERINGS)
    if (strength is None) != (mode == "ablate"):
        raise ConfigError("steer: --strength must be given with add, scale and clamp, and left out with ablate")
    return {"add": Add, "scale": Scale, "clamp": Clamp, "ablate": Clamp}[mode](strength or 0.0)


def _cache_of(run: Path, cache: Path | None) -> tuple[Path, Mapping[str, Any]]:
    """(folder, how the activations were computed) of the cache, or else of that which the run was trained on."""
    opened = cache_of(cache, run)
    return opened.path, opened.compute


def similar(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A finished run, or a SAELens directory.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another, of the same width.")],
    feature: Annotated[int | None, typer.Option(help="A feature of RUN_A.", show_default="all of them")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the features of RUN_B with the decoder directions nearest to those of RUN_A."""
    from trainer.commands.lines import similar_facts, similar_lines
    from trainer.features.similarity import similar_features
    from trainer.formats.saelens import load_sae

    a, b = (load_sae(run, device=resolved_device(device)) for run in (run_a, run_b))
    n, latents = (1, None) if feature is None else (min(SIMILAR_SHOWN, b.d_sae), [feature])
    found = similar_features(a, b, n, latents=latents)
    if as_json:
        print_json(similar_facts(found, feature))
    else:
        say(*similar_lines(found, feature))


def stability(
    run: Run,
    others: Annotated[list[Path], typer.Argument(metavar="OTHERS...", help="The same SAE, trained with other seeds.")],
    feature: Annotated[int | None, typer.Option(help="A feature of RUN.", show_default="all of them")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say how surely the features of RUN are found in others: the mean of their largest cosine in each."""
    from trainer.commands.lines import stability_facts, stability_lines
    from trainer.features.logit_lens import check_latents
    from trainer.features.similarity import stability as measured
    from trainer.formats.saelens import load_sae

    saes = [load_sae(each, device=resolved_device(device)) for each in (run, *others)]
    if feature is not None:
        check_latents(saes[0], [feature])
    found = measured(saes)
    if as_json:
        print_json(stability_facts(found, feature))
    else:
        say(*stability_lines(found, len(others), feature))
