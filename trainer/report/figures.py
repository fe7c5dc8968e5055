"""What the report's script draws of a sweep, as plain JSON values: metrics, curves, densities and speed."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from trainer.run_folder import HarvestTime, Number, RunFiles, finite

MOST_POINTS = 400  # of a curve; a longer one is thinned evenly and keeps its last point
N_COLOURS = 8  # of the page's palette; further runs get another dash
HOVER_SETTINGS = ("architecture", "hook_name", "d_sae", "k", "sparsity_coefficient", "lr", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """How fast one part of the work was.

    Attributes:
        what: which part.
        amount: how much work it was.
        rate: tokens a second.
        bound: what alone would bound the rate.
        share: the rate as a share of that bound, in [0, 1].
    """

    what: str
    amount: str
    rate: Number
    bound: str
    share: Number


def figures(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """What is drawn of each run. Every number is finite or None, and every string that Plotly reads is escaped."""
    return [
        {
            "name": html.escape(run.name),
            "address": address(run),
            "hover": _hover(run),
            "architecture": str(run.sae.get("architecture")),
            "group": f"{run.sae.get('architecture')} {run.sae.get('hook_name')} {_width(run)}",
            "colour": index % N_COLOURS,
            "dash": index // N_COLOURS,
            "baseline": run.is_baseline,
            **{key: finite(run.evaluation.get(key)) for key in ("l0", "explained_variance", "ce_loss_score")},
            "curves": _curves(run),
            "density": _density(run.evaluation.get("feature_density")),
            "added_loss": _added_loss(run.evaluation.get("ce_loss_by_position")),
            "speed": _speed(run),
        }
        for index, run in enumerate(runs)
    ]


def address(run: RunFiles) -> str:
    """The address of a run in the page: what follows # in its URL."""
    return f"/{quote(run.name, safe='', errors='backslashreplace')}"  # a name may hold bytes that are no text


def has_added_loss(run: RunFiles) -> bool:
    """Whether the run has the losses by position that the page draws."""
    return bool(_added_loss(run.evaluation.get("ce_loss_by_position"))["position"])


def has_speed(run: RunFiles) -> bool:
    """Whether the run has the training speed that the page draws."""
    return bool(_speed(run)["rate"])


def throughput(runs: Sequence[RunFiles], harvests: Sequence[HarvestTime]) -> list[Throughput]:
    """The throughput of each harvest and of the training.

    The bound of a harvest is the language model alone, so its share is the time in the model over the whole time. The
    bound of training is its steps alone, so its share is the time that was not spent waiting for data. Where runs were
    trained in several passes or calls, the lowest rate and the lowest share are given.
    """
    rows = [
        Throughput(
            what="Harvest",
            amount=f"{time.n_tokens:,} tokens, {time.finished}",
            rate=time.n_tokens / time.total_seconds,
            bound="the model alone",
            share=time.model_seconds / time.total_seconds,
        )
        for time in harvests
        if time.total_seconds > 0
    ]
    ends = [run.timing[-1] for run in runs if run.timing]
    rates = _finite_values(ends, "tokens_per_second")
    waited = _finite_values(ends, "wait_share")
    if rates and waited:
        amount = f"{len(ends)} SAE{'' if len(ends) == 1 else 's'}, each of them on every token"
        bound, share = "steps that never wait for data", 1 - waited[-1]
        rows.append(Throughput(what="Training", amount=amount, rate=rates[0], bound=bound, share=share))
    return rows


def _finite_values(lines: Sequence[Mapping[str, Any]], key: str) -> list[Number]:
    """The finite values of a key, the least first."""
    return sorted(number for line in lines if (number := finite(line.get(key))) is not None)


def _width(run: RunFiles) -> object:
    """The width that the runs on one trade-off line share. Baselines of all widths share a line."""
    return "" if run.is_baseline else run.sae.get("d_sae")


def _hover(run: RunFiles) -> str:
    """The settings that tell runs apart, as lines of escaped text."""
    keys = (*HOVER_SETTINGS, "normalize_activations")
    lines = [f"{key} {run.sae[key]}" for key in keys if run.sae.get(key) is not None]
    return "<br>".join([f"<b>{html.escape(run.name)}</b>", *map(html.escape, lines)])


def _curves(run: RunFiles) -> dict[str, list[Number | None]]:
    """Tokens trained, and for each the loss, the explained variance and the share of dead latents at that step."""
    lines = _thinned(run.metrics)
    d_sae = finite(run.sae.get("d_sae")) or 1
    dead = [finite(line.get("sparsity/dead_features")) for line in lines]
    return {
        "tokens": [finite(line.get("n_tokens")) for line in lines],
        "loss": [finite(line.get("losses/overall_loss")) for line in lines],
        "explained_variance": [finite(line.get("metrics/explained_variance")) for line in lines],
        "dead": [None if count is None else finite(count / d_sae) for count in dead],
    }


def _density(histogram: Mapping[str, Any] | None) -> dict[str, list[Number]]:
    """The outline of the histogram of log10 feature density, as two points for every bin."""
    if not histogram:
        return {"log10": [], "latents": []}
    edges, counts = histogram["log10_edges"], histogram["counts"]
    first = next((i for i, count in enumerate(counts) if count), len(counts))
    log10 = [edge for i in range(first, len(counts)) for edge in (edges[i], edges[i + 1])]
    return {"log10": log10, "latents": [count for count in counts[first:] for _ in range(2)]}


def _added_loss(by_position: Mapping[str, Any] | None) -> dict[str, list[Number]]:
    """For each position that has both losses, the mean loss with the SAE less that without it, in nats."""
    losses = zip(by_position["with_sae"], by_position["without_sae"], strict=True) if by_position else ()
    added = [None if a is None or b is None else finite(a - b) for a, b in losses]
    known = [(i, nats) for i, nats in enumerate(added) if nats is not None]
    return {"position": [position for position, _ in known], "nats": [nats for _, nats in known]}


def _speed(run: RunFiles) -> dict[str, list[Number]]:
    """Tokens trained, and for each the tokens a second of this SAE's own steps since the line before.

    timing.jsonl counts seconds from the start of each call. So two lines with a resume between them are left out.
    """
    tokens_at = {finite(line.get("step")): finite(line.get("n_tokens")) for line in run.metrics}
    points = [(tokens_at.get(finite(line.get("step"))), finite(line.get("step_seconds"))) for line in run.timing]
    known = [(tokens, seconds) for tokens, seconds in points if tokens is not None and seconds is not None]
    pairs = zip([(0.0, 0.0), *known], known, strict=False)
    rates = [(b[0], (b[0] - a[0]) / (b[1] - a[1])) for a, b in pairs if b[1] > a[1] and b[0] > a[0]]
    rates = _thinned([(tokens, rate) for tokens, rate in rates if finite(rate) is not None])
    return {"tokens": [tokens for tokens, _ in rates], "rate": [rate for _, rate in rates]}


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most MOST_POINTS of the points, evenly spaced, with the last one among them."""
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return list(points[::-1][::step][::-1])
