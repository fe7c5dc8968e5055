"""What commands say: facts, which --json prints, and lines for people. Nothing here prints: `terminal.say` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trainer.features.attribution import LogitAttribution
from trainer.features.read import Context, Features
from trainer.features.similarity import SimilarFeatures
from trainer.features.text import TokenFeatures
from trainer.features.words import Lens, Words
from trainer.run_folder import BASELINES
from trainer.targets import TARGETS, mark
from trainer.training.plan import SweepPlan

TABLE_COLUMNS = ("name", "architecture", "l0", "explained_variance", "ce_loss_score", "dead_fraction")
FEATURE_COLUMNS = ("feature", "density", "max_act", "top_token")
WIDEST_CELL = 256
MOST_DIGITS = 1e10  # a larger number, as a diverged SAE has, is written with an exponent
BLOCKS = " ▁▂▃▄▅▆▇█"


def plan_lines(planned: SweepPlan) -> list[str]:
    """A line about the sweep and, if it takes several passes, one for each pass."""
    n_passes, room = len(planned.passes), f"{planned.needed_bytes / 1e9:.2g} of {planned.memory_bytes / 1e9:.2g} GB"
    lines = [
        f"to train: {len(planned.configs)} SAEs of {planned.n_parameters:,} parameters in {n_passes} pass(es) over the "
        f"cache, at most about {room} of memory, {planned.flops:.2g} FLOPs"
    ]
    names = [", ".join(config.name for config in each) for each in planned.passes]
    return lines + ([f"pass {i}: {text}" for i, text in enumerate(names, 1)] if n_passes > 1 else [])


def evaluation_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What good values are, and a table with one line for each run.

    A word after a value says how it stands to its target. Baselines have none. A dash stands for what was not computed.
    The table says which SAEs diverged.
    """
    counts = {f"{row['n_tokens']:,}" for row in rows if row.get("n_tokens") is not None}
    measured = [f"measured on {', '.join(sorted(counts))} held-out tokens"] if counts else []
    good = ", ".join(f"{key} {target.words}" for key, target in TARGETS.items())
    cells = [[_evaluation_cell(row, column) for column in TABLE_COLUMNS] for row in rows]
    return [*measured, f"good: {good}", *_aligned([TABLE_COLUMNS, *cells])]


def _evaluation_cell(row: Mapping[str, Any], column: str) -> str:
    word = None if row.get("architecture") in BASELINES else mark(column, row.get(column))
    if column == "explained_variance" and row.get("diverged"):
        return "diverged"
    if column == "explained_variance" and row.get("worse_than_zeros"):
        return f"{_cell(row[column])} (worse than zeros)"
    value = row.get(column)
    text = f"{value:.1f}" if column == "l0" and value is not None else _cell(value)
    return text if word is None else f"{text} {word}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    cells = [[text[:WIDEST_CELL] for text in line] for line in cells]  # a stranger's name may be of any length
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]


def similar_facts(found: SimilarFeatures, feature: int | None) -> dict[str, Any]:
    """The features nearest to one feature. Without one, the nearest of every feature and the mean of their cosines."""
    latents, cosines = found.latents.tolist(), found.cosines.tolist()
    if feature is None:
        best = [{"feature": ids[0], "cosine": values[0]} for ids, values in zip(latents, cosines, strict=True)]
        return {"mean_max_cosine": float(found.cosines[:, 0].double().mean()), "features": best}
    pairs = zip(latents[0], cosines[0], strict=True)
    return {"feature": feature, "similar": [{"feature": i, "cosine": cosine} for i, cosine in pairs]}


def similar_lines(found: SimilarFeatures, feature: int | None) -> list[str]:
    """Lines about the features nearest to one feature. Without one, a line about the cosines of all."""
    if feature is not None:
        near = similar_facts(found, feature)["similar"]
        return [f"{each['feature']:>8}  {each['cosine']:.4f}" for each in near]
    return [f"largest cosine of {_spread(found.cosines[:, 0])}"]


def stability_facts(found: Float[Tensor, " d_sae"], feature: int | None) -> dict[str, Any]:
    """What `trainer.stability` found for one feature. Without one, for all of them, with their mean."""
    if feature is not None:
        return {"feature": feature, "stability": float(found[feature])}
    return {"mean_stability": float(found.double().mean()), "features": found.tolist()}


def stability_lines(found: Float[Tensor, " d_sae"], n_others: int, feature: int | None) -> list[str]:
    """A line about the stability of one feature. Without one, of all of them."""
    if feature is not None:
        return [f"{feature:>8}  {float(found[feature]):.4f}"]
    return [f"largest cosine, the mean of {n_others} SAEs, of {_spread(found)}"]


def features_facts(features: Features, n: int, words: Words, rate: float | None) -> dict[str, Any]:
    """Facts about all features of a run, and about the n that fire most often.

    rate: rows encoded a second; None if the features were built already.
    """
    often = sorted(range(features.d_sae), key=lambda latent: -features.n_fired[latent])[:n]
    return {
        "d_sae": features.d_sae,
        "n_tokens": features.n_tokens,
        "never_fired": int((features.n_fired == 0).sum()),
        "cache_fingerprint": features.cache_fingerprint,
        "rows_per_second": rate,
        "features": [_feature_row(features, latent, words) for latent in often if features.n_fired[latent] > 0],
    }


