"""What a caller gives is of its type, or refused with one line: of every constructor and config of both packages."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import numpy as np
import pytest
import torch
from support.planted import make_sae
from support.tiny_caches import HOOKS
from support.tiny_saes import make_config

from actcache.arguments import device_of, names, one_of, shown, typed, whole_number
from actcache.errors import ConfigError


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch):
    """Without the checks of annotations that only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


TAKEN = [
    (3, int, 3),
    (np.int64(3), int, 3),
    (3, float, 3.0),
    (np.float32(0.5), float, 0.5),
    (Fraction(1, 2), float, 0.5),
    (True, bool, True),
    ("x", str, "x"),
    (Path("a/b"), str, "a/b"),
    ("x", Literal["x", "y"], "x"),
    (None, int | None, None),
    (None, Sequence[int] | None, None),
    ([1, 2], tuple[int, ...], (1, 2)),
    ((), Sequence[str], ()),
    (slice(1), slice | None, slice(1)),
]
REFUSED = [
    *((value, int) for value in (True, 1.0, "1", None, [1], np.True_, float("nan"))),
    *((value, int | None) for value in (False, 2.5)),
    *((value, float) for value in (True, "0.1", None, 1j)),
    *((value, bool) for value in (1, 0, "yes", None, np.int64(1))),
    *((value, str) for value in (1, True, None, b"x", ["x"])),
    *((value, tuple[int, ...]) for value in ("12", 1, [1.5], [True], {1: 2}, None)),
    *((value, slice | None) for value in (3, (1, 2))),
]


@pytest.mark.parametrize(("value", "kind", "expected"), TAKEN, ids=str)
def test_a_value_becomes_one_of_its_type(value, kind, expected):
    found = typed("it", "n", value, kind)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(("value", "kind"), REFUSED, ids=str)
def test_a_value_of_another_type_is_named(value, kind):
    with pytest.raises(ConfigError, match=r"^it: n must be .*, got .* \(\w+\)$"):
        typed("it", "n", value, kind)


def test_a_whole_number_has_its_range():
    assert [whole_number("it", "n", value, 1, 5) for value in (1, 5, np.int8(3))] == [1, 5, 3]
    with pytest.raises(ConfigError, match=r"it: n must be in \[1, 5\], got 6"):
        whole_number("it", "n", 6, 1, 5)
    with pytest.raises(ConfigError, match="it: n must be at least 0, got -1"):
        whole_number("it", "n", -1)


@pytest.mark.parametrize("wrong", ["c", "", "A", None, ["a"], 0], ids=str)
def test_a_word_is_one_of_those_allowed(wrong):
    assert one_of("it", "n", "b", ("a", "b")) == "b"
    with pytest.raises(ConfigError, match=rf"^it: n must be one of a, b, got {re.escape(repr(wrong))}$"):
        one_of("it", "n", wrong, ("a", "b"))


def test_one_name_is_a_list_of_one():
    assert names("it", "n", "ab") == ("ab",)
    assert names("it", "n", ["a", "b"]) == ("a", "b")
    with pytest.raises(ConfigError, match="n must be a list, got 5"):
        names("it", "n", 5)


def wrong_values(kind: object) -> list[Any]:
    """Values that are none of a field of this type, and that Python or torch might take for one."""
    text = str(kind)
    if "str" in text and "int" not in text:
        return [1, True]
    if "bool" in text:
        return [1, "no"]
    if "float" in text:
        return [True, "0.5"]
    return [True, 2.5, "3"] if "int" in text else [3, "other"]


