import pytest
from support.tiny_caches import harvest_tiny

from actcache.errors import CacheMismatch


def test_an_unfinished_harvest_is_not_taken_for_a_smaller_one(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    (root / "manifest" / "cache.json").unlink()
    with pytest.raises(CacheMismatch, match=r"harvest of 1000 tokens, 500 asked; finish it with --tokens 1000"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=500)
    assert harvest_tiny(tiny_model, tiny_texts, root, tokens=1000).fingerprint
