"""Real damage to real caches: whatever is wrong on disk is an error of ours that names the file, or changes no row."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faults import Opened, answer, contents, flipped, flips, kept, kept_folder, reads
from support.hostile_caches import (
    IDENTITY,
    MANIFEST,
    SHARD,
    at,
    chunks_beyond_their_end,
    hostile_shards,
    hostile_texts,
    odd_caches,
    outcomes,
    sealed,
    unsealed,
    with_manifest,
)
from support.places import CHILD
from support.strangers import as_another_user, copy_of_another_user, only_root
from support.tiny_caches import HOOKS, harvest_tiny, promised_files
from support.tiny_models import D_MODEL

from actcache.errors import ActcacheError, ManifestError, NonFiniteActivations
from actcache.flow import SPLITS
from actcache.format.arrays import SEQUENCE_ARRAYS, TOKEN_ARRAYS
from actcache.models.load import load_model
from actcache.store.cache import Cache, open_cache

CODECS = ("lossless", "fast", "raw", "int8")
ROWS, CHUNK_ROWS = 128, 32  # of a shard and of a chunk of the caches below
SETTINGS = {"hook_names": HOOKS[:2], "tokens": 72 * 16, "holdout": 0.5}  # a partial last shard in both splits
PLAN, JOURNAL, PARTIALS = "manifest/plan.json", "manifest/writer-00.jsonl", "manifest/partials"
OPENED = Opened()


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Without the type checks that pytest adds: they would catch a malformed manifest before the code under test."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """Several chunks in a shard, as in a cache of more than toy width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache.format.arrays.MAX_CHUNK_BYTES", CHUNK_ROWS * D_MODEL * 2)
        yield


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory, _small_chunks) -> dict[str, Cache]:
    """A cache for each codec; do not change them."""
    folder = tmp_path_factory.mktemp("sound")
    return {codec: harvest_tiny(tiny_model, tiny_texts, folder / codec, codec=codec, **SETTINGS) for codec in CODECS}


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    return shutil.copytree(sound["lossless"].path, tmp_path / "c")


def hook_shard(root: Path, index: int = 2, array: str = "acts") -> Path:
    return root / "acts.zarr" / "train" / HOOKS[0] / array / "c" / str(index) / "0"


def test_the_caches_under_test_have_every_feature(sound):
    for cache in sound.values():
        assert (cache.manifest.shard_rows, cache.manifest.chunk_rows) == (ROWS, CHUNK_ROWS)
        assert all(cache.n_rows(split) > ROWS and cache.n_rows(split) % ROWS for split in SPLITS)


# --- flipped bits ---


def shards_of(root: Path, codec: str) -> dict[str, Path]:
    """Kind -> a shard of every kind of array; of hooks a whole one and the partial last one."""
    store, arrays = root / "acts.zarr", ("q8", "scale") if codec == "int8" else ("acts",)
    last = max(int(path.name) for path in hook_shard(root, 0, arrays[0]).parents[1].iterdir())
    return {
        **{f"{array} shard": hook_shard(root, 2, array) for array in arrays},
        **{f"last {array} shard": hook_shard(root, last, array) for array in arrays},
        **{f"{name} shard": store / "validation" / name / "c/0" for name in TOKEN_ARRAYS},
        **{f"{name} shard": store / "train" / name / "c/0/0" for name in SEQUENCE_ARRAYS},
    }


def texts_of(root: Path) -> dict[str, Path]:
    """Kind -> a file of JSON that readers read."""
    return {
        "manifest": root / MANIFEST,
        "zarr.json of the root": root / IDENTITY,
        "statistics": root / "stats/train" / f"{HOOKS[0]}.json",
    }


def index_start(path: Path) -> int:
    """Where the index of a shard begins: 16 bytes for each of its chunks and 4 of checksum lie at its end."""
    n_chunks = ROWS // CHUNK_ROWS if HOOKS[0] in path.parts else 1
    return path.stat().st_size - 16 * n_chunks - 4