def configs() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """What is built, with arguments that are right."""
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.tasks import Worker
    from actcache.interop.arrow_import import ArrowImport
    from actcache.loading.stream import StreamConfig
    from actcache.text.sources import DatasetSource
    from trainer.config.settings import SAEConfig, TrainConfig
    from trainer.config.sweep import SweepConfig
    from trainer.formats.foreign import Names
    from trainer.interventions.splice import Add, Clamp, Scale

    sae = dataclasses.asdict(make_config("topk"))
    stream = {"hook_names": ("a",), "split": "train", "seed": 0, "epochs": 1, "exclude_special_tokens": True}
    stream |= {"positions": None, "max_norm_ratio": None, "token_fields": (), "group_chunks": 1}
    return {
        "HarvestConfig": (HarvestConfig, {"hook_names": ("a.b",)}),
        "Worker": (Worker, {}),
        "ArrowImport": (ArrowImport, {"model": "m"}),
        "DatasetSource": (DatasetSource, {"path": "p"}),
        "StreamConfig": (StreamConfig, {**stream, "device": torch.device("cpu")}),
        "SAEConfig": (SAEConfig, sae),
        "TrainConfig": (TrainConfig, {}),
        "SweepConfig": (
            SweepConfig,
            {"runs": ({"name": "n", "architecture": "topk", "k": 1, "hook_name": "a", "d_sae": 4},)},
        ),
        "Names": (Names, {}),
        "Scale": (Scale, {"factor": 1.0}),
        "Clamp": (Clamp, {"value": 1.0}),
        "Add": (Add, {"amount": 1.0}),
    }


def test_no_field_of_a_config_takes_another_type():
    for build, right in configs().values():
        build(**right)
        for field in dataclasses.fields(build):
            for wrong in wrong_values(field.type):
                with pytest.raises(ConfigError, match=rf"{field.name} must be"):
                    build(**{**right, field.name: wrong})


def test_numbers_of_numpy_become_those_of_python():
    """Otherwise a run's config.json could not be written."""
    from trainer.config.settings import TrainConfig

    assert type(TrainConfig(batch_tokens=np.int64(64)).batch_tokens) is int
    assert type(make_config("topk", lr=np.float32(0.5)).lr) is float
    assert type(make_config("topk", lr=1).lr) is float


LOADER = [
    *(
        {name: wrong}
        for name in ("batch_tokens", "seed", "epochs", "group_chunks", "limit")
        for wrong in (2.5, True, "8")
    ),
    *({name: wrong} for name in ("start_step", "rank", "world_size") for wrong in (0.5, True, "0")),
    *({"exclude_special_tokens": wrong} for wrong in (1, "no")),
    *({"max_norm_ratio": wrong} for wrong in (True, "2")),
    *({"positions": wrong} for wrong in (3, slice(0.5, 2), slice("a", None))),
    *({"token_fields": wrong} for wrong in (3, [1])),
    *({"hook_names": wrong} for wrong in (5, [5], None)),
    *({"split": wrong} for wrong in (1, None)),
    *({"device": wrong} for wrong in ("gpu", 0, True, None, "cuda:-1")),
    {"batch_tokens": None},
]


@pytest.mark.parametrize("wrong", LOADER, ids=str)
def test_no_argument_of_a_loader_takes_another_type(tiny_cache, wrong):
    from actcache.loading.loader import Loader
    from actcache.loading.mixture import Mixture

    for source, cache in {Loader: tiny_cache, Mixture: [(tiny_cache, 1)]}.items():
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.* must "):
            source(cache, **{"hook_names": HOOKS[0], **wrong})


