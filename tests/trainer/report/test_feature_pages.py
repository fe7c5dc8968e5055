"""What the report shows of features is what `Features` says, for the latents that the stated rule ranks first."""

import base64
import gzip
import json
import math

import numpy as np
import pytest
from support.tiny_caches import HOOKS
from support.tiny_reports import add_run_with_features
from support.tiny_saes import make_config, make_run

from trainer.features.build import build_features
from trainer.features.read import open_features
from trainer.features.words import read_words
from trainer.report.feature_pages import MIN_FIRED, N_TOP, feature_pages, most_informative
from trainer.report.report import write_report


@pytest.fixture(scope="module")
def run(tiny_cache, tiny_model, tmp_path_factory):
    return add_run_with_features(tmp_path_factory.mktemp("runs"), "a-topk", tiny_cache, tiny_model)


def test_the_most_informative_by_the_rule_as_it_is_stated(run):
    features = open_features(run)
    scores = {
        latent: float(features.max_act[latent]) * math.log2(features.n_tokens / features.n_fired[latent])
        for latent in range(features.d_sae)
        if features.n_fired[latent] >= MIN_FIRED
    }
    ranked = sorted(scores, key=lambda latent: -scores[latent])
    assert 0 < len(ranked) < features.d_sae, "some fire too rarely here"
    assert most_informative(features, 5) == ranked[:5]
    assert most_informative(features, 10**6) == ranked


def test_a_page_says_what_the_features_say(run):
    features, words = open_features(run), read_words(run)
    shown = feature_pages(features, words, 4)
    assert (shown["n_tokens"], shown["d_sae"]) == (features.n_tokens, features.d_sae)
    assert shown["n_dead"] == int((features.n_fired == 0).sum())
    for page, latent in zip(shown["latents"], most_informative(features, 4), strict=True):
        assert page["latent"] == latent
        assert page["n_fired"] == features.n_fired[latent] == sum(page["histogram"]["counts"])
        top = features.top(latent, N_TOP)
        assert [context["at"] for context in page["top"]] == [[c.sequence, c.position] for c in top]
        for context, wanted in zip(page["top"], top, strict=True):
            assert [shown["tokens"][place] for place in context["tokens"]] == [words.text(i) for i in wanted.token_ids]
            np.testing.assert_allclose(context["acts"], wanted.acts, rtol=5e-3, atol=0)  # three digits
            assert context["peak"] == wanted.peak
        for band in page["bands"]:
            acts = [context["acts"][context["peak"]] for context in band["contexts"]]
            assert acts
            assert all(band["from"] * (1 - 5e-3) <= act <= band["to"] * (1 + 5e-3) for act in acts)  # three digits each
        assert page["coactive"] == [list(pair) for pair in features.coactive(latent, len(page["coactive"]))]
        assert words.lens is not None
        assert [text for text, _ in page["lens"]["promoted"]] == [
            words.text(token_id) for token_id, _ in words.lens[latent].promoted
        ]
    json.dumps(shown, allow_nan=False)


def test_the_report_takes_as_many_as_it_is_told(run, tmp_path):
    out = write_report(run, tmp_path / "report.html", n_features=3)
    block = out.read_text().split('id="features-0">')[1].split("</script>")[0]
    held = json.loads(gzip.decompress(base64.b64decode(block)))
    assert [page["latent"] for page in held["latents"]] == most_informative(open_features(run), 3)


def test_features_without_words_are_not_drawn(tiny_cache, tmp_path):
    """As a build from Python leaves them."""
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), tiny_cache.identity["model"])
    build_features(run, tiny_cache)
    assert "features-0" not in write_report(run, tmp_path / "report.html").read_text().replace('"features-"', "")
