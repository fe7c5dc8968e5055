"""The features of a run in the layout of Neuronpedia's bulk import, as SAEDashboard 0.8 writes it.

OUT/{model}/{layer}-{set}/ holds release.jsonl, model.jsonl, sourceset.jsonl and source.jsonl with one row each. The
features are in features/batch-{i}.jsonl.gz, and their contexts in activations/batch-{i}.jsonl.gz. A key of a row is a
column of Neuronpedia's database; a column that is left out takes the database's default. Equal features give equal
bytes.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from actcache.arguments import local_path, shown
from actcache.errors import ManifestError
from actcache.files import FOLDER_CANNOT_BE_MADE, require_writable, write_atomically
from actcache.models.names import short_name
from trainer.features.read import Context, Features, open_features
from trainer.features.words import TokenWeight, Words, read_words
from trainer.formats.saelens import load_sae
from trainer.sae.sae import SAE

CREATOR_ID = "clkht01d40000jv08hvalcvly"  # the user that every database of Neuronpedia begins with
CREATOR = "actcache"
BATCH_LATENTS = 256  # latents in one file, and in memory at a time
N_TOP = 20  # contexts with the largest activations of a latent
N_BANDS, N_EACH = 10, 5  # bands of the activations, and contexts from each

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The ids of the model, the set and the layer. They tie the tables together."""

    model: str
    set_name: str
    layer: int

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @property
    def release(self) -> str:
        return f"{self.model}-{self.set_name}"


def export_neuronpedia(run: Path | str, out: Path | str) -> Path:
    """Write the features of a run for Neuronpedia.

    The model's id is the last part of its name, and the set's id is the run's name. Both are in lower case, with - for
    each character that an id may not hold. Latents that never fired are left out. The strongest contexts have binMin
    -1, as SAEDashboard marks them. Those of a band have its edges.

    Returns:
        The folder OUT/{model}/{layer}-{set}.

    Raises:
        ManifestError: the features or the words of `run` are not written, or its hook belongs to no layer.
    """
    run, out = local_path(run).resolve(), local_path(out)
    require_writable(out, out, FOLDER_CANNOT_BE_MADE)
    features, words, sae = open_features(run), read_words(run), load_sae(run)
    source = _source(run, sae)
    folder = out / source.model / source.id
    for name, row in _tables(source, sae).items():
        write_atomically(folder / f"{name}.jsonl", [_line(row)])
    fired = np.flatnonzero(features.n_fired > 0)
    for number, first in enumerate(range(0, len(fired), BATCH_LATENTS)):
        latents = fired[first : first + BATCH_LATENTS].tolist()
        rows = {
            "features": (_feature(source, features, words, latent) for latent in latents),
            "activations": (row for latent in latents for row in _activations(source, features, words, latent)),
        }
        for name, lines in rows.items():
            write_atomically(folder / name / f"batch-{number}.jsonl.gz", [_compressed(lines)])
    return folder


def _source(run: Path, sae: SAE) -> _Source:
    layer = re.match(r"blocks\.(\d{1,9})\.", sae.hook_name)
    if layer is None:
        raise ManifestError(f"export: a source of Neuronpedia belongs to a layer, {run} reads {shown(sae.hook_name)}")
    model = short_name(str(sae.metadata.get("model_name", "model")))
    return _Source(model=_id(model), set_name=_id(run.name), layer=int(layer[1]))


