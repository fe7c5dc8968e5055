"""Caches that lie: every seal and checksum in them is right, what they say is not.

Run as a program it reads them one after the other in a process that may take only little more memory than it has:
`python hostile_caches.py CACHE FOLDER`, where each folder below FOLDER holds files that take the place of the cache's.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]: a C extension without stubs

from actcache.errors import ActcacheError
from support.faults import contents, kept
from support.places import CHILD

Files = dict[str, bytes]  # path below the cache -> content
HEADROOM = 48 << 20  # bytes of address space; the largest file of a hostile cache is 10 MB, and is held four times
MANIFEST, IDENTITY = "manifest/cache.json", "acts.zarr/zarr.json"
HOOK = "blocks.0.hook_resid_post"  # the one that they lie about
STATISTICS = f"stats/train/{HOOK}.json"
SHARD = f"acts.zarr/train/{HOOK}/acts/c/0/0"
ELEMENTS = 1024  # uint16 of a chunk: 32 rows of 32 channels

# Where in the manifest, and what is not believed there. "@" is the name of the hook.
LIES: dict[str, Sequence[object]] = {
    "plan": [None, [], "x", 7, {}],
    "plan.identity": [None, [], "x", {}],
    "plan.identity.format_version": [2, 0, True, 1.0, "1", None, [1]],
    "plan.identity.codec": [None, "pickle", ["raw"], {"raw": 1}, "../raw", 3],
    "plan.identity.dtype": [None, "object", "float64", "int32", ["bfloat16"], {}, 3],
    "plan.identity.shard_rows": [0, -1, 1 << 62, 1 << 19, 96, 384, True, 128.0, "128", [128], None],
    "plan.identity.chunk_rows": [0, -1, 1 << 62, 3, 256, True, 32.0, "32", [32], None],
    "plan.identity.context_size": [0, -1, 1 << 62, 1 << 28, 17, True, 16.0, "16", None],
    "plan.identity.special_token_ids": [None, 3, "ab", [1 << 40], [-1], [0.5], [True], [[0]], {"a": 1}],
    "plan.tokens": [-1, 1.5, "all", [1], True],
    "plan.sequences": [None, [], {}, {"train": None}],
    "plan.sequences.train.n_sequences": [-1, 0, 1 << 60, 1 << 62, True, 55.0, "55", None, [55]],
    "plan.sequences.train.arrays": [None, [], {}, 3],
    "plan.sequences.train.arrays.sequences/id": [None, [], [None], 3, "x", [{}], [{"n_bytes": 1, "checksums": []}]],
    "plan.sequences.train.arrays.sequences/id.0.checksums": [[], [0], [0, 0], [1 << 32], [-1], [True], None, "a"],
    "plan.sequences.train.arrays.sequences/id.0.n_bytes": [-1, 0, 1, 1 << 62, 1 << 64, 1.5, True, None],
    "hooks": [None, [], {}, "x", 3, [None], [[]], ["x"]],
    "hooks.0": [None, {}, {"hook_name": HOOK}, {"x": 1}],
    "hooks.0.d_in": [0, -1, 16, 64, 10**12, 1 << 62, 10**4000, 32.0, True, None, {}, "32", "A" * 10**6, [32] * 10**6],
    "hooks.0.dtype": [None, 3, "float16", "object", [], {}, "A" * 10**6],
    "hooks.0.hook_name": [3, None, [], ["../x"], "blocks.1.hook_attn_out", "tokens", "a\n", "\ud800", "x" * 10**6],
    "shards": [None, [], {}, 3, {"train": []}],
    "shards.train": [None, [], {}, 3, "ab", [None], [[]]],
    "shards.train.0": [None, [], {}, 3],
    "shards.train.0.split": ["validation", "../train", None, 3, []],
    "shards.train.0.index": [1, -1, 1 << 62, False, 0.0, "0", None, []],
    "shards.train.0.first_token": [1, -1, 1 << 62, False, 0.0, "0", None],
    "shards.train.0.n_rows": [0, -1, 127, 129, 1 << 62, 128.0, "128", None, True],
    "shards.train.0.hooks": [None, 3, [None], [{"hook_name": "../x", "d_in": 1, "dtype": "bfloat16"}]],
    "shards.train.0.compute": [None, 3, "ab"],
    "shards.train.0.attempt": [-1, 0.0, "0", True, None, 1e400, [0]],
    "shards.train.0.partials": [None, 3, "ab", {"../x": 1}, {"/x": 1}, {"a\0": 1}, {"a": "1"}, {"a": -1}],
    "shards.train.0.arrays": [None, [], {}, 3],
    "shards.train.0.arrays.tokens/id": [None, [], {}, 3, {"n_bytes": 1}],
    "shards.train.0.arrays.@/acts.n_bytes": [-1, 0, 1, 1 << 62, 1 << 64, 1e300, "1", True, None, []],
    "shards.train.0.arrays.@/acts.checksums": [
        *(None, 3, "abcd", {"a": 0, "b": 0, "c": 0, "d": 0}),
        *([0] * n for n in (0, 1, 3, 4, 5, 10**5)),
        *([checksum] * 4 for checksum in (1 << 32, -1, 0.5, True, "0", None, [0])),
    ],
}
NAMES = ["../x", "../../../etc", "/etc", ".", "..", "", "a/b", "a-b", "a b", ".a", "a.", "a..b", "a\0b", "a\n", "ü"]
LONG_NAMES = ["tokens", "sequences", "x" * 300, "x" * 5000]  # of dotted words, but not what the folders are called

TEXTS = {
    "nested": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "nested lists": b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "half nested": b'{"a":' + b"[" * 10**6 + b"}",
    "long number": b'{"a":' + b"7" * 10**7 + b"}",
    "long exponent": b'{"a":1e999999999,"b":-1E+99999}',
    "not utf-8": b'{"a":"\xff\xfe"}',
    "utf-16": '{"a":1}'.encode("utf-16"),
    "no json": b"{]}",
    "nothing": b"{}",
    "zeros": b"{" + bytes(10**6) + b"}",
    "surrogate": b'{"a":"\\ud800"}',
}


def sealed(values: object) -> bytes:
    """JSON under a seal that is right, of values that manifest.seal would not take too."""
    return sealed_text(json.dumps(values).encode())


def sealed_text(text: bytes) -> bytes:
    """A text that ends with a brace, under a seal that is right, whatever it holds."""
    body = text[:-1]
    return body + b',"crc32c":"%08x"}\n' % google_crc32c.value(body)


def unsealed(path: Path) -> dict[str, Any]:
    """The values of a sealed file."""
    values = json.loads(path.read_bytes())
    del values["crc32c"]
    return values


def at(values: Any, keys: Sequence[str | int]) -> Any:
    """The value in nested JSON that the keys lead to."""
    for key in keys:
        values = values[key]
    return values


def keys_of(dotted: str) -> list[str | int]:
    """Keys of nested JSON from "a.0.b"; "@" is the name of the hook."""
    return [int(key) if key.isdigit() else key.replace("@", HOOK) for key in dotted.split(".")]


def changed(values: Mapping[str, Any], dotted: str, to: object) -> dict[str, Any]:
    """The same JSON with another value at one place."""
    values = copy.deepcopy(dict(values))
    *way, last = keys_of(dotted)
    at(values, way)[last] = to
    return values


def without(values: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    """The same JSON without one of its values."""
    values = copy.deepcopy(dict(values))
    *way, last = keys_of(dotted)
    del at(values, way)[last]
    return values


def with_manifest(values: Mapping[str, Any], root: Path) -> Files:
    """The files of a cache with that manifest; zarr.json says the same identity, so it is not refused for that."""
    store = json.loads((root / IDENTITY).read_bytes())
    plan = values.get("plan")
    store["attributes"]["actcache"] = plan.get("identity") if isinstance(plan, dict) else None
    return {MANIFEST: sealed(values), IDENTITY: json.dumps(store).encode()}


def lying_manifests(root: Path) -> dict[str, Files]:
    """One value of the manifest is impossible, of another type, or missing."""
    values = unsealed(root / MANIFEST)
    cases = {
        f"{place} = {str(lie)[:40]!r} {number}": with_manifest(changed(values, place, lie), root)
        for place, lies in LIES.items()
        for number, lie in enumerate(lies)
    }
    places = [place for place in LIES if not place.endswith(".0")]  # of a list without its first the rest may be sound
    return cases | {f"{place} is missing": with_manifest(without(values, place), root) for place in places}


def lying_names(root: Path) -> dict[str, Files]:
    """A hook is renamed wherever the manifest speaks of it, so that nothing is wrong but the name itself."""
    text = json.dumps(unsealed(root / MANIFEST))
    renamed = {name: json.loads(text.replace(HOOK, json.dumps(name)[1:-1])) for name in NAMES + LONG_NAMES}
    return {f"hook {name[:40]!r} {len(name)}": with_manifest(values, root) for name, values in renamed.items()}


def nested_manifests(root: Path) -> dict[str, Files]:
    """Nested nearly as deep as the parser allows, so that it is comparing or printing what was parsed that fails."""
    values = unsealed(root / MANIFEST)
    keys = ("format_version", "codec", "dtype", "shard_rows", "special_token_ids")
    places = [*(f"plan.identity.{key}" for key in keys), "hooks.0.dtype", "hooks.0.d_in", "shards.train.0.split"]
    cases = {}
    for depth in (100, 400, 700, 900):
        nested: object = 1
        for _ in range(depth):
            nested = [nested]
        cases |= {f"{place} nested {depth}": with_manifest(changed(values, place, nested), root) for place in places}
    return cases


def lying_texts() -> dict[str, Files]:
    """What JSON can be made to hold, in each of the three files of JSON that a reader reads."""
    cases: dict[str, Files] = {}
    for name, text in TEXTS.items():
        cases[f"{name} as manifest"] = {MANIFEST: sealed_text(text)}
        cases[f"{name} as statistics"] = {STATISTICS: sealed_text(text)}
        cases[f"{name} as zarr.json"] = {IDENTITY: text}
        cases[f"{name} as identity"] = {IDENTITY: b'{"attributes":{"actcache":' + text + b"}}"}
    return cases


def lying_statistics(root: Path) -> dict[str, Files]:
    """Numbers that are none, or not as many as they must be."""
    values = unsealed(root / STATISTICS)
    kind = values["all"]
    mean, counts, n_rows = kind["mean"], kind["norm_histogram"], kind["n_rows"]
    lies: dict[str, Sequence[object]] = {
        "n_rows": [0, -1, True, 1e3, str(n_rows), None, 10**4000, n_rows + 1],
        "mean": [None, [], 3, "x" * 32, [None] * 32, ["1.5"] * 32, mean[:-1], [mean] * 32, {}],
        "variance": [[], mean * 2, [float("nan")] * 32, [float("inf")] * 32, [10**400] * 32, [True] * 32],
        "geometric_median": [[], None, [float("-inf")] * 32, [[]] * 32],
        "mean_norm": [None, "1", [], float("nan"), 1e400, True, 10**4000],
        "mean_square_norm": [None, {}, float("inf")],
        "norm_histogram": [
            *(None, [], "x" * 512, counts[:-1], [0, *counts], [-n for n in counts], [*counts[1:], 10**99]),
            *([n] * 512 for n in (1e3, 1 << 63, 10**4000, True, [0])),
        ],
    }
    cases: dict[str, object] = {
        f"statistics {key} = {str(lie)[:30]!r} {number}": changed(values, f"all.{key}", lie)
        for key, some in lies.items()
        for number, lie in enumerate(some)
    }
    cases |= {f"statistics {key} is missing": without(values, f"all.{key}") for key in lies}
    cases |= {f"statistics are {lie!r}": {**values, "all": lie} for lie in (None, [], "x", 3)}
    twice = {"n_rows": 2 * n_rows, "norm_histogram": [2 * count for count in counts]}
    cases["statistics of more rows"] = {**values, "all": {**kind, **twice}}
    narrow = {key: kind[key][:-1] for key in ("mean", "variance", "geometric_median")}
    cases["statistics of a narrower hook"] = {**values, "all": {**kind, **narrow}}
    return {name: {STATISTICS: sealed(lie)} for name, lie in cases.items()}


def sound_chunk() -> bytes:
    """A chunk as blosc makes it."""
    return blosc.compress(np.arange(ELEMENTS, dtype=np.uint16), b"zstd", 1, blosc.SHUFFLE, 1 << 20, 2)


def with_header(chunk: bytes, byte: int, number: int) -> bytes:
    """Another 32-bit number in a blosc chunk: 4 uncompressed size, 8 block size, 12 compressed size, 16 first block."""
    return chunk[:byte] + number.to_bytes(4, "little") + chunk[byte + 4 :]


def with_shard(root: Path, chunks: Sequence[bytes], entries: Sequence[tuple[int, int]] | None = None) -> Files:
    """A shard of these chunks, and the manifest that vouches for it.

    entries: (offset, size) of each chunk in the index; without them, where the chunks really lie.
    """
    stored = [chunk + google_crc32c.value(chunk).to_bytes(4, "little") for chunk in chunks]
    sizes = [len(chunk) for chunk in stored]
    places = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))
    index = np.array(places if entries is None else entries, dtype="<u8").tobytes()
    shard = b"".join([*stored, index, google_crc32c.value(index).to_bytes(4, "little")])
    record = {"n_bytes": len(shard), "checksums": [google_crc32c.value(chunk) for chunk in chunks]}
    values = changed(unsealed(root / MANIFEST), "shards.train.0.arrays.@/acts", record)
    return {**with_manifest(values, root), SHARD: shard}


def lying_chunks(root: Path) -> dict[str, Files]:
    """The first of four chunks is no chunk, or is not of the size that it says."""
    good = sound_chunk()
    bomb = blosc.compress(np.zeros(256 << 20, np.uint8), b"zstd", 1, blosc.SHUFFLE, 1 << 20, 2)
    chunks = {
        "chunk of 2 GiB": with_header(good, 4, (1 << 31) - 1),
        "chunk of 4 GiB": with_header(good, 4, (1 << 32) - 1),
        "chunk of nothing": with_header(good, 4, 0),
        "chunk of one byte more": with_header(good, 4, 2 * ELEMENTS + 1),
        "256 MiB in few bytes": bomb,
        "256 MiB in few bytes that say 2 KiB": with_header(bomb, 4, 2 * ELEMENTS),
        "block of 2 GiB": with_header(good, 8, (1 << 31) - 1),
        "block of nothing": with_header(good, 8, 0),
        "first block far away": with_header(good, 16, 1 << 30),
        "another version": b"\xff" + good[1:],
        "no blosc": bytes(64),
        "header alone": good[:16],
        "half a header": good[:10],
        "nothing": b"",
        "cut": good[:-9],
    }
    return {name: with_shard(root, [chunk, good, good, good]) for name, chunk in chunks.items()}


def chunks_beyond_their_end(root: Path) -> dict[str, Files]:
    """The compressed size in the header of a chunk says more than there is."""
    good = sound_chunk()
    copied = with_header(good[:2] + bytes([good[2] | 2]) + good[3:], 12, 2 * ELEMENTS + 16)  # flag 2: not compressed
    far = with_header(with_header(good, 12, (1 << 31) - 1), 16, (1 << 31) - 512)
    chunks = {"one byte": with_header(good, 12, len(good) + 1), "copied": copied, "block far away": far}
    return {name: with_shard(root, [chunk, good, good, good]) for name, chunk in chunks.items()}


def lying_indices(root: Path) -> dict[str, Files]:
    """The first or the last entry of a shard's index leads elsewhere."""
    good = sound_chunk()
    n = len(good) + 4
    absent = (1 << 64) - 1
    first = {
        "2^63 bytes": (0, 1 << 63),
        "at 2^63": (1 << 63, n),
        "around 2^64": ((1 << 64) - 8, n + 8),
        "absent": (absent, absent),
        "half absent": (absent, n),
        "empty": (0, 0),
        "three bytes": (0, 3),
        "overlapping": (8, n),
        "all of it": (0, 4 * n),
        "into the index": (3 * n, n + 1),
    }
    rest = [(n, n), (2 * n, n), (3 * n, n)]
    return {f"entry {name}": with_shard(root, [good] * 4, [entry, *rest]) for name, entry in first.items()}


