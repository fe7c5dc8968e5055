"""The command line's table of contents: each command is a plain function of the package that it belongs to."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

import actcache
from actcache.commands.exchange import export_cache, import_cache
from actcache.commands.harvest import harvest
from actcache.commands.integrity import info, relabel, repair, verify
from actcache.commands.remembered import ModelOfCache
from actcache.commands.streams import standard_streams
from actcache.commands.terminal import (
    Commands,
    Json,
    PlainRecord,
    end_at_once_without_memory,
    print_json,
    say,
    with_local_paths,
)
from actcache.errors import ConfigError
from actcache.files import FOLDER_CANNOT_BE_MADE, require_writable
from trainer.commands.evaluate import evaluate, evaluated
from trainer.commands.features import built_features, describe, features, similar, stability, steer
from trainer.commands.publish import export, import_run, report
from trainer.commands.train import train

BENCHES = (
    *("harvest", "codecs", "write", "read", "feed", "shuffle", "kernels", "train", "sweep", "quality", "eval"),
    "features",
)
DEMO_HOOK = "blocks.2.hook_resid_post"
DEMO_HOLDOUT = 0.1
DEMO_SWEEP = Path(__file__).parent / "trainer" / "demo.yaml"
HARVEST, TRAIN, LOOK, EXCHANGE, TRY = "Harvest", "Train", "Look", "Exchange", "Try"

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(is_asked: bool) -> None:
    """Print the version and stop."""
    if is_asked:
        print(f"actcache {actcache.__version__}")
        raise typer.Exit


@app.callback()
def settings(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. It may also stand after the command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Harvest a language model's activations once. Train many sparse autoencoders from the cache."""


def bench(
    what: Annotated[str, typer.Argument(metavar="BENCH", help=f"One of {', '.join(BENCHES)}.")],
    as_json: Json = False,
) -> None:
    """Measure ours and the bare bound in the same run, with the ratio.

    The last line on stdout is one JSON object. With --json it is the only one.
    """
    if what not in BENCHES:
        raise ConfigError(f"bench: must be one of {', '.join(BENCHES)}, got {what!r}")
    module = importlib.import_module(f"benchmarks.bench_{what}")
    print_json(module.run(say=_ignore if as_json else say))


def _ignore(line: str) -> None:
    """For a bench whose lines nobody asked for."""


def demo(out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo")) -> None:
    """Harvest, train, evaluate and report on the bundled model and Python's own documentation.

    It takes under three minutes on two cores.
    """
    from actcache.bundled.documents import bundled_model_path, write_documents
    from trainer.commands.lines import evaluation_lines

    require_writable(out, out, FOLDER_CANNOT_BE_MADE)
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
    cache = actcache.open_cache(out / "cache")
    rows = evaluated(out / "runs", cache, ModelOfCache(device="cpu"))
    for run in sorted(path.parent for path in (out / "runs").glob("*/sae")):
        built_features(run, cache, device="cpu")
        describe(run, cache, ModelOfCache(device="cpu"))
    say(*evaluation_lines(rows))
    report(out / "runs", out / "report.html")


COMMANDS = {
    HARVEST: {"harvest": harvest, "info": info, "verify": verify, "repair": repair},
    TRAIN: {"train": train, "eval": evaluate, "report": report},
    LOOK: {"features": features, "steer": steer, "similar": similar, "stability": stability},
    EXCHANGE: {
        "import": import_run,
        "export": export,
        "import-cache": import_cache,
        "export-cache": export_cache,
        "relabel": relabel,
    },
    TRY: {"demo": demo, "bench": bench},
}
for panel, functions in COMMANDS.items():
    for name, function in functions.items():
        app.command(name, rich_help_panel=panel)(with_local_paths(function))


def main() -> None:
    """Run the command line: exit code 0 when all was done, 2 for wrong arguments, 1 for everything else."""
    with standard_streams():
        logging.setLogRecordFactory(PlainRecord)
        logging.captureWarnings(True)
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("actcache").setLevel(logging.INFO)
        try:
            app()
        except SystemExit as ended:
            end_at_once_without_memory(ended)
            raise


if __name__ == "__main__":
    main()