def parts_of(root: Path, codec: str) -> dict[str, tuple[Path, int, int]]:
    """Kind -> (file, first byte, last byte + 1): where bits are flipped; the chunks of a shard and its index apart."""
    shards = shards_of(root, codec)
    return {
        **{kind: (path, 0, index_start(path)) for kind, path in shards.items()},
        **{f"index of {kind}": (path, index_start(path), path.stat().st_size) for kind, path in shards.items()},
        **{kind: (path, 0, path.stat().st_size) for kind, path in texts_of(root).items()},
    }


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_an_error_that_names_the_file_or_changes_nothing(sound, codec):
    """Each bit is tried on every read that opens its file; the other reads cannot notice, as they do not open it."""
    every = reads(sound[codec])
    truth = {name: read() for name, read in every.items()}
    openers = {name: OPENED.by(read) for name, read in every.items()}
    for kind, (path, start, stop) in parts_of(sound[codec].path, codec).items():
        touched = [name for name, paths in openers.items() if str(path) in paths]
        assert touched, f"nothing reads the {kind}"
        noticed = 0
        for byte, bit in flips(start, stop):
            with flipped(path, byte, bit):
                found = [(name, answer(every[name])) for name in touched]
            for name, got in found:
                same = str(path) in str(got) if isinstance(got, ActcacheError) else got == truth[name]
                assert same, f"{kind}: bit {bit} of byte {byte}: {name} gave {str(got)[:200]}"
            noticed += any(isinstance(got, ActcacheError) for _, got in found)
        assert noticed >= 90, f"{kind}: damage is seldom seen"
    assert {name: read() for name, read in every.items()} == truth


def unread_files(root: Path) -> list[Path]:
    """What a reader never opens: files of the writer, and metadata that is for other Zarr readers."""
    metadata = [path for path in (root / "acts.zarr").rglob("zarr.json") if path != root / IDENTITY]
    return [root / PLAN, root / JOURNAL, *(root / PARTIALS).iterdir(), *metadata]


@pytest.mark.parametrize("codec", CODECS)
def test_no_bit_of_the_files_of_others_changes_a_row(sound, codec, tmp_path):
    """Readers do not open them, and give the same when they are gone."""
    root = sound[codec].path
    unread = {str(path) for path in unread_files(root)}
    assert len(unread) > 20
    assert not unread & set().union(*(OPENED.by(read) for read in reads(sound[codec]).values()))
    bare = shutil.copytree(root, tmp_path / "c")
    for path in unread_files(bare):
        path.unlink()
    assert contents(bare) == contents(root)


@pytest.mark.parametrize("n_bits", [16, pytest.param(100, marks=pytest.mark.faults)])  # each takes a harvest to read
@pytest.mark.parametrize("name", [PLAN, JOURNAL, PARTIALS])
def test_a_flipped_bit_in_a_writers_file_is_an_error_of_the_next_harvest_or_changes_nothing(
    tiny_model, tiny_texts, tmp_path, name, n_bits
):
    """Partial statistics are read when a harvest is finished, so for these the manifest is taken away."""
    root = tmp_path / "c"

    def harvest_again() -> dict[str, str]:
        return promised_files(harvest_tiny(tiny_model, tiny_texts, root, **SETTINGS).path)

    truth = harvest_again()
    path = min((root / PARTIALS).iterdir()) if name == PARTIALS else root / name
    noticed = 0
    for byte, bit in flips(0, path.stat().st_size)[:n_bits]:
        with kept(path, root / MANIFEST), flipped(path, byte, bit):
            if name == PARTIALS:
                (root / MANIFEST).unlink()
            got = answer(harvest_again)
        same = str(path) in str(got) if isinstance(got, ActcacheError) else got == truth
        assert same, f"bit {bit} of byte {byte}: {str(got)[:200]}"
        noticed += isinstance(got, ActcacheError)
    assert noticed > n_bits // 2  # the last line of a journal may be cut off
    assert harvest_again() == truth


# --- files that are cut, too long, missing, swapped, or something else ---


