"""The report's HTML: one file that holds its style, its scripts and its data. Every string in it is escaped."""

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from trainer.report.figures import N_COLOURS, Throughput, address, figures, has_added_loss, has_speed
from trainer.run_folder import Number, RunFiles, finite
from trainer.targets import TARGETS, mark

MOST_DIGITS = 1e10  # a larger number, as a diverged SAE has, is written with an exponent
NO_VALUE = "\u2013"
METRIC_COLUMNS = (  # key in eval.json, heading, meaning, format
    ("l0", "L0", "mean active latents per token", "{:,.1f}"),
    ("explained_variance", "Expl. variance", "1 is perfect, 0 is what the mean would reach", "{:.4f}"),
    ("ce_loss_score", "CE score", "share of zero ablation's loss won back; 1 is the original model", "{:.4f}"),
    ("ce_loss_score_vs_mean", "CE score, mean", "the same with the mean of the activation instead of zeros", "{:.4f}"),
    ("ce_loss_increase", "CE increase", "loss that the reconstruction adds, in nats", "{:.4f}"),
    ("kl_div_score", "KL score", "the CE score's like, of the divergence from the original predictions", "{:.4f}"),
    ("kl_div_with_sae", "KL", "divergence from the original predictions, in nats", "{:.4f}"),
    ("top1_agreement", "Top-1", "tokens whose likeliest next token stays the same", "{:.1%}"),
    ("dead_fraction", "Dead", "latents that fired on no held-out token", "{:.1%}"),
    ("n_tokens", "Measured on", "held-out tokens; a latent that is silent on few of them may be rare", "{:,.0f}"),
)
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

Figure = tuple[str, str, str]  # name, title, caption


def page(
    title: str,
    runs: Sequence[RunFiles],
    throughput: Sequence[Throughput],
    features: Mapping[str, Mapping[str, Any]],
) -> str:
    """The whole HTML document.

    Args:
        title: its heading.
        runs: the runs, then the baselines.
        throughput: how fast harvests and training were.
        features: what `feature_pages` returned for a run, by the run's name.
    """
    shown = [{**figure, "about": _about(run)} for figure, run in zip(figures(runs), runs, strict=True)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)} - sparse autoencoders</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<main id="sweep">
