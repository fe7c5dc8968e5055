import numpy as np
import pytest
from support import naive_loader
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import ConfigError
from actcache.loading.loader import Loader

SETTINGS = [
    {},
    {"exclude_special_tokens": False},
    {"positions": slice(4, 9)},
    {"positions": slice(None, -3)},
    {"positions": slice(None, None, -5), "exclude_special_tokens": False},
    {"max_norm_ratio": 1.2},
    {"max_norm_ratio": 0.9, "exclude_special_tokens": False},
    {"positions": slice(1, None, 2), "max_norm_ratio": 1.1},
    {"max_norm_ratio": 1e6},
]


@pytest.fixture(scope="module")
def int8_cache(tiny_model, tiny_texts, tmp_path_factory):
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("int8") / "c", codec="int8", dtype="float16")


def check(cache, hook_names, split="train", **settings) -> dict[str, int]:
    """The loader serves and counts what the definition does; returns the counts."""
    expected, dropped = naive_loader.served_rows(cache, hook_names, split=split, group_chunks=5, **settings)
    with Loader(cache, hook_names, split=split, batch_tokens=1000, group_chunks=5, **settings) as loader:
        assert [row for batch in loader for row in batch.row.tolist()] == expected.tolist()
        assert loader.dropped == dropped
        assert list(loader.dropped) == ["exclude_special_tokens", "positions", "max_norm_ratio"]
        assert loader.n_rows == len(expected)
        assert loader.n_rows + sum(loader.dropped.values()) == loader.n_stored_rows == cache.n_rows(split)
    return dropped


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_served_and_counted_as_defined(tiny_cache, split, settings):
    dropped = check(tiny_cache, HOOKS[:1], split, **settings)
    assert dropped["exclude_special_tokens"] == 0 or settings.get("exclude_special_tokens", True)
    assert (dropped["positions"] > 0) == ("positions" in settings)
    assert (dropped["max_norm_ratio"] > 0) == (settings.get("max_norm_ratio", 1e6) < 1e6)


def test_a_row_is_dropped_for_its_norm_at_any_of_the_hooks(tiny_cache):
    together = check(tiny_cache, HOOKS, max_norm_ratio=1.3)["max_norm_ratio"]
    alone = [check(tiny_cache, [hook_name], max_norm_ratio=1.3)["max_norm_ratio"] for hook_name in HOOKS]
    assert max(alone) < together < sum(alone)


@pytest.mark.parametrize("hook_names", [HOOKS[:1], HOOKS], ids=len)
def test_norms_of_quantised_rows_are_those_of_their_values(int8_cache, hook_names):
    assert check(int8_cache, hook_names, max_norm_ratio=1.2)["max_norm_ratio"] > 0


def test_the_median_is_that_of_the_rows_without_special_tokens(tiny_cache):
    """Within the half bin, a sixteenth of an octave, by which norm_quantile may be off."""
    norms = np.linalg.norm(naive_loader.activations(tiny_cache, HOOKS[0]).double().numpy(), axis=1)
    norms = norms[~np.isin(naive_loader.array(tiny_cache, "train", "tokens/id"), tiny_cache.special_token_ids)]
    dropped = Loader(tiny_cache, HOOKS[0], max_norm_ratio=1.0).dropped["max_norm_ratio"]
    low, high = ((norms > np.median(norms) * 2 ** (side / 16)).sum() for side in (1, -1))
    assert low <= dropped <= high


def test_when_every_row_is_dropped_there_is_no_batch(tiny_cache):
    with Loader(tiny_cache, HOOKS[0], max_norm_ratio=1e-9, epochs=3) as loader:
        assert (loader.n_rows, loader.n_steps, list(loader)) == (0, 0, [])


def test_a_split_of_special_tokens_alone_has_no_median(tiny_model, tmp_path):
    tokens = tmp_path / "special.jsonl"
    tokens.write_text('{"input_ids": [1, 1, 1, 1]}\n' * 200)
    cache = harvest_tiny(tiny_model, tokens, tmp_path / "c", hook_names=HOOKS[:1], holdout=0.0)
    assert Loader(cache, HOOKS[0]).n_rows == 0
    with pytest.raises(ConfigError, match="max_norm_ratio"):
        Loader(cache, HOOKS[0], max_norm_ratio=2.0)