def _feature_row(features: Features, latent: int, words: Words) -> dict[str, Any]:
    """The density of a latent, its largest activation, and the token with that activation (None if it never fires)."""
    best = features.top(latent, 1)
    return {
        "feature": latent,
        "density": int(features.n_fired[latent]) / features.n_tokens,
        "max_act": float(features.max_act[latent]),
        "top_token": words.text(best[0].token_ids[best[0].peak]) if best else None,
    }


def feature_facts(features: Features, latent: int, n: int, words: Words) -> dict[str, Any]:
    """Facts about one feature: n top contexts, the histogram, what fires with it, and its logit lens or None."""
    counts, edges = features.histogram(latent)
    contexts = [_context_facts(context, words) for context in features.top(latent, n)]
    together = [{"feature": other, "n_tokens": count} for other, count in features.coactive(latent)]
    return {
        **_feature_row(features, latent, words),
        "n_fired": int(features.n_fired[latent]),
        "contexts": contexts,
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "coactive": together,
        "logit_lens": None if words.lens is None else _lens_facts(words.lens[latent], words),
    }


def _lens_facts(lens: Lens, words: Words) -> dict[str, list[dict[str, Any]]]:
    ends = {"promoted": lens.promoted, "suppressed": lens.suppressed}
    return {end: [{"token": words.text(i), "logit": logit} for i, logit in ranked] for end, ranked in ends.items()}


def _context_facts(context: Context, words: Words) -> dict[str, Any]:
    return {**asdict(context), "tokens": [words.text(token_id) for token_id in context.token_ids]}


def features_lines(facts: Mapping[str, Any]) -> list[str]:
    """Lines that say how many features there are and how many never fired, with a table of the most frequent ones."""
    rate = facts["rows_per_second"]
    return [
        f"{facts['d_sae']:,} features on {facts['n_tokens']:,} held-out tokens, {facts['never_fired']:,} never fired"
        + ("" if rate is None else f"; {rate:,.0f} tokens/s"),
        "those that fire most often:",
        *_aligned([FEATURE_COLUMNS, *map(_feature_cells, facts["features"])]),
    ]


def _feature_cells(row: Mapping[str, Any]) -> list[str]:
    return [str(row["feature"]), f"{row['density']:.3g}", f"{row['max_act']:.4g}", _visible(row["top_token"])]


def feature_lines(facts: Mapping[str, Any]) -> list[str]:
    """Lines about one feature: its contexts, its histogram as a line of blocks, what fires with it, its logit lens."""
    lines = [f"feature {facts['feature']}: density {facts['density']:.3g}, largest activation {facts['max_act']:.4g}"]
    for context in facts["contexts"]:
        lines.append(f"{context['act']:>10.4g}  {context_line(context['tokens'], context['peak'])}")
    counts, edges = facts["histogram"]["counts"], facts["histogram"]["edges"]
    lines.append(f"activations from {edges[0]:.4g} to {edges[-1]:.4g}: {_blocks(counts)}")
    together = ", ".join(f"{each['feature']} ({each['n_tokens']:,} tokens)" for each in facts["coactive"])
    lines.append(f"fires together with: {together or 'none'}")
    for end, tokens in (facts["logit_lens"] or {}).items():
        lines.append(f"{end}: " + ", ".join(f"{_visible(each['token'])!r} {each['logit']:+.3g}" for each in tokens))
    return lines


def context_line(tokens: Sequence[str], peak: int) -> str:
    """The tokens of a context on one line, with the one at `peak` in brackets."""
    return _visible(f"{''.join(tokens[:peak])}[{tokens[peak]}]{''.join(tokens[peak + 1 :])}")


def text_lines(tokens: Sequence[TokenFeatures]) -> list[str]:
    """A line for each token of a text, with the latents that fire on it."""
    firing = ["  ".join(f"{latent} ({act:.4g})" for latent, act in token.features) for token in tokens]
    return [f"{_visible(token.token):>16}  {each}" for token, each in zip(tokens, firing, strict=True)]


def attribution_lines(found: LogitAttribution, n: int) -> list[str]:
    """Lines that give a logit as a sum, and the n latents that add most to it."""
    of_features = sum(each.logit for each in found.features)
    line = (
        f"logit of {_visible(found.token)!r} as the next token, less the mean of all: {found.logit:.4g} = "
        f"{of_features:.4g} of the features {found.bias:+.4g} of the bias {found.error:+.4g} of what the SAE leaves "
        f"{found.rest:+.4g} of the rest"
    )
    rows = [[str(each.latent), f"{each.activation:.4g}", f"{each.logit:+.4g}"] for each in found.features[:n]]
    return [line, *_aligned([("feature", "activation", "logit"), *rows])]


def _spread(cosines: Float[Tensor, " latent"]) -> str:
    cosines = cosines.double()
    shares = ", ".join(f"{float((cosines >= cut).double().mean()):.1%} at {cut} or more" for cut in (0.7, 0.9))
    return f"{len(cosines):,} features: {float(cosines.mean()):.4f} on average; {shares}"


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")


def _blocks(counts: Sequence[int]) -> str:
    """A block character for each count. An empty bin is a space, and no other bin is."""
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // max(*counts, 1))] for count in counts)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < MOST_DIGITS else f"{value:.2e}"
    return str(value)