<header>
<h1>{html.escape(title)}</h1>
<p class="lead">{_lead(runs)}</p>
<dl class="facts">{_facts(runs)}</dl>
</header>
{_table(runs)}
{_trade_offs(runs)}{_lines(runs)}
{_throughput(throughput)}
</main>
<main id="sae" hidden></main>
<div id="tip" role="status" hidden></div>
{_data("figures", {"title": title, "runs": shown})}
{"".join(_packed(f"features-{i}", features[run.name]) for i, run in enumerate(runs) if run.name in features)}
<script>{get_plotlyjs()}</script>
<script>{_asset("report.js")}</script>
<script>{_asset("feature_pages.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (files("trainer.report") / "assets" / name).read_text(encoding="utf-8")


def _data(element: str, values: Mapping[str, Any]) -> str:
    text = _json(values).replace("<", "\\u003c")  # so that no string can end the script
    return f'<script type="application/json" id="{html.escape(element)}">{text}</script>'


def _packed(element: str, values: Mapping[str, Any]) -> str:
    """A script element with gzipped data, a fifth as long. The page unpacks it when somebody asks for it."""
    data = _json(values).encode(errors="backslashreplace")  # in JSON it is an escape
    packed = base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode()
    return f'<script type="application/gzip" id="{html.escape(element)}">{packed}</script>'


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# --- the whole sweep ---


def _lead(runs: Sequence[RunFiles]) -> str:
    """One sentence that says how many SAEs and baselines there are."""
    n_saes = sum(not run.is_baseline for run in runs)
    n_evaluated = sum(bool(run.evaluation) for run in runs if not run.is_baseline)
    parts = [f"{n_saes} sparse autoencoder{'' if n_saes == 1 else 's'}", f"{n_evaluated} evaluated on held-out tokens"]
    n_baselines, n_failed = len(runs) - n_saes, sum(run.error is not None for run in runs)
    parts += [f"{n_baselines} baseline{'' if n_baselines == 1 else 's'}"] if n_baselines else []
    parts += [f"{n_failed} diverged"] if n_failed else []
    return ", ".join(parts) + "."


def _facts(runs: Sequence[RunFiles]) -> str:
    """Where the activations come from, and how many were used. Each fact stands once, with its values joined."""
    saes = [run for run in runs if not run.is_baseline]
    facts = {
        "Model": _joined(run.about("model", "name") for run in saes),
        "Revision": _joined(run.about("model", "revision") for run in saes),
        "Hook": _joined(run.sae.get("hook_name") for run in saes),
        "Cache": _joined(run.about("cache", "path") for run in saes),
        "Cache fingerprint": _joined(run.about("cache", "fingerprint") for run in saes),
        "Held-out tokens": _joined(_count(run.evaluation.get("n_tokens")) for run in runs),
        "Tokens run through the model": _joined(_count(run.evaluation.get("n_model_tokens")) for run in runs),
    }
    shown = {term: value for term, value in facts.items() if value}
    return "".join(f"<div><dt>{term}</dt><dd>{html.escape(value)}</dd></div>" for term, value in shown.items())


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _count(value: object) -> str | None:
    number = finite(value)
    return None if number is None else f"{number:,.0f}"


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
        '<p class="filter"><label>Filter <input type="search" id="filter" autocomplete="off" '
        'placeholder="part of a name, architecture"></label> <output id="filtered" for="filter"></output></p>'
        '<div class="scroll" role="region" aria-labelledby="table-caption" tabindex="0"><table id="runs">'
        '<caption id="table-caption">Held-out metrics. Press a heading to sort, a name to see the SAE. What the filter '
        f"leaves out is not drawn either. The word after a value compares it with its target: {_targets()}.</caption>"
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table_row(index: int, run: RunFiles) -> str:
    note = _note("diverged", run.error) if run.error else ""
    if run.evaluation.get("worse_than_zeros"):
        note += _note("worse than zeros", "its reconstruction is farther from the activations than zeros are")
    link = f'<a href="#{html.escape(address(run))}">{html.escape(run.name)}</a>'
    name = f'<th scope="row">{_swatch(index, run)}{link}{note}</th>'
    architecture = html.escape(str(run.sae.get("architecture", NO_VALUE)))
    values: list[tuple[object, str, str | None]] = [(run.sae.get("d_sae"), "{:,.0f}", None)]
    values += [(run.evaluation.get(key), form, _word(run, key)) for key, _, _, form in METRIC_COLUMNS]
    values += [(run.metrics[-1].get("n_tokens") if run.metrics else None, "{:,.0f}", None)]
    cells = "".join(_cell(*each) for each in values)
    return f'<tr data-run="{index}">{name}<td>{architecture}</td>{cells}</tr>'


def _note(text: str, title: str) -> str:
    return f'<span class="note" title="{html.escape(str(title))}">{text}</span>'


def _cell(value: object, form: str, word: str | None) -> str:
    number = finite(value)
    if number is None:
        return f'<td class="number none">{NO_VALUE}</td>'
    said = f' <span class="word {word}">{word}</span>' if word else ""
    return f'<td class="number" data-value="{number!r}">{_formatted(number, form)}{said}</td>'


def _word(run: RunFiles, key: str) -> str | None:
    """How a metric of a run stands to its target. A baseline has none."""
    return None if run.is_baseline else mark(key, finite(run.evaluation.get(key)))


def _targets() -> str:
    headings = {key: heading for key, heading, _, _ in METRIC_COLUMNS}
    return html.escape(", ".join(f"{headings[key]} {target.words}" for key, target in TARGETS.items()))


def _formatted(number: Number, form: str) -> str:
    return form.format(number) if abs(number) < MOST_DIGITS else f"{number:.2e}"


def _swatch(index: int, run: RunFiles) -> str:
    """A piece of the line that the run has in the figures."""
    kind = "baseline" if run.is_baseline else f"c{index % N_COLOURS} d{index // N_COLOURS % 3}"
    return f'<span class="swatch {kind}" aria-hidden="true"></span>'


def _trade_offs(runs: Sequence[RunFiles]) -> str:
    if not any(run.evaluation for run in runs):
        return ""
    with_model = any(finite(run.evaluation.get("ce_loss_score")) is not None for run in runs)
    drawn: list[Figure] = [("ev", "L0 against explained variance", "Share of the variance that is reconstructed.")]
    if with_model:
        loss = "Loss won back when the reconstruction replaces the activation."
        drawn.append(("ce", "L0 against CE score", loss))
    text = (
        "Held-out. Up and to the left is better. A shape is an architecture, \u00d7 is PCA and + a random dictionary; "
        "a line joins one architecture, hook and width. Point at a mark for its settings, press it to see the SAE. "
        "Scores under -0.5 and an L0 of 0 are outside."
    )
    return _section("Trade-offs", text, drawn)


def _lines(runs: Sequence[RunFiles]) -> str:
    drawn: list[Figure] = []
    if any(run.metrics for run in runs):
        heights = "Losses of different architectures are different sums: compare shapes, not heights."
        drawn += [
            ("loss", "Training loss", heights),
            ("explained", "Explained variance", "Of each logged batch; values under -0.5 are outside."),
            ("dead", "Dead latents", "Share that has not fired within the dead window."),
        ]
    if any(run.evaluation for run in runs):
        drawn.append(("density", "Feature density", "Latents by how often they fire, held-out."))
    if any(has_added_loss(run) for run in runs):
        added = "Of the next token, by the position before it; every activation is replaced by its reconstruction."
        drawn.append(("position", "Loss added by position", added))
    if any(has_speed(run) for run in runs):
        drawn.append(("speed", "Training speed", "Tokens a second of each SAE's own steps."))
    if not drawn:
        return ""
    key = f'<div class="key" role="group" aria-label="SAEs shown">{_key(runs)}</div>'
    text = "Press a name to hide or show it in all of these."
    return _section("One line for each SAE", text, drawn, key)


def _key(runs: Sequence[RunFiles]) -> str:
    return "".join(
        f'<button type="button" aria-pressed="true" data-run="{index}">{_swatch(index, run)}{html.escape(run.name)}'
        "</button>"
        for index, run in enumerate(runs)
        if not run.is_baseline
    )


def _section(heading: str, text: str, drawn: Sequence[Figure], extra: str = "") -> str:
    plots = "".join(
        f"<figure><figcaption><h3>{title}</h3><p>{caption}</p></figcaption>"
        f'<div class="plot" id="plot-{name}" role="img" aria-label="{title}"></div></figure>'
        for name, title, caption in drawn
    )
    return f'<section><h2>{heading}</h2><p>{text}</p>{extra}<div class="figures">{plots}</div></section>'


def _throughput(rows: Sequence[Throughput]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{row.what}</th><td>{html.escape(row.amount)}</td><td class="number">{row.rate:,.0f}</td>'
        f'<td>{row.bound}</td><td class="number">{row.share:.1%}</td></tr>'
        for row in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Of", "Tokens a second", "Bound", "Share of it"))
    return (
        "<section><h2>Throughput</h2><p>Each call as it logged itself; of training the slowest pass.</p>"
        '<div class="scroll" role="region" aria-label="Throughput" tabindex="0"><table id="throughput">'
        f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div></section>"
    )


# --- one SAE ---


def _about(run: RunFiles) -> dict[str, Any]:
    """What the page of an SAE says in words: its name, error, settings and metrics, the last two as pairs."""
    settings = [(key, _said(value)) for key, value in run.sae.items() if key != "name" and value is not None]
    shown = [
        (heading, finite(run.evaluation.get(key)), form, _word(run, key)) for key, heading, _, form in METRIC_COLUMNS
    ]
    return {
        "name": run.name,
        "error": run.error,
        "settings": settings,
        "metrics": [
            (heading, " ".join(filter(None, (_formatted(number, form), word))))
            for heading, number, form, word in shown
            if number is not None
        ],
    }


def _said(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
