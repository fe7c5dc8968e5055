import json

import pytest

from actcache.commands.lines import cache_facts, cache_lines, estimate_line
from actcache.harvesting.estimate import Estimate


@pytest.mark.parametrize(
    ("seconds", "end"), [(None, ""), (0.4, ", about 0 s in the model"), (7200.0, ", about 7,200 s in the model")]
)
def test_an_estimate_is_one_line(seconds, end):
    found = Estimate(n_rows=1_234_567, n_bytes=2_500_000_000, free_bytes=10**12, seconds=seconds)
    line = "to harvest: 1,234,567 rows, at most about 2.5 GB (1e+03 GB free)"
    assert estimate_line(found) == line + end


def test_facts_are_those_of_the_folder(tiny_cache):
    facts = json.loads(json.dumps(cache_facts(tiny_cache)))
    store = tiny_cache.path / "acts.zarr"
    shards = [path for path in store.rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert facts["stored_bytes"] == sum(path.stat().st_size for path in shards)
    for split, n_rows in facts["rows"].items():
        for hook_name, d_in in facts["hooks"].items():
            metadata = json.loads((store / split / hook_name / "acts" / "zarr.json").read_text())
            assert metadata["shape"] == [n_rows, d_in]
    identity = json.loads((store / "zarr.json").read_text())["attributes"]["actcache"]
    for name in ("model", "dataset", "context_size", "dtype", "codec", "shard_rows"):
        assert facts[name] == identity[name]


def test_lines_say_the_same(tiny_cache):
    facts, lines = cache_facts(tiny_cache), cache_lines(tiny_cache)
    assert [line.split()[0] for line in lines] == ["cache", "model", "dataset", "hooks", "rows", "stored"]
    assert lines[0].split()[1:] == [facts["path"], f"({facts['fingerprint']})"]
    for name, d_in in facts["hooks"].items():
        assert f"{name} [{d_in}]" in lines[3]
    for split, n_rows in facts["rows"].items():
        assert f"{n_rows:,} {split}" in lines[4]
    assert f"{facts['stored_bytes']:,} bytes, bfloat16, lossless" in lines[5]
