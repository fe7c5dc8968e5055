"""The export is what a reader of Neuronpedia's bulk import finds: its files, its columns, their types, our features."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_caches import HOOKS
from support.tiny_reports import add_run_with_features
from support.tiny_saes import changed, make_config, make_run

from actcache.errors import ManifestError
from trainer.features.read import open_features
from trainer.features.words import read_words
from trainer.formats.saelens import load_sae
from trainer.publish.neuronpedia import BATCH_LATENTS, N_BANDS, N_EACH, N_TOP, export_neuronpedia

# Columns of Neuronpedia's database (its Prisma schema) that SAEDashboard 0.8 exports too, with their types.
# The database has no default for those with *.
TEXT, FLAG, WHOLE, NUMBER, TEXTS, NUMBERS = (str,), (bool,), (int,), (int, float), [str], [int, float]
COLUMNS = {
    "release": {
        "name*": TEXT, "description*": TEXT, "descriptionShort": TEXT, "urls": TEXTS, "creatorName*": TEXT,
        "creatorNameShort": TEXT, "creatorId*": TEXT, "visibility": TEXT,
    },
    "model": {
        "id*": TEXT, "displayName": TEXT, "displayNameShort": TEXT, "instruct": FLAG, "inferenceEnabled": FLAG,
        "layers*": WHOLE, "neuronsPerLayer*": WHOLE, "owner*": TEXT, "creatorId*": TEXT, "visibility": TEXT,
    },
    "sourceset": {
        "modelId*": TEXT, "name*": TEXT, "description*": TEXT, "type": TEXT, "urls": TEXTS, "creatorName*": TEXT,
        "creatorId*": TEXT, "releaseName": TEXT, "hasDashboards": FLAG, "visibility": TEXT,
    },
    "source": {
        "id*": TEXT, "modelId*": TEXT, "setName*": TEXT, "creatorId*": TEXT, "hasDashboards": FLAG,
        "inferenceEnabled": FLAG, "num_tokens_in_prompt": WHOLE, "dataset": TEXT, "visibility": TEXT,
    },
    "features": {
        "modelId*": TEXT, "layer*": TEXT, "index*": TEXT, "creatorId": TEXT, "sourceSetName": TEXT,
        "maxActApprox": NUMBER, "frac_nonzero": NUMBER, "freq_hist_data_bar_heights": NUMBERS,
        "freq_hist_data_bar_values": NUMBERS, "pos_str": TEXTS, "pos_values": NUMBERS, "neg_str": TEXTS,
        "neg_values": NUMBERS, "hasVector": FLAG,
    },
    "activations": {
        "id*": TEXT, "modelId*": TEXT, "layer*": TEXT, "index*": TEXT, "creatorId*": TEXT, "tokens": TEXTS,
        "values": NUMBERS, "maxValue*": NUMBER, "maxValueTokenIndex*": WHOLE, "minValue*": NUMBER, "binMin": NUMBER,
        "binMax": NUMBER, "binContains": NUMBER, "qualifyingTokenIndex": WHOLE,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_cache, tiny_model, tmp_path_factory) -> Path:
    return add_run_with_features(tmp_path_factory.mktemp("runs"), "My_TopK+5", tiny_cache, tiny_model)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    return export_neuronpedia(run, tmp_path_factory.mktemp("exports"))


def rows(folder: Path, table: str) -> list[dict]:
    """Every row of a table, as the import reads them."""
    files = sorted((folder / table).glob("batch-*.jsonl.gz")) or [folder / f"{table}.jsonl"]
    texts = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in files]
    return [json.loads(line) for text in texts for line in text.decode().splitlines()]


@pytest.mark.parametrize("table", COLUMNS)
def test_every_row_has_the_columns_of_the_database_and_no_other(folder, table):
    types = {name.rstrip("*"): kind for name, kind in COLUMNS[table].items()}
    required = {name.rstrip("*") for name in COLUMNS[table] if name.endswith("*")}
    found = rows(folder, table)
    assert len(found) >= 1
    for row in found:
        assert required <= set(row) <= set(types)
        assert list(row) == list(found[0]), "the import takes the columns of the first row for all"
        for name, value in row.items():
            kind = types[name]
            values, allowed = (value, tuple(kind)) if isinstance(kind, list) else ([value], kind)
            if not (value is None and name not in required):
                assert isinstance(value, list) == isinstance(kind, list), name
                assert all(isinstance(each, allowed) for each in values), (name, value)


def test_the_tables_point_at_each_other(folder, run, tiny_cache):
    model = tiny_cache.identity["model"]["name"].lower().rpartition("/")[2]
    (release,), (model_row,), (source_set,), (source,) = (
        rows(folder, table) for table in ("release", "model", "sourceset", "source")
    )
    assert (model_row["id"], source_set["name"], source["id"]) == (model, "my_topk-5", "1-my_topk-5")
    assert folder.parts[-2:] == (model, "1-my_topk-5")
    assert source_set["releaseName"] == release["name"]
    assert {source_set["modelId"], source["modelId"]} == {model}
    assert source["setName"] == source_set["name"]
    features, activations = rows(folder, "features"), rows(folder, "activations")
    assert {(row["modelId"], row["layer"]) for row in features + activations} == {(model, source["id"])}
    assert {row["index"] for row in activations} == {row["index"] for row in features}
    assert len({row["id"] for row in activations}) == len(activations)
    assert {len(row["id"]) for row in activations} == {25}


def test_the_features_read_back(folder, run):
    features, words = open_features(run), read_words(run)
    by_index = {int(row["index"]): row for row in rows(folder, "features")}
    assert sorted(by_index) == np.flatnonzero(features.n_fired).tolist(), "those that fired, each once"
    assert words.lens is not None
    for latent, row in by_index.items():
        assert row["frac_nonzero"] == features.n_fired[latent] / features.n_tokens
        assert row["maxActApprox"] == features.max_act[latent]
        assert sum(row["freq_hist_data_bar_heights"]) == features.n_fired[latent]
        assert 0 < row["freq_hist_data_bar_values"][0] < row["freq_hist_data_bar_values"][-1] < row["maxActApprox"]
        assert row["pos_str"] == [words.text(token_id) for token_id, _ in words.lens[latent].promoted]
        assert row["neg_values"] == [logit for _, logit in words.lens[latent].suppressed]


def test_the_contexts_read_back(folder, run):
    features, words = open_features(run), read_words(run)
    by_index: dict[int, list[dict]] = {}
    for row in rows(folder, "activations"):
        by_index.setdefault(int(row["index"]), []).append(row)
    for latent, found in by_index.items():
        top = [row for row in found if row["binMin"] == -1]
        wanted = features.top(latent, N_TOP)
        assert [row["tokens"] for row in top] == [[words.text(i) for i in context.token_ids] for context in wanted]
        assert [row["qualifyingTokenIndex"] for row in top] == [context.peak for context in wanted]
        for row, context in zip(top, wanted, strict=True):
            np.testing.assert_allclose(row["values"], context.acts, rtol=5e-5, atol=0)  # five digits
            assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        banded = [row for row in found if row["binMin"] != -1]
        assert len(banded) == sum(map(len, features.bands(latent, n_bands=N_BANDS, n_each=N_EACH)))
        for row in banded:
            act = row["values"][row["qualifyingTokenIndex"]]
            assert row["binMin"] * (1 - 5e-5) <= act <= row["binMax"] * (1 + 5e-5)
        shares = {row["binMin"]: row["binContains"] for row in banded}
        # what is in no band that shows a context is nothing, but for the edge of a bar of the histogram
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12)


def test_equal_features_give_equal_files_in_batches(run, folder, tmp_path, monkeypatch):
    again = export_neuronpedia(run, tmp_path / "again")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files
    assert BATCH_LATENTS > 7
    monkeypatch.setattr("trainer.publish.neuronpedia.BATCH_LATENTS", 7)
    split = export_neuronpedia(run, tmp_path / "split")
    assert rows(split, "features") == rows(folder, "features")
    assert len(list((split / "features").iterdir())) > 1


def test_what_cannot_be_exported_says_why(tiny_cache, tmp_path):
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])
    with pytest.raises(ManifestError, match="its features must be built"):
        export_neuronpedia(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_character_is_an_escape(run, tmp_path, monkeypatch):
    """A token's text stands in tokens.json, which may be a stranger's."""
    words = read_words(run)
    halves = replace(words, tokens=dict.fromkeys(words.tokens, "\ud800"))
    monkeypatch.setattr("trainer.publish.neuronpedia.read_words", lambda _: halves)
    folder = export_neuronpedia(run, tmp_path)
    assert {token for row in rows(folder, "activations") for token in row["tokens"]} == {"\ud800"}


def test_a_layer_of_many_digits_is_none(run, tmp_path, monkeypatch):
    named = changed(load_sae(run), hook_name="blocks." + "9" * 5000 + ".hook_resid_post")
    monkeypatch.setattr("trainer.publish.neuronpedia.load_sae", lambda _: named)
    with pytest.raises(ManifestError, match="belongs to a layer") as raised:
        export_neuronpedia(run, tmp_path / "out")
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("model", ["x/..", "..", ".", "/", "...", ".ssh", ""])
def test_a_name_of_the_model_leads_to_no_other_folder(run, tmp_path, monkeypatch, model):
    """The name stands in cfg.json, which may be a stranger's."""
    out, sae = tmp_path / "in" / "out", load_sae(run)
    named = changed(sae, metadata={**sae.metadata, "model_name": model})
    monkeypatch.setattr("trainer.publish.neuronpedia.load_sae", lambda _: named)
    folder = export_neuronpedia(run, out)
    assert folder.resolve().parent.parent == out.resolve()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert not any(path.name.startswith(".") for path in out.rglob("*"))