def _id(name: str) -> str:
    """The name as an id, which is also the name of a folder: never empty, hidden, or the folder above."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip(".") or "-"


def _tables(source: _Source, sae: SAE) -> dict[str, Row]:
    """The one row of each table, by file: the release, the model, the set of sources, and this source."""
    title = f"{source.set_name} on {source.model}"
    owned = {"creatorId": CREATOR_ID, "visibility": "PUBLIC"}
    return {
        "release": {
            "name": source.release,
            "description": title,
            "descriptionShort": title,
            "urls": [],
            "creatorName": CREATOR,
            "creatorNameShort": CREATOR,
            **owned,
        },
        "model": {
            "id": source.model,
            "displayName": source.model,
            "displayNameShort": source.model,
            "instruct": False,
            "inferenceEnabled": False,
            "layers": 0,  # unknown here; the import does not change a model that is there
            "neuronsPerLayer": 0,
            "owner": "",
            **owned,
        },
        "sourceset": {
            "modelId": source.model,
            "name": source.set_name,
            "description": f"{sae.metadata.get('training_architecture', sae.architecture)}, {sae.d_sae} latents",
            "type": "",
            "urls": [],
            "creatorName": CREATOR,
            "releaseName": source.release,
            "hasDashboards": True,
            **owned,
        },
        "source": {
            "id": source.id,
            "modelId": source.model,
            "setName": source.set_name,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_tokens_in_prompt": sae.metadata.get("context_size"),
            "dataset": sae.metadata.get("dataset_path"),
            **owned,
        },
    }


def _feature(source: _Source, features: Features, words: Words, latent: int) -> Row:
    counts, edges = features.histogram(latent)
    lens = None if words.lens is None else words.lens[latent]
    return {
        **_address(source, latent),
        "sourceSetName": source.set_name,
        "maxActApprox": float(features.max_act[latent]),
        "frac_nonzero": float(features.n_fired[latent] / features.n_tokens),
        "freq_hist_data_bar_heights": counts.tolist(),
        "freq_hist_data_bar_values": ((edges[:-1] + edges[1:]) / 2).tolist(),  # the middle of each bar
        **_logits("pos", lens.promoted if lens else (), words),
        **_logits("neg", lens.suppressed if lens else (), words),
        "hasVector": False,
    }


def _logits(which: str, tokens: Iterable[TokenWeight], words: Words) -> Row:
    pairs = list(tokens)
    return {f"{which}_str": [words.text(i) for i, _ in pairs], f"{which}_values": [logit for _, logit in pairs]}


def _activations(source: _Source, features: Features, words: Words, latent: int) -> Iterator[Row]:
    """The strongest contexts of a latent, then some from each band of its activations."""
    top_bin = {"binMin": -1.0, "binMax": float(features.max_act[latent]), "binContains": -1.0}
    for context in features.top(latent, N_TOP):
        yield _activation(source, latent, context, words, top_bin)
    bands = features.bands(latent, n_bands=N_BANDS, n_each=N_EACH)
    for band, edges in zip(bands, _bins(features, latent), strict=True):
        for context in band:
            yield _activation(source, latent, context, words, edges)


def _bins(features: Features, latent: int) -> list[Row]:
    """The edges of each band of (0, max_act], the strongest first, and the share of the firing tokens in it.

    The share is counted from the histogram, so it is exact only to the width of a bar.
    """
    counts, edges = features.histogram(latent)
    sizes = np.abs(edges[:-1] + edges[1:]) / 2
    limits = np.linspace(0.0, float(features.max_act[latent]), N_BANDS + 1)[::-1]
    return [
        {
            "binMin": float(low),
            "binMax": float(high),
            "binContains": float(counts[(sizes > low) & (sizes <= high)].sum() / counts.sum()),
        }
        for high, low in pairwise(limits)
    ]


def _activation(source: _Source, latent: int, context: Context, words: Words, bin: Row) -> Row:
    values = [float(f"{act:.5g}") for act in context.acts]
    row = {
        **_address(source, latent),
        "tokens": [words.text(token_id) for token_id in context.token_ids],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": context.peak,
        **bin,
    }
    return {"id": _activation_id(row, context), **row}


def _activation_id(row: Row, context: Context) -> str:
    """An id of 25 characters, like Neuronpedia's own. The same context of the same latent gets the same id."""
    identity = [row["modelId"], row["layer"], row["index"], context.sequence, context.position, row["binMin"]]
    return "c" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _address(source: _Source, latent: int) -> Row:
    return {"modelId": source.model, "layer": source.id, "index": str(latent), "creatorId": CREATOR_ID}


def _compressed(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return gzip.compress(b"".join(map(_line, rows)), mtime=0)  # no time, so that equal rows give equal bytes


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # half a character; in JSON it is an escape
