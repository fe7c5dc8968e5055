import pytest
from support.tiny_caches import HOOKS, TOKENS, harvest_tiny

from actcache.errors import DiskTooSmall


def test_the_estimate_covers_what_is_stored(tiny_model, tiny_texts, tmp_path):
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.estimate import expected_bytes
    from actcache.harvesting.run import dry_run
    from actcache.text.sources import DatasetSource

    source = DatasetSource(path=str(tiny_texts))
    for tokens in (TOKENS, None):
        config = HarvestConfig(hook_names=HOOKS, context_size=16, holdout=0.2, tokens=tokens, codec="raw")
        found = dry_run(tiny_model, source, config, tmp_path / "c")
        assert not (tmp_path / "c").exists(), "a dry run writes nothing"
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / str(tokens), tokens=tokens, codec="raw")
        assert found.n_rows == sum(cache.n_rows(split) for split in ("train", "validation"))
        assert found.n_bytes == expected_bytes(found.n_rows, cache.manifest.hooks, "raw")
        values = found.n_rows * sum(hook.d_in * 2 for hook in cache.manifest.hooks)
        assert found.n_bytes == values + found.n_rows * 20, "raw rows, and five int32 a token"
        assert found.seconds is not None
        assert found.seconds > 0
    again = dry_run(tiny_model, source, config, tmp_path / "None")
    assert (again.n_rows, again.n_bytes) == (0, 0)


def test_too_small_a_disk_is_refused_before_any_work(tiny_model, tiny_texts, tmp_path):
    with pytest.raises(DiskTooSmall, match=r"shards will take about .* GB, the disk has .* GB free"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=10**15)
    assert not (tmp_path / "c").exists()
