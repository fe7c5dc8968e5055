import json
from dataclasses import replace
from itertools import permutations

import pytest

from actcache.errors import ManifestError
from actcache.format.records import (
    ArrayRecord,
    HookSpec,
    ShardRecord,
    hook_spec,
    merge_records,
    sequences_record,
    shard_record,
    whole_number,
)

A, B = (HookSpec(hook_name=f"blocks.{layer}.hook_resid_post", d_in=8, dtype="bfloat16") for layer in (0, 1))


def line(hook: HookSpec, *, checksum: int = 1, revision: int = 0, n_rows: int = 64) -> ShardRecord:
    """What a writer says when it has stored one hook of shard 2 of train."""
    return ShardRecord(
        split="train",
        index=2,
        first_token=256,
        n_rows=n_rows,
        hooks=(hook,),
        arrays={f"{hook.hook_name}/acts": ArrayRecord(n_bytes=100, checksums=(checksum,))},
        partials={f"manifest/partials/train-000002-{hook.hook_name}.safetensors": checksum},
        compute={"batch_size": 1, "torch": str(checksum)},
        revision=revision,
    )


def test_a_line_survives_json():
    record = line(A, checksum=(1 << 32) - 1, revision=3)
    values = json.loads(json.dumps(record.to_json()))
    assert values["attempt"] == 3, "the name that lines of old caches have"
    assert shard_record(values) == record


def test_lines_of_one_shard_become_one_record_in_any_order():
    lines = [line(A), line(B, revision=1, checksum=2), line(A, revision=2, checksum=3)]
    for order in permutations(lines):
        (record,) = merge_records(order).values()
        assert {hook.hook_name for hook in record.hooks} == {A.hook_name, B.hook_name}
        assert {path: stored.checksums for path, stored in record.arrays.items()} == {
            f"{A.hook_name}/acts": (3,),
            f"{B.hook_name}/acts": (2,),
        }
        assert (record.revision, record.compute) == (2, {"batch_size": 1, "torch": "3"})


def test_a_line_of_a_grown_shard_replaces_those_before():
    grown = line(B, revision=1, n_rows=128)
    assert merge_records([line(A), grown]) == merge_records([grown, line(A)]) == {("train", 2): grown}


def test_shards_are_told_apart_by_split_and_number():
    others = [replace(line(A), index=3), replace(line(A), split="validation")]
    assert merge_records([line(A), *others]).keys() == {("train", 2), ("train", 3), ("validation", 2)}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 8, [[[]]]])
def test_only_a_whole_number_in_range_is_one(value):
    assert whole_number("n", 7, highest=7) == 7
    with pytest.raises(ManifestError, match=r"n must be a whole number in \[0, 7\], got"):
        whole_number("n", value, highest=7)


@pytest.mark.parametrize(
    "changed",
    [
        {"split": "test"},
        {"index": -1},
        {"n_rows": "64"},
        {"arrays": {"../x": {"n_bytes": 1, "checksums": []}}},
        {"arrays": {"/etc/passwd": {"n_bytes": 1, "checksums": []}}},
        {"arrays": {"a/./b": {"n_bytes": 1, "checksums": []}}},
        {"arrays": {"a": {"n_bytes": 1, "checksums": [1 << 32]}}},
        {"partials": {"..": 1}},
        {"partials": {"p": -1}},
        {"attempt": None},
    ],
    ids=str,
)
def test_a_malformed_line_is_refused(changed):
    values = line(A).to_json()
    shard_record(values)
    with pytest.raises((ManifestError, ValueError)):
        shard_record({**values, **changed})


def test_hooks_and_sequences_are_checked():
    assert hook_spec({"hook_name": "a.b_1", "d_in": 1, "dtype": "float32"}).d_in == 1
    for bad in ({"hook_name": "a/b"}, {"hook_name": "a..b"}, {"d_in": 0}):
        with pytest.raises(ManifestError):
            hook_spec({"hook_name": "a", "d_in": 1, "dtype": "float32", **bad})
    stored = {"n_bytes": 5, "checksums": [1]}
    found = sequences_record({"n_sequences": 3, "arrays": {"sequences/id": [stored, stored]}})
    assert (found.n_sequences, len(found.arrays["sequences/id"])) == (3, 2)
    with pytest.raises(ManifestError, match="n_sequences"):
        sequences_record({"n_sequences": -1, "arrays": {}})


@pytest.mark.parametrize("place", ["split", "hook", "path"])
def test_what_is_quoted_of_a_line_is_short(place):
    values, long = line(A).to_json(), "x " * 10**6
    if place == "hook":
        values["hooks"] = [{"hook_name": long, "d_in": 1, "dtype": "bfloat16"}]
    else:
        values |= {"split": long} if place == "split" else {"partials": {long: 1}}
    with pytest.raises((ManifestError, ValueError)) as raised:
        shard_record(json.loads(json.dumps(values)))
    assert len(str(raised.value)) < 500
