"""What built features answer: planted answers, and refusals of damage and of wrong questions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.feature_cases import (
    CONTEXT_SIZE,
    A,
    B,
    Dense,
    assert_same,
    dense,
    double_run,
    planted_acts,
    planted_run,
)

from actcache.errors import ConfigError, ManifestError
from trainer.features.build import build_features
from trainer.features.read import BINS, only_builder, open_features


def test_planted_features_are_found_exactly(planted_cache, tmp_path):
    sequences, special = planted_cache.sequences("validation"), planted_cache.special_token_ids
    assert len(planted_cache.manifest.shards["validation"]) > 3
    assert len(sequences) * CONTEXT_SIZE % planted_cache.manifest.shard_rows, "a partial tail"
    acts = [planted_acts(token, i, special) for row in sequences.tolist() for i, token in enumerate(row)]
    expected = Dense(np.array(acts), sequences)
    got = build_features(planted_run(tmp_path, planted_cache), planted_cache)
    assert_same(got, expected, list(range(5)))

    assert (got.d_sae, got.context_size) == (5, CONTEXT_SIZE)
    assert got.n_tokens == sum(token not in special for token in sequences.flatten().tolist())
    assert got.cache_fingerprint == planted_cache.fingerprint
    best = got.top(0, 1)[0]
    assert best.token_ids[best.peak] == A
    assert best.act == best.acts[best.peak] == 1 + best.position / 8
    last = max(i for row in sequences.tolist() for i, token in enumerate(row) if token == A)
    assert best.position == last, "the latent grows with the position"
    assert got.coactive(0)[0] == (1, got.n_fired[0]), "1 fires on A too; 3 as often, but is a higher latent"
    assert (got.top(2), got.coactive(2), got.bands(2)) == ([], [], [[]] * 5)
    assert got.histogram(2)[0].sum() == got.histogram(2)[1].max() == 0
    assert got.histogram(3)[0].tolist() == [0] * (BINS - 1) + [got.n_tokens]
    assert {context.token_ids[context.peak] for context in got.top(1, 10**6)} == {A, B}


def test_abstopk_ranks_by_magnitude(tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, "abstopk")
    features, acts = build_features(run, tiny_cache), dense(run, tiny_cache)
    negative = [i for i in range(40) if -acts[:, i].min() > acts[:, i].max()]
    assert negative, "some latent is at its strongest below zero"
    assert features.top(negative[0], 1)[0].act == -features.max_act[negative[0]] < 0


def test_damaged_features_are_named(planted_cache, tmp_path):
    whole = planted_run(tmp_path, planted_cache)
    build_features(whole, planted_cache)
    first = min((whole / "features").glob("codes-*")).name
    for number, (name, damage) in enumerate(
        {
            f"{first} of another length": lambda data: data[: len(data) // 2],
            f"{first} empty": lambda data: b"",
            f"{first} of another kind": lambda data: b"x" * len(data),
            f"{first} of other fields": lambda data: data.replace(b'"token_id"', b'"token_ix"'),
            "latents.safetensors of another length": lambda data: data[:-8],
            "source.json of other fields": lambda data: data.replace(b"n_rows", b"n_rowz"),
            "source.json of another kind": lambda data: b"[]",
        }.items()
    ):
        run = Path(shutil.copytree(whole, tmp_path / str(number)))
        path = run / "features" / name.split()[0]
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ManifestError, match="features"):
            open_features(run)
    run = Path(shutil.copytree(whole, tmp_path / "hole"))
    (run / "features" / first).unlink()
    with pytest.raises(ManifestError, match=r"must hold the codes from token 0 on; remove it and build it anew"):
        open_features(run)
    run = Path(shutil.copytree(whole, tmp_path / "short"))
    max((run / "features").glob("codes-*")).unlink()
    with pytest.raises(ManifestError, match=r"its files must hold all \d+ rows"):
        open_features(run)


def test_counts_that_are_none_are_named(planted_cache, tmp_path):
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    (run / "features" / "crc32c.json").unlink()
    path = run / "features" / "source.json"
    whole = json.loads(path.read_bytes())
    for name, lie in (
        ("context_size", 0),
        ("context_size", "16"),
        ("n_tokens", [1]),
        ("n_tokens", True),
        ("n_tokens", 10**400),
        ("context_size", 7),
    ):
        path.write_text(json.dumps(whole | {name: lie}))
        with pytest.raises(ManifestError, match=r"source\.json: must be as .* its counts are .*build it anew"):
            open_features(run)


LIES = {
    "token_start": lambda values: np.concatenate([values[-2::-1], values[-1:]]),
    "latent": lambda values: np.full_like(values, 2**31 - 1),
    "latent_start": lambda values: np.concatenate([values[:-1] + 10**12, values[-1:]]),
    "token_by_latent": lambda values: values + 10**6,
    "act_by_latent": lambda values: np.full_like(values, np.nan),
    "token_id": lambda values: values.astype(np.float32),
    "act": lambda values: values[None],
}


@pytest.mark.parametrize("field", LIES)
def test_codes_that_point_where_nothing_is_are_named(field, planted_cache, tmp_path):
    """They have the checksums of what was written: whoever writes a run can write those too."""
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    (run / "features" / "crc32c.json").unlink()
    for path in (run / "features").glob("codes-*"):
        arrays = safetensors.numpy.load_file(path)
        arrays[field] = np.ascontiguousarray(LIES[field](arrays[field]))
        safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ManifestError, match=rf"codes-\d+\.safetensors: must be as .*{field}.*build it anew"):
        answers(run)


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("n_fired", lambda values: values[:-1]),
        ("n_fired", lambda values: values + 2**40),
        ("n_fired", lambda values: -values),
        ("max_act", lambda values: np.full_like(values, np.inf)),
        ("max_act", lambda values: values[None]),
    ],
)
def test_latents_that_are_no_counts_are_named(field, lie, planted_cache, tmp_path):
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    (run / "features" / "crc32c.json").unlink()
    path = run / "features" / "latents.safetensors"
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**arrays, field: np.ascontiguousarray(lie(arrays[field]))}, path)
    with pytest.raises(ManifestError, match=rf"latents\.safetensors: must be as .*{field}.*build it anew"):
        open_features(run)


def test_a_file_of_codes_with_another_name_is_named(planted_cache, tmp_path):
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    (run / "features" / "codes-x.safetensors").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"codes-x\.safetensors: must be named for its first token; remove it"):
        open_features(run)


def answers(run: Path) -> list[object]:
    """Everything that the features of a run say."""
    features = open_features(run)
    asked = [features.n_tokens, features.n_fired.tolist(), features.max_act.tolist()]
    for latent in range(features.d_sae):
        counts, edges = features.histogram(latent)
        asked += [features.top(latent, 50), features.coactive(latent), counts.tolist(), edges.tolist()]
    return asked


def test_a_changed_byte_is_named_wherever_it_is(planted_cache, tmp_path):
    """A byte that no answer hangs on, such as that of an activation by token, may go unnoticed."""
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    expected, random = answers(run), np.random.default_rng(0)
    files = sorted(path for path in (run / "features").iterdir() if path.stat().st_size)
    n_named = 0
    for number in range(60):
        path = files[number % len(files)]
        whole = path.read_bytes()
        data = bytearray(whole)
        start = int(random.integers(len(data)))
        data[start : start + 64] = bytes(byte ^ 0x10 for byte in data[start : start + 64])
        path.write_bytes(data)
        try:
            assert answers(run) == expected, f"{path.name} byte {start}"
        except ManifestError as error:
            n_named += path.name in str(error)
        path.write_bytes(whole)
    assert n_named >= 50


def test_features_without_checksums_are_read(planted_cache, tmp_path):
    """As older versions wrote them."""
    run = planted_run(tmp_path, planted_cache)
    build_features(run, planted_cache)
    expected = answers(run)
    (run / "features" / "crc32c.json").unlink()
    assert answers(run) == expected


def test_wrong_questions_are_named(planted_cache, tmp_path):
    features = build_features(planted_run(tmp_path, planted_cache), planted_cache)
    for latent in (-1, 5):
        for ask in (features.top, features.bands, features.histogram, features.coactive):
            with pytest.raises(ConfigError, match=rf"latent must be in \[0, d_sae=5\), got {latent}"):
                ask(latent)
    for ask in (
        lambda: features.top(0, 0),
        lambda: features.coactive(0, 0),
        lambda: features.bands(0, 0),
        lambda: features.bands(0, 1, 0),
    ):
        with pytest.raises(ConfigError, match="must be at least 1, got 0"):
            ask()


def test_features_are_built_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "features").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match=r"run/features: is a link to .*, and nothing is read or written"):
        only_builder(tmp_path / "run" / "features")