def test_no_other_argument_takes_another_type(tiny_cache, tmp_path):
    from actcache.loading.loader import Loader
    from actcache.loading.mixture import Mixture
    from actcache.models.load import load_model
    from trainer.config.sweep import SweepConfig
    from trainer.evaluation.evaluate import evaluate, evaluate_all, evaluate_runs
    from trainer.features.build import build_features
    from trainer.features.logit_lens import check_latents
    from trainer.features.similarity import similar_features
    from trainer.formats.saelens import load_sae
    from trainer.interventions.steering import steer
    from trainer.report.report import write_report
    from trainer.training.sweep import plan, train

    sae, model = make_sae("topk"), object()
    run = {"name": "n", "architecture": "topk", "k": 1, "hook_name": HOOKS[0], "d_sae": 4}
    sweep = SweepConfig(runs=(run,))
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("cache", lambda: Loader(str(tiny_cache.path), HOOKS[0])),
        ("caches", lambda: Mixture(tiny_cache, HOOKS[0])),
        ("share", lambda: Mixture([(tiny_cache, True)], HOOKS[0])),
        ("compile", lambda: load_model(tmp_path, compile="yes")),
        ("device", lambda: load_model(tmp_path, device="mps")),
        ("model_tokens", lambda: evaluate_all([sae], tiny_cache, model_tokens=2.5)),
        ("exclude_special_tokens", lambda: evaluate(sae, tiny_cache, exclude_special_tokens="no")),
        ("cache", lambda: evaluate(sae, str(tiny_cache.path))),
        ("cache", lambda: evaluate_runs(tmp_path, tiny_cache.path)),
        ("cache", lambda: build_features(tmp_path, str(tiny_cache.path))),
        ("cache", lambda: train(str(tiny_cache.path), sweep, tmp_path)),
        ("config", lambda: plan(tiny_cache, {"runs": []}, tmp_path)),
        ("device", lambda: train(tiny_cache, sweep, tmp_path, device="gpu")),
        ("device", lambda: plan(tiny_cache, sweep, tmp_path, device="mps")),
        ("device", lambda: load_sae(tmp_path, device="xpu")),
        ("memory_bytes", lambda: plan(tiny_cache, sweep, tmp_path, memory_bytes=0)),
        ("memory_bytes", lambda: train(tiny_cache, sweep, tmp_path, memory_bytes=1e9)),
        ("a feature", lambda: check_latents(sae, [1.0])),
        ("n", lambda: similar_features(sae, sae, True)),
        ("n_tokens", lambda: steer(model, sae, "x", features={}, n_tokens=2.5)),
        ("temperature", lambda: steer(model, sae, "x", features={}, temperature="hot")),
        ("seed", lambda: steer(model, sae, "x", features={}, seed=1.5)),
        ("n_features", lambda: write_report(tmp_path, tmp_path / "r.html", n_features=2.5)),
    ]
    for name, call in wrong:
        with pytest.raises(ConfigError, match=rf"{name}.* (must be|above 0)"):
            call()


def test_a_device_is_of_this_machine(monkeypatch):
    assert device_of("it", "cpu") == device_of("it", torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("it", "auto") == torch.device("cpu")
    for absent in ("cuda", "cuda:0", "cuda:7", torch.device("cuda")):
        with pytest.raises(
            ConfigError, match=r"it: device 'cuda.*' asked for, torch sees no CUDA device; pass auto or"
        ):
            device_of("it", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of("it", name).index for name in ("auto", "cuda", "cuda:1")] == [None, None, 1]
    with pytest.raises(ConfigError, match="device 'cuda:2' asked for, the last one here is 'cuda:1'"):
        device_of("it", "cuda:2")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta", "hpu", "vulkan"])
def test_a_device_that_nothing_runs_on_is_refused_with_the_way_out(name):
    with pytest.raises(ConfigError, match=rf"it: device must be cpu or cuda, got '{name}'; nothing .*; pass cpu"):
        device_of("it", name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "CPU", "cpu,cuda", 0, None, True])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ConfigError, match="it: device must be auto, cpu, cuda or cuda:0"):
        device_of("it", name)


def test_a_value_is_shown_in_short() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, ["x"] * 10**6, "x" * 10**6, {i: "x" * 1000 for i in range(1000)}, 10**4000, 10**5000):
        assert len(shown(value)) < 1200
    assert [shown(value) for value in ("k", 1.5, None, ["a", "b"])] == ["'k'", "1.5", "None", "['a', 'b']"]