def hostile_texts(root: Path) -> dict[str, Files]:
    """Every manifest, zarr.json and file of statistics that must be refused."""
    return {
        **lying_manifests(root),
        **lying_names(root),
        **nested_manifests(root),
        **lying_texts(),
        **lying_statistics(root),
    }


def hostile_shards(root: Path) -> dict[str, Files]:
    """Every shard that must be refused."""
    return {**lying_chunks(root), **lying_indices(root)}


def odd_caches(root: Path) -> dict[str, Files]:
    """Unusual ways to say what is true; whoever reads them must be given the true rows."""
    values = unsealed(root / MANIFEST)
    text = json.dumps(values).encode()
    reordered = json.dumps(dict(reversed(values.items())), indent=2).encode()
    return {
        "as it is": {MANIFEST: (root / MANIFEST).read_bytes()},
        "other order and spaces": {MANIFEST: sealed_text(reordered)},
        "keys twice, the last ones true": {MANIFEST: sealed_text(b'{"hooks":[],"plan":null,' + text[1:])},
        "what nobody asked": {MANIFEST: sealed({**values, "note": [float("nan"), 1e999]})},
    }


def outcomes(root: Path, folder: Path, cases: dict[str, Files]) -> dict[str, dict[str, Any]]:
    """Name of the case -> what came of reading it, in one process of little memory, as a user's own program runs.

    {"error", "ours", "text"}, or {"crc32c"}: name -> checksum of all that was read.
    """
    numbers = {f"{number:04d}": name for number, name in enumerate(cases)}
    for number, name in numbers.items():
        for key, content in cases[name].items():
            path = folder / number / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    command = [sys.executable, __file__, str(root), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=CHILD)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    reached = numbers.get(f"{len(found):04d}", "the end")
    assert done.returncode == 0, f"exit code {done.returncode} at {reached}: {done.stderr[-2000:]}"
    return {numbers[one["number"]]: one for one in found}


def _outcome(path: Path) -> dict[str, Any]:
    try:
        found = contents(path)
    except BaseException as error:  # whatever it is, it is told
        return {"error": type(error).__name__, "ours": isinstance(error, ActcacheError), "text": str(error)[:2000]}
    return {"crc32c": {name: google_crc32c.value(content) for name, content in found.items()}}


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _main(cache: Path, folder: Path) -> None:
    contents(cache)  # everything is imported and warm
    limit = _address_space() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in sorted(folder.iterdir()):
        targets = {file: cache / file.relative_to(case) for file in case.rglob("*") if file.is_file()}
        with kept(*targets.values()):
            for file, target in targets.items():
                shutil.copyfile(file, target)
            print(json.dumps({"number": case.name, **_outcome(cache)}), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
