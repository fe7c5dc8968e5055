"""What the code of another day wrote is read, verified, resumed and grown by the code of today, byte for byte.

tests/golden/README.md says what there is. Numbers that a model or an optimizer computes are compared bit for bit on the
platforms that expected.json lists, elsewhere within a bound; everything else is compared bit for bit everywhere.
"""

import json
import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file
from support.golden import (
    ENVIRONMENT,
    EXPECTED,
    GOLDEN,
    INPUTS,
    MODEL,
    SPLITS,
    digest,
    files,
    promised,
    rows,
    run_command,
    served_order,
    skeletons,
    this_platform,
    unpack,
)

from actcache import open_cache
from actcache.bundled.documents import bundled_model_path
from actcache.errors import ManifestError
from actcache.format.seal import seal, unseal
from trainer import load_sae

EXPECTED_VALUES = json.loads(EXPECTED.read_text())
COMMANDS = EXPECTED_VALUES["commands"]
SAME_BITS = this_platform() in EXPECTED_VALUES["platforms"]
CACHES = ("lossless", "fast", "raw", "int8", "smaller")
DTYPES = {"lossless": torch.bfloat16, "fast": torch.float16, "raw": torch.float32, "int8": torch.bfloat16}
STREAM, MLP = "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"
SAES = ("topk", "jumprelu", "standard")
MAX_BYTES = 3_000_000
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES.values()}


