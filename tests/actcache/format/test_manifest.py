import copy
import json

import pytest

from actcache.errors import CacheMismatch, ManifestError
from actcache.format.arrays import LARGEST_CHUNK_BYTES, MAX_SHARDS, MAX_WIDTH, MIN_CHUNK_ROWS, chunk_rows, shard_rows
from actcache.format.manifest import Manifest, Plan


def test_json_round_trip(tiny_cache):
    manifest = tiny_cache.manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_unknown_hook_lists_the_hooks(tiny_cache):
    with pytest.raises(CacheMismatch, match=r"blocks\.1\.hook_attn_out.*got hook_name='blocks\.9\.hook_resid_post'"):
        tiny_cache.hook("blocks.9.hook_resid_post")


def broken(values: dict) -> dict[str, dict]:
    """Name -> a manifest that breaks one rule; each keeps a valid seal, as a malicious one would."""

    def change(*path, to):
        changed = copy.deepcopy(values)
        at = changed
        for key in path[:-1]:
            at = at[key]
        if to is KeyError:
            del at[path[-1]]
        else:
            at[path[-1]] = to
        return changed

    train = values["shards"]["train"]
    return {
        "another version": change("plan", "identity", "format_version", to=2),
        "unknown codec": change("plan", "identity", "codec", to="pickle"),
        "unknown dtype": change("plan", "identity", "dtype", to="object"),
        "huge shards": change("plan", "identity", "shard_rows", to=1 << 60),
        "shard rows as text": change("plan", "identity", "shard_rows", to="128"),
        "no context": change("plan", "identity", "context_size", to=0),
        "no identity": change("plan", "identity", to=KeyError),
        "no plan": change("plan", to=KeyError),
        "hooks as a number": change("hooks", to=3),
        "no hooks": change("hooks", to=[]),
        "hook that climbs": change("hooks", 0, "hook_name", to="../../etc"),
        "huge width": change("hooks", 0, "d_in", to=1 << 50),
        "huge chunks": change("plan", "identity", "chunk_rows", to=1 << 50),
        "path that climbs": change("shards", "train", 0, "arrays", to={"../../x": train[0]["arrays"]["tokens/id"]}),
        "absolute path": change("shards", "train", 0, "arrays", to={"/etc/passwd": train[0]["arrays"]["tokens/id"]}),
        "missing shard": change("shards", "train", to=[*train[:1], *train[2:]]),
        "missing tail": change("shards", "train", to=train[:-1]),
        "shard of another split": change("shards", "train", 0, "split", to="validation"),
        "shard without tokens": change("shards", "train", 0, "arrays", to={}),
        "shard too long": change("shards", "train", 0, "n_rows", to=1 << 40),
        "negative sequences": change("plan", "sequences", "train", "n_sequences", to=-1),
        "nothing of how it was computed": change("shards", "train", 0, "compute", to={}),
        "batch size as text": change("shards", "train", 0, "compute", "batch_size", to="8"),
        "huge batch size": change("shards", "train", 0, "compute", "batch_size", to=1 << 40),
        "nested compute": change("shards", "train", 0, "compute", "torch", to={"a": []}),
        "long compute": change("shards", "train", 0, "compute", "torch", to="$(rm -r .)" * 100),
        "compute as a list": change("shards", "train", 0, "compute", to=[["batch_size", 8]]),
        "many sequences": change("plan", "sequences", "train", "n_sequences", to=1 << 40),
    }


def test_malformed_manifests_are_refused(tiny_cache):
    values = json.loads(json.dumps(tiny_cache.manifest.to_json()))
    Manifest.from_json(values)
    for name, bad in broken(values).items():
        try:
            Manifest.from_json(bad)
        except ManifestError:
            continue
        pytest.fail(f"{name} was believed")


def test_no_chunk_is_larger_than_a_writer_makes_it(tiny_cache):
    """Zeros are small on disk: shards of 616 kB, with chunks of 1 GiB, had one batch ask for 16 GiB."""
    values = json.loads(json.dumps(tiny_cache.manifest.to_json()))
    identity, hook = values["plan"]["identity"], values["hooks"][0]
    identity["shard_rows"] = identity["chunk_rows"] = 1 << 18
    said = rf"at most 32 rows or {9 << 18} bytes, those of .* are of 262144 rows of 64"
    with pytest.raises(ManifestError, match=said):
        Manifest.from_json(values)
    identity["chunk_rows"], hook["d_in"] = 32, (1 << 18) + 1
    with pytest.raises(ManifestError, match="an impossible dtype or width"):
        Manifest.from_json(values)


@pytest.mark.parametrize("d_in", [1, 31, 768, 2304, 12288, 65536, 1 << 18])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_a_writer_chooses_is_accepted(d_in, itemsize):
    rows = shard_rows(d_in, itemsize, n_hooks=1, n_rows=1 << 30, batch_tokens=4096)
    chunk = chunk_rows(d_in, itemsize, rows)
    assert chunk <= MIN_CHUNK_ROWS or chunk * d_in * itemsize <= LARGEST_CHUNK_BYTES
    assert d_in <= MAX_WIDTH


def test_a_plan_makes_no_more_shards_than_a_manifest_can_hold(tiny_cache):
    """A plan of 1.2 kB made three million."""
    values = json.loads(json.dumps(tiny_cache.manifest.plan.to_json()))
    values["identity"] |= {"shard_rows": 1, "chunk_rows": 1, "context_size": 1}
    record = {"n_bytes": 1, "checksums": [0]}
    for split, n_shards in (("train", 2), ("validation", 0)):
        arrays = {name: [record] * n_shards for name in ("sequences/id", "sequences/document")}
        values["sequences"][split] = {"n_sequences": n_shards << 18, "arrays": arrays}
    assert Plan.from_json(values).n_shards("train") == MAX_SHARDS
    values["sequences"]["validation"] = {"n_sequences": 1, "arrays": {name: [record] for name in arrays}}
    with pytest.raises(ManifestError, match="must make at most 524,288 shards, it makes 524,289"):
        Plan.from_json(values)


def test_a_plan_names_no_impossible_hook(tiny_cache):
    values = json.loads(json.dumps(tiny_cache.manifest.plan.to_json()))
    values["hooks"] = [{"hook_name": "a", "d_in": 1 << 40, "dtype": tiny_cache.identity["dtype"]}]
    with pytest.raises(ManifestError, match="a has an impossible dtype or width"):
        Plan.from_json(values)
