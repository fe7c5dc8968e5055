"""One self-contained HTML page about a sweep: its table, trade-offs, curves and speed, and the features of its SAEs.

What RUNS holds is drawn as it is: config.json, eval.json, metrics.jsonl, timing.jsonl, failed.json and features/ of
every folder, and the harvest logs of the caches that the runs remember. Nothing is computed but pictures; what is not
there yet leaves a blank. The page loads nothing: plotly.js is inside, fonts are the reader's own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actcache.files import write_atomically
from trainer.features.read import open_features
from trainer.features.words import has_words, read_words
from trainer.report.feature_pages import feature_pages
from trainer.report.figures import throughput
from trainer.report.page import page
from trainer.run_folder import RunFiles, read_harvests, read_runs

N_FEATURES = 640  # of one SAE, about 1.4 kB each beside the 5 MB of plotly.js
MOST_FEATURES = 3200  # of all SAEs together, so that the page stays at about 10 MB


def write_report(runs: Path | str, out: Path | str, *, n_features: int = N_FEATURES) -> Path:
    """Write the page about every run and baseline below `runs` to `out`; returns `out`.

    Args:
        runs: a folder of runs, or one run.
        n_features: latents of each SAE that get a page, the most informative ones (`feature_pages`); fewer
            where all SAEs together would have more than MOST_FEATURES.

    Raises:
        ManifestError: there is no run, or a file of one is not what it should be.
        CacheMismatch: the features of a run are of another SAE than it holds.
    """
    runs, out = Path(runs), Path(out)
    found = read_runs(runs)
    text = page(runs.resolve().name, found, throughput(found, read_harvests(found)), _features(found, n_features))
    write_atomically(out, [text.encode()])
    return out


def _features(runs: Sequence[RunFiles], n_features: int) -> dict[str, dict[str, Any]]:
    """The feature pages of every run that has its features built and described, by the run's name."""
    described = [run for run in runs if has_words(run.folder)]
    n_each = min(n_features, MOST_FEATURES // max(1, len(described)))
    return {run.name: feature_pages(open_features(run.folder), read_words(run.folder), n_each) for run in described}
