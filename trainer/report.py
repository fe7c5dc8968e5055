"""One self-contained HTML page about a sweep: a table, trade-offs, curves, densities, speed. Pictures of files, no
results.

What RUNS holds is drawn as it is: config.json, eval.json, metrics.jsonl, timing.jsonl and failed.json of every folder.
A file that is not there yet leaves a blank. The page loads nothing: plotly.js is inside, fonts are the reader's own.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from actcache.errors import ManifestError
from actcache.writer import write_atomically

MOST_POINTS = 400  # of a curve; a longer one is thinned evenly, its last point kept
N_COLOURS = 8  # of the page's palette; beyond them the dash changes
MOST_DIGITS = 1e10  # a number that is larger (of a diverged SAE) is written with an exponent
NO_VALUE = "\u2013"
METRIC_COLUMNS = (  # key of eval.json, heading, what it means, format
    ("l0", "L0", "mean active latents per token", "{:,.1f}"),
    ("explained_variance", "Expl. variance", "1 is perfect, 0 is what the mean would reach", "{:.4f}"),
    ("ce_loss_score", "CE score", "share of zero ablation's loss won back; 1 is the original model", "{:.4f}"),
    ("kl_div_score", "KL score", "the same of the divergence from the original predictions", "{:.4f}"),
    ("dead_fraction", "Dead", "latents that fired on no held-out token", "{:.1%}"),
)

Number = int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What one folder of RUNS holds: config.json, and the rest where it is there."""

    name: str
    config: dict[str, Any]
    evaluation: dict[str, Any]  # {} without eval.json
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    error: str | None  # of failed.json

    @property
    def sae(self) -> dict[str, Any]:
        """The SAE's settings: config.json of a baseline says them at its top."""
        return self.config.get("sae", self.config)

    @property
    def is_baseline(self) -> bool:
        """Whether this is a PCA, which was not trained."""
        return self.sae.get("architecture") == "pca"


def write_report(runs: Path | str, out: Path | str) -> Path:
    """Write the page about every run and baseline below `runs` to `out`; returns `out`.

    Raises:
        ManifestError: there is no run, or a file of one is not what it should be.
    """
    runs, out = Path(runs), Path(out)
    found = read_runs(runs)
    write_atomically(out, [_page(runs.resolve().name, found).encode()])
    return out


def read_runs(runs: Path) -> list[RunFiles]:
    """The files of every folder of `runs` with a config.json (or of `runs`, if it has one): runs by name, then
    baselines.

    Raises:
        ManifestError: there is none, or a file is malformed.
    """
    folders = [runs] if (runs / "config.json").is_file() else [path.parent for path in runs.glob("*/config.json")]
    if not folders:
        raise ManifestError(f"report: {runs} must be a folder of runs, it holds no config.json; train first")
    found = [_read_run(folder) for folder in folders]
    return sorted(found, key=lambda run: (run.is_baseline, run.name))


