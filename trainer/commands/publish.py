"""`actcache report`, `export` and `import`: runs are drawn and written for others, and SAEs of others become runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actcache.arguments import one_of
from actcache.commands.terminal import OUTPUT, say
from actcache.errors import ConfigError

LAYOUTS = ("saelens", "neuronpedia")


def report(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder of runs.")],
    out: Annotated[Path, typer.Option(help="The page to write.", rich_help_panel=OUTPUT)],
) -> None:
    """Draw a sweep as one HTML file that needs no network."""
    from trainer.report.report import write_report

    say(f"report: {write_report(runs, out).resolve()}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    out: Annotated[Path, typer.Option(help="The folder to write.", rich_help_panel=OUTPUT)],
    layout: Annotated[
        str,
        typer.Option("--format", help="saelens for the SAE, or neuronpedia for its features.", rich_help_panel=OUTPUT),
    ] = "saelens",
) -> None:
    """Write a run's SAE for SAELens' `SAE.load_from_disk`, or its features for Neuronpedia's import."""
    from trainer.formats.saelens import export_sae
    from trainer.publish.neuronpedia import export_neuronpedia

    one_of("export", "--format", layout, LAYOUTS)
    written = export_sae(run, out) if layout == "saelens" else export_neuronpedia(run, out)
    say(f"export: {written.resolve()}")


def import_run(
    out: Annotated[Path, typer.Option(help="The RUN folder to write.", rich_help_panel=OUTPUT)],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="An SAE saved by SAELens, sparsify or dictionary_learning."),
    ] = None,
    release: Annotated[str | None, typer.Option(help="A release of SAELens' pretrained SAEs, in place of DIR.")] = None,
    sae_id: Annotated[str | None, typer.Option(help="Which SAE of the release.")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's name in its caches, if DIR says another or none.")
    ] = None,
    hook_name: Annotated[
        str | None, typer.Option(help="The hook that the SAE reads, if DIR says another or none.")
    ] = None,
    hook_name_out: Annotated[str | None, typer.Option(help="The hook that a transcoder predicts.")] = None,
) -> None:
    """Make a RUN of an SAE that was trained elsewhere, to evaluate and look at like our own."""
    from trainer.formats.foreign import Names
    from trainer.formats.imports import import_release, import_sae

    names = Names(model_name=model_name, hook_name=hook_name, hook_name_out=hook_name_out)
    if folder is not None and release is None and sae_id is None:
        return say(f"import: {import_sae(folder, out, names).resolve()}")
    if folder is None and release is not None and sae_id is not None:
        return say(f"import: {import_release(release, sae_id, out, names).resolve()}")
    raise ConfigError("import: name a folder DIR, or else a --release with its --sae-id")
