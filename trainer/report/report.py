"""One HTML page about a sweep: its table, trade-offs, curves and speed, and the features of its SAEs.

The page shows what is in the files of every run (`trainer.run_folder`), in their features/, and in the harvest logs of
their caches. Nothing else is computed. What is not there yet leaves a blank. The page loads nothing from elsewhere:
plotly.js is inside, and the fonts are the reader's own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actcache.arguments import local_path, whole_number
from actcache.files import require_writable, write_atomically
from trainer.features.read import open_features
from trainer.features.words import has_words, read_words
from trainer.report.feature_pages import feature_pages
from trainer.report.figures import throughput
from trainer.report.page import page
from trainer.run_folder import RunFiles, read_harvests, read_runs

N_FEATURES = 640  # of one SAE; each takes about 1.4 kB, beside the 5 MB of plotly.js
MOST_FEATURES = 3200  # of all SAEs together, so that the page stays at about 10 MB


def write_report(runs: Path | str, out: Path | str, *, n_features: int = N_FEATURES) -> Path:
    """Write the page about every run and baseline below `runs`.

    Args:
        runs: a folder of runs, or one run.
        out: the file to write.
        n_features: how many latents of each SAE get a page. They are the most informative ones (`feature_pages`), and
            fewer if all SAEs together would have more than MOST_FEATURES.

    Returns:
        `out`.

    Raises:
        ManifestError: there is no run, or a file of one is malformed.
        CacheMismatch: the features of a run are of another SAE than it holds.
    """
    whole_number("report", "n_features", n_features)
    runs, out = local_path(runs), local_path(out)
    require_writable(out, out.parent, "the page cannot be written; pass another --out")
    found = read_runs(runs)
    text = page(runs.resolve().name, found, throughput(found, read_harvests(found)), _features(found, n_features))
    write_atomically(out, [text.encode(errors="backslashreplace")])  # half a character, which JSON can name
    return out


def _features(runs: Sequence[RunFiles], n_features: int) -> dict[str, dict[str, Any]]:
    """The feature pages of every run whose features and words are written, by the run's name."""
    described = [run for run in runs if has_words(run.folder)]
    n_each = min(n_features, MOST_FEATURES // max(1, len(described)))
    return {run.name: feature_pages(open_features(run.folder), read_words(run.folder), n_each) for run in described}
