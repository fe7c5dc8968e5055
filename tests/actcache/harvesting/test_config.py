import pytest
from support.tiny_caches import harvest_tiny

from actcache.errors import ConfigError


@pytest.mark.parametrize(
    "bad",
    [
        {"hook_names": ()},
        {"hook_names": ("../x",)},
        {"context_size": 1},
        {"tokens": 3},
        {"dtype": "int8"},
        {"codec": "zip"},
        {"holdout": 1.0},
        {"seed": -1},
        {"separator": "comma"},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_bad_settings_are_named(tiny_model, tiny_texts, tmp_path, bad):
    with pytest.raises(ConfigError, match="hook name" if "../x" in str(bad) else next(iter(bad))):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **bad)
    assert not (tmp_path / "c").exists()