def cut(n_bytes: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, n_bytes)


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def damages(path: Path) -> dict[str, Callable[[Path], object]]:
    """Name -> what is done to a file: every class of length, and everything that may lie in its place."""
    size = path.stat().st_size
    lengths = {"empty": 0, "one byte": 1, "half": size // 2, "one byte less": size - 1, "one byte more": size + 1}
    if path.suffix != ".json":
        start = index_start(path)
        lengths |= {"no index": start, "half an index": start + 9, "no checksum": size - 4, "a page more": size + 4096}
    return {
        **{name: cut(n_bytes) for name, n_bytes in lengths.items()},
        "missing": Path.unlink,
        "a folder": instead(Path.mkdir),
        "a pipe": instead(os.mkfifo),
        "a device without end": instead(lambda path: path.symlink_to("/dev/zero")),
        "a link to itself": instead(lambda path: path.symlink_to(path.name)),
        "a file for its folder": lambda path: (shutil.rmtree(path.parent), path.parent.write_bytes(b"")),
    }


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_whatever_lies_in_the_place_of_a_file_is_an_error_that_names_it(sound, codec, tmp_path):
    root = shutil.copytree(sound[codec].path, tmp_path / "c")
    before = open_cache(root)
    openers = {name: OPENED.by(read) for name, read in reads(before).items()}
    for kind, path in {**shards_of(root, codec), **texts_of(root)}.items():
        named = root if kind == "manifest" else path  # without its manifest it may be no cache at all
        for damage, do in damages(path).items():
            with kept_folder(path.parent, tmp_path / "kept"):
                do(path)
                assert str(named) in str(answer(lambda: contents(root))), f"{kind}: {damage}"
                late = reads(before)  # of a cache that was opened when all was well; a pipe would keep it waiting
                for name, paths in openers.items():
                    if str(path) in paths and name != "open" and damage != "a pipe":
                        assert str(path) in str(answer(late[name])), f"{kind}: {damage}, opened before"
    assert contents(root) == contents(sound[codec].path)


@only_root
def test_a_file_that_may_not_be_read_is_an_error_that_names_it_and_no_damage(copied):
    with copy_of_another_user(copied) as root:
        for path in (*shards_of(root, "lossless").values(), *texts_of(root).values()):
            mode = path.stat().st_mode
            path.chmod(0)
            with as_another_user(), pytest.raises(PermissionError, match=str(path)):
                contents(root)
            path.chmod(mode)


@pytest.mark.parametrize("codec", CODECS)
def test_swapped_shards_are_an_error_or_equal(sound, codec, tmp_path):
    """Of one array, of two arrays, of two splits: where the sizes agree, so that only the contents can tell."""
    root = shutil.copytree(sound[codec].path, tmp_path / "c")
    truth = contents(root)
    shards = [path for path in (root / "acts.zarr").rglob("c/**/*") if path.is_file()]
    pairs = [(a, b) for i, a in enumerate(shards) for b in shards[:i] if a.stat().st_size == b.stat().st_size]
    some = np.random.Generator(np.random.Philox(0)).permutation(len(pairs))[:40]
    refused = 0
    for a, b in (pairs[number] for number in some):
        with kept(a, b):
            first, second = a.read_bytes(), b.read_bytes()
            a.write_bytes(second)
            b.write_bytes(first)
            got = answer(lambda: contents(root))
        named = isinstance(got, ActcacheError) and (str(a) in str(got) or str(b) in str(got))
        assert named or got == truth, f"{a} for {b}"
        refused += named
    assert refused > 10


def test_files_of_another_cache_are_refused(sound, tiny_model, tiny_texts, tmp_path):
    """Another seed makes shards of the same sizes with other rows, another holdout makes other sizes."""
    others = [{**SETTINGS, "seed": 1}, {**SETTINGS, "holdout": 0.4}]
    root = shutil.copytree(sound["raw"].path, tmp_path / "c")
    same_size = 0
    for number, other in enumerate(others):
        stranger = harvest_tiny(tiny_model, tiny_texts, tmp_path / str(number), codec="raw", **other).path
        for kind, path in {**shards_of(root, "raw"), "manifest": root / MANIFEST, "zarr.json": root / IDENTITY}.items():
            theirs = stranger / path.relative_to(root)
            if theirs.exists() and theirs.read_bytes() != path.read_bytes():
                same_size += theirs.stat().st_size == path.stat().st_size
                with kept(path):
                    shutil.copyfile(theirs, path)
                    got = answer(lambda: contents(root))
                assert isinstance(got, ActcacheError), kind
                assert str(root if kind == "manifest" else path) in str(got)
    assert same_size >= 4


TRUNCATOR = """
import os, sys
from pathlib import Path
from actcache import open_cache
from actcache.errors import CorruptShard

cache, shard, n_bytes = open_cache(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
reader = cache.hook_reader("train", sys.argv[4])
first = reader.read(0, reader.n_rows)  # every shard is mapped now
whole = shard.read_bytes()
for length in (n_bytes - 1, n_bytes // 4096 * 4096, 4096, 1, 0, n_bytes + 1):
    os.truncate(shard, length)
    try:
        reader.read(0, reader.n_rows)
        print(length, "was read")
    except CorruptShard as error:
        print(length, "refused" if str(shard) in str(error) else error)
    with open(shard, "r+b") as file:  # in place: the map shows the same file
        file.truncate(0)
        file.write(whole)
print("equal" if reader.read(0, reader.n_rows).equal(first) else "another")
"""


def test_a_shard_that_is_cut_while_it_is_mapped_is_an_error_and_no_signal(sound, tmp_path):
    """A page of the map beyond the end of its file is SIGBUS, so this runs in a process of its own."""
    root = shutil.copytree(sound["raw"].path, tmp_path / "c")
    path = hook_shard(root)
    n_bytes = path.stat().st_size
    assert n_bytes > 2 * 4096, "chunks lie on pages that are cut off"
    arguments = [root, path, n_bytes, HOOKS[0]]
    command = [sys.executable, "-c", TRUNCATOR, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=CHILD)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["refused"] * 6 + ["equal"], done.stdout


# --- caches that lie ---


def test_hostile_caches_are_refused_in_little_memory(copied, tmp_path):
    texts, shards, odd = hostile_texts(copied), hostile_shards(copied), odd_caches(copied)
    assert len(texts) > 400
    found = outcomes(copied, tmp_path / "hostile", {**texts, **shards, **odd})
    refused = {name: found[name] for name in (*texts, *shards)}
    wrong = {name: one.get("error", "was read") for name, one in refused.items() if not one.get("ours")}
    assert {*wrong.values()} <= {"MemoryError"}, "what is asked for before it is taken"
    assert not [name for name, one in refused.items() if "\n" in one["text"]], "an error is one line"
    assert not [name for name in texts if str(copied) not in refused[name]["text"]]
    assert not [name for name in shards if str(copied / SHARD) not in refused[name]["text"]]
    truth = found["as it is"]["crc32c"]
    assert {name: found[name].get("crc32c") for name in odd} == dict.fromkeys(odd, truth)


def test_chunks_that_claim_bytes_beyond_their_end_are_refused(copied, tmp_path):
    found = outcomes(copied, tmp_path / "hostile", chunks_beyond_their_end(copied))
    assert all(one.get("ours") for one in found.values()), found


# --- random mutations ---

NUMBERS = (-(1 << 63), -1, 127, 1 << 18, 1 << 31, 1 << 32, 10**12, 1 << 62, 1 << 64, 10**400)
WORDS = ("../x", "/etc/passwd", "a\0b", "raw", "fast", "int8", "float16", "float32", "train", *HOOKS)
MISSING = object()


@st.composite
def places(draw: st.DrawFn, values: dict) -> list[str | int]:
    """Keys that lead to a value somewhere in nested JSON, near the root as often as deep down."""
    way: list[str | int] = []
    while True:
        held = at(values, way)
        keys = sorted(held) if isinstance(held, dict) else list(range(len(held))) if isinstance(held, list) else []
        if not keys or (way and draw(st.integers(0, 3)) == 0):
            return way
        way.append(draw(st.sampled_from(keys)))


def replacements(values: dict) -> st.SearchStrategy[object]:
    """What may come in the place of a value: anything that JSON holds, what stands elsewhere in the file, nothing."""
    scalars = st.one_of(
        st.integers(-2, 600),
        st.sampled_from(NUMBERS),
        st.sampled_from(WORDS),
        st.booleans(),
        st.none(),
        st.floats(),
        st.text(max_size=6),
    )
    nested = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    )
    return nested | places(values).map(lambda way: at(values, way)) | st.just(MISSING)