def _read_run(folder: Path) -> RunFiles:
    return RunFiles(
        name=folder.resolve().name,
        config=_read_object(folder / "config.json"),
        evaluation=_read_object(folder / "eval.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        timing=_read_lines(folder / "timing.jsonl"),
        error=_read_object(folder / "failed.json").get("error"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file."""
    return _parsed(path, path.read_bytes()) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; [] where there is no file. A last line without an end is still being written."""
    if not path.is_file():
        return []
    return [_parsed(path, line) for line in path.read_bytes().split(b"\n")[:-1]]


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"report: {path} must be JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ManifestError(f"report: {path} must hold JSON objects, got {type(values).__name__}")
    return values


# --- what the pictures show ---


def _figures(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Everything that the page's script draws, as plain JSON values."""
    return {
        "runs": [
            {
                "name": html.escape(run.name),
                "hover": _hover(run),
                "architecture": str(run.sae.get("architecture")),
                "group": f"{run.sae.get('architecture')} {run.sae.get('hook_name')} {_width(run)}",
                "colour": index % N_COLOURS,
                "dash": index // N_COLOURS,
                "baseline": run.is_baseline,
                **{key: _number(run.evaluation.get(key)) for key in ("l0", "explained_variance", "ce_loss_score")},
                "curves": _curves(run),
                "density": _density(run.evaluation.get("feature_density")),
                "speed": _speed(run),
            }
            for index, run in enumerate(runs)
        ]
    }


def _width(run: RunFiles) -> object:
    """What one trade-off line has in common beside architecture and hook; a PCA's width is its place on the line."""
    return "" if run.is_baseline else run.sae.get("d_sae")


def _hover(run: RunFiles) -> str:
    """The settings that tell runs apart, a few lines of escaped text."""
    keys = ("architecture", "hook_name", "d_sae", "k", "sparsity_coefficient", "lr", "seed", "normalize_activations")
    lines = [f"{key} {run.sae[key]}" for key in keys if run.sae.get(key) is not None]
    return "<br>".join([f"<b>{html.escape(run.name)}</b>", *map(html.escape, lines)])


def _curves(run: RunFiles) -> dict[str, list[Number | None]]:
    """Tokens trained, and at each the loss, the explained variance and the share of dead latents of that batch."""
    lines = _thinned(run.metrics)
    d_sae = run.sae.get("d_sae") or 1
    dead = [_number(line.get("sparsity/dead_features")) for line in lines]
    return {
        "tokens": [_number(line.get("n_tokens")) for line in lines],
        "loss": [_number(line.get("losses/overall_loss")) for line in lines],
        "explained_variance": [_number(line.get("metrics/explained_variance")) for line in lines],
        "dead": [None if count is None else count / d_sae for count in dead],
    }


def _density(histogram: Mapping[str, Any] | None) -> dict[str, list[Number]]:
    """The outline of the histogram of log10 feature density: a pair of points for every bin."""
    if not histogram:
        return {"log10": [], "latents": []}
    edges, counts = histogram["log10_edges"], histogram["counts"]
    first = next((i for i, count in enumerate(counts) if count), len(counts))
    log10 = [edge for i in range(first, len(counts)) for edge in (edges[i], edges[i + 1])]
    return {"log10": log10, "latents": [count for count in counts[first:] for _ in range(2)]}


def _speed(run: RunFiles) -> dict[str, list[Number]]:
    """Tokens trained, and the tokens a second of this SAE's own steps since the line before.

    timing.jsonl counts seconds from the start of each call, so a pair of lines with a resume between them is left out.
    """
    tokens_at = {line.get("step"): _number(line.get("n_tokens")) for line in run.metrics}
    points = [(tokens_at.get(line.get("step")), _number(line.get("step_seconds"))) for line in run.timing]
    known = [(tokens, seconds) for tokens, seconds in points if tokens is not None and seconds is not None]
    pairs = zip([(0.0, 0.0), *known], known, strict=False)
    rates = [(b[0], (b[0] - a[0]) / (b[1] - a[1])) for a, b in pairs if b[1] > a[1] and b[0] > a[0]]
    rates = _thinned(rates)
    return {"tokens": [tokens for tokens, _ in rates], "rate": [rate for _, rate in rates]}


def _thinned(points: Sequence[Any]) -> list[Any]:
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return list(points[::-1][::step][::-1])


def _number(value: object) -> Number | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


# --- the page ---


def _page(title: str, runs: Sequence[RunFiles]) -> str:
    data = json.dumps(_figures(runs), allow_nan=False).replace("<", "\\u003c")  # so that no string ends the script
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)} - sparse autoencoders</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
<p class="lead">{_lead(runs)}</p>
<dl class="facts">{_facts(runs)}</dl>
</header>
{_table(runs)}
{_sections(runs)}
</main>
<script type="application/json" id="figures">{data}</script>
<script>{get_plotlyjs()}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def _lead(runs: Sequence[RunFiles]) -> str:
    """One sentence: how many of what."""
    n_saes = sum(not run.is_baseline for run in runs)
    n_evaluated = sum(bool(run.evaluation) for run in runs if not run.is_baseline)
    parts = [f"{n_saes} sparse autoencoder{'' if n_saes == 1 else 's'}", f"{n_evaluated} evaluated on held-out tokens"]
    n_baselines, n_failed = len(runs) - n_saes, sum(run.error is not None for run in runs)
    parts += [f"{n_baselines} PCA baseline{'' if n_baselines == 1 else 's'}"] if n_baselines else []
    parts += [f"{n_failed} diverged"] if n_failed else []
    return ", ".join(parts) + "."


def _facts(runs: Sequence[RunFiles]) -> str:
    """Where the activations come from, and how many were used; each fact once, several values joined."""
    saes = [run for run in runs if not run.is_baseline]
    facts = {
        "Model": _joined(_nested(run.config, "model", "name") for run in saes),
        "Revision": _joined(_nested(run.config, "model", "revision") for run in saes),
        "Hook": _joined(run.sae.get("hook_name") for run in saes),
        "Cache": _joined(_nested(run.config, "cache", "path") for run in saes),
        "Cache fingerprint": _joined(_nested(run.config, "cache", "fingerprint") for run in saes),
        "Held-out tokens": _joined(_count(run.evaluation.get("n_tokens")) for run in runs),
        "Tokens run through the model": _joined(_count(run.evaluation.get("n_model_tokens")) for run in runs),
        "Time waiting for data": _joined(_share(run) for run in saes),
    }
    shown = {term: value for term, value in facts.items() if value}
    return "".join(f"<div><dt>{term}</dt><dd>{html.escape(value)}</dd></div>" for term, value in shown.items())


def _nested(config: Mapping[str, Any], outer: str, inner: str) -> object:
    value = config.get(outer)
    return value.get(inner) if isinstance(value, Mapping) else None


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _count(value: object) -> str | None:
    number = _number(value)
    return None if number is None else f"{number:,.0f}"


def _share(run: RunFiles) -> str | None:
    share = _number(run.timing[-1].get("wait_share")) if run.timing else None
    return None if share is None else f"{share:.1%}"


def _table(runs: Sequence[RunFiles]) -> str:
    headings = [("Name", "the folder's name"), ("Architecture", ""), ("Latents", "d_sae; components of a PCA")]
    headings += [(heading, meaning) for _, heading, meaning, _ in METRIC_COLUMNS]
    headings += [("Tokens", "trained on")]
    cells = "".join(
        f'<th scope="col" aria-sort="none"><button type="button" title="{html.escape(meaning)}">{heading}</button></th>'
        for heading, meaning in headings
    )
    rows = "".join(_table_row(index, run) for index, run in enumerate(runs))
    return (
        '<div class="scroll" role="region" aria-labelledby="table-caption" tabindex="0"><table>'
        '<caption id="table-caption">Held-out metrics. Press a heading to sort.</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table_row(index: int, run: RunFiles) -> str:
    note = '<span class="note" title="' + html.escape(str(run.error)) + '">diverged</span>' if run.error else ""
    name = f'<th scope="row">{_swatch(index, run)}{html.escape(run.name)}{note}</th>'
    architecture = html.escape(str(run.sae.get("architecture", NO_VALUE)))
    values = [(run.sae.get("d_sae"), "{:,.0f}")]
    values += [(run.evaluation.get(key), form) for key, _, _, form in METRIC_COLUMNS]
    values += [(run.metrics[-1].get("n_tokens") if run.metrics else None, "{:,.0f}")]
    return f"<tr>{name}<td>{architecture}</td>{''.join(_cell(value, form) for value, form in values)}</tr>"


def _cell(value: object, form: str) -> str:
    number = _number(value)
    if number is None:
        return f'<td class="number none">{NO_VALUE}</td>'
    text = form.format(number) if abs(number) < MOST_DIGITS else f"{number:.2e}"
    return f'<td class="number" data-value="{number!r}">{text}</td>'


def _swatch(index: int, run: RunFiles) -> str:
    """A piece of the run's line."""
    kind = "baseline" if run.is_baseline else f"c{index % N_COLOURS} d{index // N_COLOURS % 3}"
    return f'<span class="swatch {kind}" aria-hidden="true"></span>'


def _sections(runs: Sequence[RunFiles]) -> str:
    trained = any(run.metrics for run in runs)
    evaluated = any(run.evaluation for run in runs)
    with_model = any(_number(run.evaluation.get("ce_loss_score")) is not None for run in runs)
    timed = any(_speed(run)["rate"] for run in runs)
    sections = []
    if evaluated:
        ce = [("ce", "L0 against CE score", "Loss won back when the reconstruction replaces the activation.")]
        sections.append(
            _section(
                "Trade-offs",
                "Held-out. Up and to the left is better. A shape is an architecture, crosses are PCA; a line joins "
                "one architecture, hook and width. Point at a mark for its settings. Scores under -0.5 and an L0 of 0 "
                "are outside.",
                [
                    ("ev", "L0 against explained variance", "Share of the variance that is reconstructed."),
                    *(ce if with_model else []),
                ],
            )
        )
    curves = [
        ("loss", "Training loss", "Losses of different architectures are different sums: compare shapes, not heights."),
        ("explained", "Explained variance", "Of each logged batch; values under -0.5 are outside."),
        ("dead", "Dead latents", "Share that has not fired within the dead window."),
    ]
    per_run = curves if trained else []
    per_run += [("density", "Feature density", "Latents by how often they fire, held-out.")] if evaluated else []
    per_run += [("speed", "Training speed", "Tokens a second of each SAE's own steps.")] if timed else []
    if per_run:
        key = f'<div class="key" role="group" aria-label="SAEs shown">{_key(runs)}</div>'
        text = "Press a name to hide or show it in all of these."
        sections.append(_section("One line for each SAE", text, per_run, key))
    return "".join(sections)


def _key(runs: Sequence[RunFiles]) -> str:
    return "".join(
        f'<button type="button" aria-pressed="true" data-run="{index}">{_swatch(index, run)}{html.escape(run.name)}'
        "</button>"
        for index, run in enumerate(runs)
        if not run.is_baseline
    )


def _section(heading: str, text: str, figures: Sequence[tuple[str, str, str]], extra: str = "") -> str:
    drawn = "".join(
        f"<figure><figcaption><h3>{title}</h3><p>{caption}</p></figcaption>"
        f'<div class="plot" id="plot-{name}" role="img" aria-label="{title}"></div></figure>'
        for name, title, caption in figures
    )
    return f'<section><h2>{heading}</h2><p>{text}</p>{extra}<div class="figures">{drawn}</div></section>'


_STYLE = """
:root {
  --page: #fcfcfb; --panel: #ffffff; --ink: #1c1d1f; --quiet: #5d6168; --line: #dfe0e3; --accent: #0b57a4;
  --c0: #0072b2; --c1: #c75000; --c2: #007f5f; --c3: #b0488c;
  --c4: #86690b; --c5: #3b96cf; --c6: #6554c0; --c7: #6d7178;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --panel: #1c1f23; --ink: #e8e9eb; --quiet: #a2a7af; --line: #343940; --accent: #8cc2ff;
    --c0: #62b0f0; --c1: #ff9c5e; --c2: #4fd0a3; --c3: #f09ccd;
    --c4: #dcc05c; --c5: #9adcf7; --c6: #b3a6ff; --c7: #b4b8bf;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.25rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; color: var(--quiet); max-width: 44rem; }
.lead { margin-top: 0.35rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.75rem 2.25rem; margin: 1.5rem 0 2rem; }
.facts div { min-width: 0; }
dt { font-size: 0.8125rem; color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.75rem 0.75rem 0.25rem; color: var(--quiet); font-size: 0.875rem; }
th, td { padding: 0.4rem 0.75rem; text-align: left; white-space: nowrap; font-weight: 400; }
tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; max-width: 22rem; }
tbody th { padding-left: 2.4rem; text-indent: -1.65rem; }
tbody tr { border-top: 1px solid var(--line); }
thead th { padding: 0.25rem 0.35rem; }
thead th:nth-child(n + 3) { text-align: right; }
.number { text-align: right; }
.none { color: var(--quiet); }
button { font: inherit; color: inherit; background: none; border: 0; border-radius: 4px; cursor: pointer; }
thead button { font-weight: 600; padding: 0.25rem 0.4rem; }
thead button::after { content: "\\2195"; margin-left: 0.3em; color: var(--quiet); opacity: 0.6; }
[aria-sort="ascending"] button::after { content: "\\2191"; color: var(--accent); opacity: 1; }
[aria-sort="descending"] button::after { content: "\\2193"; color: var(--accent); opacity: 1; }
button:hover { background: color-mix(in srgb, var(--quiet) 14%, transparent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.note { margin-left: 0.6em; padding: 0 0.4em; border: 1px solid; border-radius: 4px; font-size: 0.8125rem; }
.note { color: var(--c1); }
.swatch { display: inline-block; width: 1.1rem; margin-right: 0.55rem; vertical-align: 0.25em; border-top: 3px solid; }
.d1 { border-top-style: dashed; } .d2, .baseline { border-top-style: dotted; } .baseline { color: var(--quiet); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.key { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0.75rem 0 0; }
.key button { padding: 0.2rem 0.6rem; font-size: 0.875rem; border: 1px solid var(--line); text-align: left; }
.key button { overflow-wrap: anywhere; }
.key button[aria-pressed="false"] { opacity: 0.45; text-decoration: line-through; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.25rem; }
.figures { margin-top: 1rem; }
figure { margin: 0; min-width: 0; padding: 0.9rem 1rem 0.5rem; border: 1px solid var(--line); border-radius: 6px; }
figure { background: var(--panel); }
figcaption p { font-size: 0.875rem; }
.plot { height: 21rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 0.9rem 3rem; }
  .facts { display: grid; grid-template-columns: 1fr 1fr; gap: 0.6rem 1rem; }
  figure { padding: 0.75rem 0.5rem 0.25rem; }
  figcaption { padding: 0 0.35rem; }
  .plot { height: 18rem; }
  tbody th { position: sticky; left: 0; background: var(--panel); }
}
@media print { .key, thead button::after { display: none; } }
"""

_SCRIPT = """
"use strict";
const runs = JSON.parse(document.getElementById("figures").textContent).runs;
const symbols = {standard: "triangle-up", topk: "circle", batchtopk: "square", jumprelu: "diamond", pca: "x-thin"};
const LOWEST = -0.5;
const dashes = ["solid", "dash", "dot"];
const hidden = new Set();
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const drawn = run => run.baseline ? colour("quiet") : colour("c" + run.colour);

function axis(title, more) {
  return {title: {text: title, standoff: 8, font: {size: 13}}, tickfont: {size: 12, color: colour("quiet")},
          gridcolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line"), zeroline: false,
          exponentformat: "power", ...more};
}

function layout(x, y) {
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
          font: {family: "system-ui, sans-serif", size: 13, color: colour("ink")},
          hoverlabel: {bgcolor: colour("panel"), bordercolor: colour("line"), align: "left",
                       font: {color: colour("ink")}},
          margin: {l: 48, r: 14, t: 12, b: 48}, xaxis: x, yaxis: {...y, automargin: "left"}};
}

// Where a score may be drawn: one SAE that is far worse than nothing must not flatten all the others.
function sensible(values) {
  const kept = values.filter(value => value !== null && value >= LOWEST);
  if (!kept.length) return undefined;
  const low = Math.min(...kept), high = Math.max(...kept), room = 0.06 * (high - low || 1);
  return [low - room, high + room];
}

function tradeOff(key, title) {
  const shown = runs.filter(run => run.l0 > 0 && run[key] !== null);
  const groups = new Map();
  for (const run of shown) groups.set(run.group, [...(groups.get(run.group) || []), run]);
  const lines = [...groups.values()].filter(group => group.length > 1).map(group => {
    group.sort((a, b) => a.l0 - b.l0);
    return {x: group.map(run => run.l0), y: group.map(run => run[key]), mode: "lines", hoverinfo: "skip",
            line: {color: colour("quiet"), width: 1, dash: group[0].baseline ? "dot" : "solid"}, opacity: 0.6};
  });
  const marks = shown.map(run => ({
    x: [run.l0], y: [run[key]], mode: "markers", text: [run.hover],
    hovertemplate: "%{text}<br>L0 %{x:.1f}<br>" + title.toLowerCase() + " %{y:.4f}<extra></extra>",
    marker: {color: drawn(run), size: 11, symbol: symbols[run.architecture] || "circle",
             line: {width: run.baseline ? 2 : 0, color: drawn(run)}}}));
  const x = axis("L0 (log)", {type: "log", tickvals: Array.from({length: 21}, (_, i) => 2 ** i)});
  return [[...lines, ...marks], layout(x, axis(title, {range: sensible(shown.map(run => run[key]))}))];
}

function lines(points, x, y, hover) {
  const traces = runs.flatMap((run, index) => {
    if (run.baseline) return [];
    const [xs, ys] = points(run);
    return {x: xs, y: ys, mode: xs.length === 1 ? "markers" : "lines", visible: !hidden.has(index), text: run.name,
            hovertemplate: "%{text}<br>" + hover + "<extra></extra>",
            line: {color: drawn(run), width: 2, dash: dashes[run.dash % 3]}};
  });
  return [traces, layout(x, y)];
}

const explained = runs.flatMap(run => run.curves.explained_variance);
const tokens = () => axis("Tokens", {tickformat: "~s", rangemode: "tozero"});
const figures = {
  ev: () => tradeOff("explained_variance", "Explained variance"),
  ce: () => tradeOff("ce_loss_score", "CE score"),
  loss: () => lines(run => [run.curves.tokens, run.curves.loss], tokens(), axis("Loss (log)", {type: "log"}),
                    "%{x:,} tokens, loss %{y:.4g}"),
  explained: () => lines(run => [run.curves.tokens, run.curves.explained_variance], tokens(),
                         axis("Explained variance", {range: sensible(explained)}), "%{x:,} tokens, %{y:.4f}"),
  dead: () => lines(run => [run.curves.tokens, run.curves.dead], tokens(),
                    axis("Dead", {tickformat: ".0%", rangemode: "tozero"}), "%{x:,} tokens, %{y:.1%} dead"),
  density: () => lines(run => [run.density.log10, run.density.latents],
                       axis("log10 of the share of tokens", {range: [null, 0]}), axis("Latents", {rangemode: "tozero"}),
                       "10^%{x:.2f} of tokens, %{y:,} latents"),
  speed: () => lines(run => [run.speed.tokens, run.speed.rate], tokens(),
                     axis("Tokens a second", {tickformat: "~s", rangemode: "tozero"}), "%{x:,} tokens, %{y:,.0f}/s"),
};

function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    const plot = document.getElementById("plot-" + name);
    if (plot) Plotly.react(plot, ...figure(), {responsive: true, displaylogo: false, displayModeBar: false});
  }
}

function sort(heading) {
  const column = heading.cellIndex, body = heading.closest("table").tBodies[0];
  const descending = heading.getAttribute("aria-sort") === "ascending";
  const value = row => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const blank = row => row.cells[column].classList.contains("none");
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  const rows = [...body.rows].sort((a, b) =>
    blank(a) - blank(b) || order(value(a), value(b)) * (descending ? -1 : 1));
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...rows);
}

for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sort(button.closest("th")));
for (const button of document.querySelectorAll(".key button"))
  button.addEventListener("click", () => {
    const index = Number(button.dataset.run), pressed = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!pressed));
    if (pressed) hidden.add(index); else hidden.delete(index);
    draw();
  });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
"""