@pytest.fixture(scope="module")
def actcache():
    """Runs a command in a folder, in one process of its own that computes as the golden files were computed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

            def run(folder, command):
                code, stdout, stderr = pool.submit(run_command, folder, command.split()).result()
                assert code == 0, stderr
                return stdout, stderr

            yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with what the commands read: the model, the texts, the sweep file."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(bundled_model_path(), folder / MODEL)
    for name in INPUTS:
        shutil.copy(GOLDEN / name, folder)
    return folder


@pytest.fixture
def work(inputs, tmp_path):
    """A fresh folder of the same, to type commands in."""
    return shutil.copytree(inputs, tmp_path / "work")


@pytest.fixture
def recorded(tmp_path):
    """Unpacks a golden folder where nothing changes it."""
    return lambda name: unpack(name, tmp_path / "recorded")


def test_the_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) <= MAX_BYTES


def test_this_platform_is_one_of_those_recorded():
    if not SAME_BITS:
        pytest.skip(f"computed numbers are compared within bounds, not bit for bit: this is {this_platform()}")


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_read_as_it_was_and_sound(name, actcache, tmp_path):
    cache = unpack(name, tmp_path)
    for split in SPLITS:
        found = rows(cache, split)
        assert {of: digest(x) for of, x in found.items()} == EXPECTED_VALUES["rows"][name][split]
    report = json.loads(actcache(tmp_path, f"verify {name} --json")[0])
    assert (report["problems"], report["notes"]) == ([], [])
    assert_answers(EXPECTED_VALUES["info"][name], actcache(tmp_path, f"info {name} --json")[0])


@pytest.mark.parametrize("name", CACHES)
def test_another_reader_of_zarr_gets_the_same(name, tmp_path):
    cache = unpack(name, tmp_path)
    for split in SPLITS:
        found, store = rows(cache, split), zarr.open_group(cache / "acts.zarr" / split, mode="r")
        for hook in open_cache(cache).hook_names:
            assert torch.equal(found[hook], decoded(store[hook], found[hook].dtype))
        for field in ("id", "sequence", "position"):
            assert np.array_equal(found[field].numpy(), store[f"tokens/{field}"][:])
        for of, field in (("id", "id"), ("document", "document")):
            flat = store[f"sequences/{of}"][:][found["sequence"], found["position"]]
            assert np.array_equal(found[field].numpy(), flat)


def test_a_shard_of_raw_begins_with_its_rows(tmp_path):
    cache = unpack("raw", tmp_path)
    x = rows(cache, "train")[STREAM].numpy()
    for shard in range(-(-len(x) // 64)):
        stored = np.fromfile(cache / f"acts.zarr/train/{STREAM}/acts/c/{shard}/0", dtype="<f4")
        part = x[64 * shard : 64 * (shard + 1)]
        assert np.array_equal(stored[: part.size], part.ravel())


def test_training_is_served_the_same_rows_in_the_same_order(tmp_path):
    assert served_order(unpack("lossless", tmp_path)) == EXPECTED_VALUES["order"]


def assert_answers(expected, stdout):
    """All that was said is said again; a command may say more."""
    answer = json.loads(stdout)
    assert {key: answer.get(key) for key in expected} == expected


def decoded(group, dtype):
    """The activations of a hook, by zarr-python and the README's text alone."""
    if "acts" in group:
        stored = group["acts"][:]
        return (
            torch.from_numpy(stored.view(np.int16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(stored)
        )
    return (torch.from_numpy(group["q8"][:]) * scales(group)).to(dtype)


def scales(group):
    """Of each channel of each row of an int8 hook, float32."""
    stored = torch.from_numpy(group["scale"][:].view(np.int16)).view(torch.bfloat16)
    return stored.float().repeat_interleave(32, dim=1)


# --- harvesting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fast", "raw", "int8"])
def test_the_same_harvest_writes_the_same_cache(name, actcache, work, recorded):
    actcache(work, COMMANDS[name])
    take_words(work / name, recorded(name))
    assert_same_cache(work / name, recorded(name))


def take_words(made, recorded):
    """Let a new cache say of its model what an older version said: the words are others since, and nothing else."""
    model = open_cache(recorded).identity["model"]
    for name in ("manifest/plan.json", "manifest/cache.json"):
        values = unseal((made / name).read_bytes(), made / name)
        values.get("plan", values)["identity"]["model"] = model
        (made / name).write_bytes(seal(values))
    metadata = made / "acts.zarr" / "zarr.json"
    values = json.loads(metadata.read_text())
    assert json.dumps(values, indent=2) == metadata.read_text()
    values["attributes"]["actcache"]["model"] = model
    metadata.write_text(json.dumps(values, indent=2))


def test_a_killed_harvest_is_no_cache_and_goes_on_to_the_same_cache(actcache, work, recorded):
    killed = unpack("killed", work)
    assert list(killed.rglob("*.partial"))
    journal = killed / "manifest" / "writer-00.jsonl"
    assert journal.read_bytes().count(b"\n") == 4
    assert not journal.read_bytes().endswith(b"\n")
    with pytest.raises(ManifestError, match="unfinished"):
        open_cache(killed)
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("acts.zarr/train/*/acts/c/[0-3]/0")}
    actcache(work, COMMANDS["killed"])
    assert_same_cache(killed, recorded("lossless"))
    assert len(kept) == 8
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(actcache(work, "verify killed --json")[0])["problems"] == []


def test_a_cache_grows_and_takes_a_hook_to_the_same_cache(actcache, work, recorded):
    smaller, whole = unpack("smaller", work), recorded("lossless")
    actcache(work, COMMANDS["grow"])
    assert skeletons(smaller) == EXPECTED_VALUES["grown"]["skeletons"]
    if SAME_BITS:
        assert files(smaller) == EXPECTED_VALUES["grown"]["files"]
    assert_rows_are_near(smaller, whole, [STREAM])
    actcache(work, COMMANDS["add"])
    assert promised(skeletons(smaller)) == promised(skeletons(whole))
    if SAME_BITS:
        assert promised(files(smaller)) == promised(files(whole))
    assert_rows_are_near(smaller, whole, [STREAM, MLP])
    assert json.loads(actcache(work, "verify smaller --json")[0])["problems"] == []


def test_a_finished_harvest_has_nothing_to_do(actcache, work):
    cache = unpack("lossless", work)
    before = states(cache)
    assert "nothing was done" in actcache(work, COMMANDS["lossless"])[1]
    assert states(cache) == before


def assert_same_cache(made, recorded):
    assert skeletons(made) == skeletons(recorded)
    if SAME_BITS:
        assert files(made) == files(recorded)
    assert_rows_are_near(made, recorded, open_cache(recorded).hook_names)


def assert_rows_are_near(made, recorded, hooks):
    """Within the bound of the README for rows computed elsewhere, and what storing each of the two rounds off.

    Their means and mean norms are as near, by the triangle inequality.
    """
    config = json.loads((bundled_model_path() / "config.json").read_text())
    unit = torch.finfo(torch.float32).eps / 2
    share = 8 * math.sqrt(2 * config["n_layer"]) * (unit + math.sqrt(4 * config["n_embd"]) * unit)
    for split in SPLITS:
        ours, theirs = rows(made, split), rows(recorded, split)
        for hook in hooks:
            x, y = ours[hook].double(), theirs[hook].double()
            assert x.shape == y.shape
            norm = y.norm(dim=1)
            allowed = (share + 2 * ROUNDOFF[theirs[hook].dtype]) * norm + quantised_off(recorded, split, hook)
            assert ((x - y).norm(dim=1) <= allowed).all()
            found, expected = (
                json.loads((root / "stats" / split / f"{hook}.json").read_text())["all"] for root in (made, recorded)
            )
            moved = np.linalg.norm(np.subtract(found["mean"], expected["mean"]))
            assert max(moved, abs(found["mean_norm"] - expected["mean_norm"])) <= allowed.max()


def quantised_off(root, split, hook):
    """At most how far int8 moved two rows apart: half a step of each channel, twice; 0 for other codecs."""
    group = zarr.open_group(root / "acts.zarr" / split / hook, mode="r")
    return 0.0 if "acts" in group else scales(group).double().norm(dim=1)


def states(root):
    """Path -> (bytes, time of the last change) of every file but those of locks."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file() and p.stat().st_size}


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_stopped_sweep_goes_on_to_the_same_saes(actcache, work, recorded):
    unpack("lossless", work)
    stopped, finished = unpack("stopped", work), recorded("finished")
    checkpoints = {name: next((stopped / name / "checkpoint").iterdir()) for name in SAES}
    begun = {name: load_file(path) for name, path in checkpoints.items()}
    assert all(50 < int(path.stem.removeprefix("step-")) < 200 for path in checkpoints.values())
    actcache(work, COMMANDS["stopped"])
    for name in SAES:
        assert_same_run(stopped / name, finished / name, begun[name])


def assert_same_run(made, recorded, begun):
    """begun: the checkpoint that it went on from.

    Elsewhere roundings differ, and may change which latents fire for a row on the edge. One such row in each batch of
    64 moves the weights by a sixty-fourth of the way that they go.
    """
    last = "checkpoint/step-00000200.safetensors"
    for file in ("config.json", "sae/cfg.json"):
        assert (made / file).read_bytes() == (recorded / file).read_bytes()
    if SAME_BITS:
        for file in (last, "sae/sae_weights.safetensors", "metrics.jsonl"):
            assert (made / file).read_bytes() == (recorded / file).read_bytes()
    assert schedule(made) == schedule(recorded)
    ended = load_file(recorded / last)
    sae, expected = (load_file(run / "sae" / "sae_weights.safetensors") for run in (made, recorded))
    for name in expected:
        way = distance(begun[f"weights/{name}"], ended[f"weights/{name}"])
        assert distance(sae[name], expected[name]) <= way / 64


def schedule(run):
    """What of metrics.jsonl does not hang on arithmetic."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["n_tokens"], line["details/current_learning_rate"]) for line in lines]


def distance(x, y):
    """Relative to y, and so the same however both are scaled or transposed."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def test_a_finished_sweep_has_nothing_to_do(actcache, work):
    unpack("lossless", work)
    finished = unpack("finished", work)
    before = states(finished)
    assert "to train: 0 SAEs" in actcache(work, COMMANDS["finished"])[1]
    assert states(finished) == before


@pytest.mark.parametrize("name", SAES)
def test_an_sae_encodes_by_its_definition(name, tmp_path):
    """A float32 sum of n products is within n roundoffs of the sum of their sizes (Higham 2002, section 3.1).

    An entry that lies as near to where firing begins may fire or not.
    """
    sae = load_sae(unpack("finished", tmp_path) / name)
    x = rows(unpack("lossless", tmp_path), "validation")[STREAM].double()
    W_enc, b_enc = sae.W_enc.double(), sae.b_enc.double()
    x = x - sae.b_dec.double() if name == "topk" else x
    pre_acts = x @ W_enc + b_enc
    error = (len(W_enc) + 2) * ROUNDOFF[torch.float32] * (x.abs() @ W_enc.abs() + b_enc.abs())
    begins = firing_begins(sae, pre_acts)
    sure = (pre_acts - begins).abs() > 2 * error
    assert sure.double().mean() > 0.99
    feature_acts = pre_acts.relu() * (pre_acts > begins)
    found = sae.encode(rows(tmp_path / "lossless", "validation")[STREAM]).double()
    assert ((found - feature_acts).abs() <= error)[sure].all()


def firing_begins(sae, pre_acts):
    """Above which pre-activation a latent fires: between the k-th and the next, at its threshold, or at 0."""
    if sae.k is not None:
        return pre_acts.topk(sae.k + 1).values[:, -2:].mean(dim=1, keepdim=True)
    return torch.zeros(()) if sae.threshold is None else sae.threshold.double()


@pytest.mark.parametrize("asked", EXPECTED_VALUES["features"])
def test_features_answer_as_they_did(asked, actcache, work):
    """Contexts, histogram, what fires together and the logit lens lie in the files: nothing is computed."""
    unpack("lossless", work)
    features = unpack("finished", work) / "topk" / "features"
    before = states(features)
    assert_answers(EXPECTED_VALUES["features"][asked], actcache(work, f"{COMMANDS['features']} {asked} --json")[0])
    assert states(features) == before


def test_features_and_evaluation_made_anew_are_the_same(actcache, work, recorded):
    unpack("lossless", work)
    finished, expected = unpack("finished", work), recorded("finished")
    shutil.rmtree(finished / "topk" / "features")
    for path in finished.glob("*/eval.json"):
        path.unlink()
    actcache(work, COMMANDS["features"])
    actcache(work, COMMANDS["eval"])
    made = sorted([*expected.glob("*/features/*"), *expected.glob("*/eval.json")])
    assert len(made) == 13
    assert all((finished / path.relative_to(expected)).is_file() for path in made)
    same = made if SAME_BITS else [path for path in made if path.name in ("source.json", "lock")]
    for path in same:
        assert (finished / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