@st.composite
def mutations(draw: st.DrawFn, values: dict, new_values: st.SearchStrategy[object]) -> dict:
    """The same JSON with one to three of its values replaced or missing."""
    mutated = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(places(mutated))
        new = draw(new_values)
        if new is MISSING:
            del at(mutated, way)[last]
        else:
            at(mutated, way)[last] = copy.deepcopy(new)
        if not mutated:
            break
    return mutated


def answers_to_mutations(root: Path, values: dict, files: Callable[[dict], dict[str, bytes]], n: int) -> list[object]:
    """Put `n` mutations of `values` on disk, one after the other; what came of reading each cache."""
    found = []

    @settings(
        max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(mutations(values, replacements(values)))
    def read(mutated: dict) -> None:
        for name, content in files(mutated).items():
            (root / name).write_bytes(content)
        found.append(answer(lambda: contents(root)))

    read()
    return found


def test_random_manifests_are_refused_or_give_the_right_rows(copied):
    truth, values = contents(copied), unsealed(copied / MANIFEST)
    found = answers_to_mutations(copied, values, lambda mutated: with_manifest(mutated, copied), 250)
    was_read = [got for got in found if isinstance(got, dict)]
    assert all(got.items() <= truth.items() for got in was_read)  # with a hook less, there is less to read
    assert 5 < len(was_read) < len(found) - 100


def test_random_metadata_is_refused_or_gives_the_right_rows(copied):
    truth, values = contents(copied), json.loads((copied / IDENTITY).read_bytes())
    found = answers_to_mutations(copied, values, lambda mutated: {IDENTITY: json.dumps(mutated).encode()}, 100)
    was_read = [got for got in found if isinstance(got, dict)]
    assert all(got == truth for got in was_read)
    assert 5 < len(was_read) < len(found) - 5


def test_random_statistics_are_refused_or_are_what_statistics_must_be(copied):
    """Under its seal a file may say any numbers, but as many as there are channels and bins, and of as many rows."""
    name = f"stats/train/{HOOKS[0]}.json"
    truth, values = contents(copied), unsealed(copied / name)
    found = answers_to_mutations(copied, values, lambda mutated: {name: sealed(mutated)}, 400)
    was_read = [got for got in found if isinstance(got, dict)]

    def shape(content: bytes) -> list[tuple]:
        lists = {key: some if isinstance(some, list) else [some] for key, some in json.loads(content).items()}
        return [(key, len(some), {*map(type, some)}) for key, some in lists.items()]

    for got in was_read:
        mine = [f"train {HOOKS[0]} {kind}" for kind in values]
        assert {key for key in got if got[key] != truth[key]} <= set(mine)
        assert all(shape(got[key]) == shape(truth[key]) for key in mine)
        assert sum(json.loads(got[f"train {HOOKS[0]} all"])["norm_histogram"]) == values["all"]["n_rows"]
    assert all(str(copied / name) in str(got) for got in found if isinstance(got, ActcacheError))
    assert 5 < len(was_read) < len(found) - 5


# --- activations that are no numbers, and a clock that goes backwards ---


def model_with_embedding(directory: Path, out: Path, token_id: int, value: float) -> Path:
    """The model of a directory with one number in the place of the embedding of one token."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(directory, out)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    with torch.no_grad():
        embedding.weight[token_id] = value
    model.save_pretrained(out)
    return out


def tokens_without_numbers(model_dir: Path, token_ids: np.ndarray) -> np.ndarray:
    """Flat numbers, within these sequences, of the tokens for which block 0 gives what bfloat16 cannot hold."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = []
    model.model.layers[0].register_forward_hook(
        lambda module, arguments, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(torch.from_numpy(token_ids).long())
    return np.flatnonzero(~torch.isfinite(found[0].bfloat16()).all(dim=2).flatten().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.finfo(torch.float32).max], ids=str)
def test_activations_that_are_no_numbers_stop_the_harvest_with_the_token_range(
    tiny_llama_dir, tiny_texts, sound, tmp_path, value
):
    """The embedding of one token is wrong, and it first occurs in the third shard: two are finished before."""
    token_ids = sound["lossless"].sequences("train")
    shards = token_ids.reshape(-1)[: 3 * ROWS].reshape(3, ROWS)
    token_id = min(set(shards[2].tolist()) - set(shards[:2].flat))
    model_dir = model_with_embedding(tiny_llama_dir, tmp_path / "model", token_id, value)
    wrong = 2 * ROWS + tokens_without_numbers(model_dir, token_ids[2 * ROWS // 16 : 3 * ROWS // 16])
    with pytest.raises(NonFiniteActivations) as error:
        harvest_tiny(load_model(str(model_dir), device="cpu"), tiny_texts, tmp_path / "c", **SETTINGS)
    told = re.search(r"for (\d+) tokens between (\d+) and (\d+) of train", str(error.value))
    assert told, error.value
    n_tokens, first, last = map(int, told.groups())
    assert {first, last} <= set(wrong.tolist())
    assert 1 <= n_tokens <= len(wrong) < ROWS  # those of one chunk
    finished = hook_shard(tmp_path / "c", 0).parents[1]
    assert {path.parent.name for path in finished.glob("*/0")} & {"0", "1", "2"} == {"0", "1"}
    with pytest.raises(ManifestError, match="unfinished"):
        open_cache(tmp_path / "c")


def test_nothing_depends_on_the_clock(tiny_model, tiny_texts, sound, tmp_path, monkeypatch):
    """Each look at the clock is an hour before the last, as after a flat battery or a correction by NTP."""
    seconds = iter(range(10**9, 0, -3600))
    looks = []

    def look(unit: int) -> int:
        looks.append(unit)
        return next(seconds) * unit

    monkeypatch.setattr("time.time", lambda: float(look(1)))
    monkeypatch.setattr("time.time_ns", lambda: look(10**9))
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **SETTINGS)
    assert looks, "the log at least says when"
    assert promised_files(cache.path) == promised_files(sound["lossless"].path)
    assert contents(cache.path) == contents(sound["lossless"].path)
