"""A training step on CUDA asks for nothing that waits for the device, shown without one.

The tensors here hold nothing: what looks at values, or makes a shape of them, fails, and so does a tensor made of
Python numbers, which would be copied to the device. `kernels` takes them for CUDA's; torch does not, so that a plain
copy to the host would pass here. `test_cuda.py` shows the same on a GPU.
"""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, make_config
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.settings import SAEConfig
from trainer.kernels import active
from trainer.kernels.active import Workspace
from trainer.sae.architectures import initial_weights
from trainer.training.optimizer import new_optimizer
from trainer.training.step import StepOutcome, TrainState, train_step

BATCH = 32
WAITS = (DataDependentOutputException, DynamicOutputShapeException)
SHAPES_ALONE = SimpleNamespace(
    segment_sums=lambda values, index, start, rows: rows.new_empty(len(start) - 1, rows.shape[1]),
    entry_dots=lambda x, row, W, latent, order: x.new_empty(len(row)),
    topk_latents=lambda pre_acts, k, by_magnitude: pre_acts.new_empty(len(pre_acts), k, dtype=torch.int64),
)


class NoConstants(TorchDispatchMode):
    """No tensor is made of Python numbers (but filled with one it may be: that is a kernel's argument)."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor is made of Python numbers"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def _no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without values; of the Triton kernels what surrounds them, or their shapes where triton is missing."""
    monkeypatch.setattr(active, "on_cuda", lambda _: True)
    if importlib.util.find_spec("triton") is None:
        monkeypatch.setattr(active, "triton_kernels", lambda: SHAPES_ALONE)
    else:
        monkeypatch.setattr("trainer.kernels.triton_kernels._launch", lambda *_, **__: None)
    with FakeTensorMode():
        yield


def a_state(config: SAEConfig, n_tokens: int = 0) -> TrainState:
    weights = {
        name: torch.empty(weight.shape, requires_grad=True)
        for name, weight in initial_weights(config, torch.zeros(config.d_out)).items()
    }
    counters = torch.empty(config.d_sae, dtype=torch.int64)
    return TrainState(
        config=config,
        weights=weights,
        optimizer=new_optimizer(config, weights),
        average={},
        step=0,
        n_tokens=n_tokens,
        tokens_since_fired=counters,
    )


def two_steps(state: TrainState) -> StepOutcome:
    """The second begins with the optimizer's moments and the workspace made."""
    x, y = (torch.empty(BATCH, width) for width in (state.config.d_in, state.config.d_out))
    workspace = Workspace()
    with NoConstants():
        train_step(state, x, workspace, y=y)
        return train_step(state, x, workspace, y=y)


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize("encoder_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_a_step_of_the_topk_family_does_not_wait(architecture: str, encoder_dtype: str) -> None:
    config = make_config(
        architecture, aux_coefficient=1 / 32, k_aux=8, encoder_dtype=encoder_dtype, max_grad_norm=1.0, ema_decay=0.9
    )
    outcome = two_steps(a_state(config))
    with pytest.raises(WAITS):
        outcome.n_active.item()  # these tensors do notice


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize("n_active", [BATCH, BATCH * 48], ids=["sparse", "dense"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in TOPK_FAMILY])
def test_the_others_wait_for_the_number_of_kept_entries_alone(
    architecture: str, n_active: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(architecture, max_grad_norm=1.0)
    with pytest.raises(WAITS):
        two_steps(a_state(config))
    asked: list[Tensor] = []
    monkeypatch.setattr(active, "count_true", lambda mask: asked.append(mask) or n_active)
    two_steps(a_state(config))
    assert len(asked) == 2, "once a step"


QUADRATIC = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0}
TANH = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 4.0}


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize("mode", [QUADRATIC, TANH], ids=["quadratic", "tanh"])
def test_no_mode_of_jumprelu_waits_for_more(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "count_true", lambda mask: BATCH)
    two_steps(a_state(make_config("jumprelu", **mode)))


@pytest.mark.usefixtures("_no_device")
def test_jumprelu_that_revives_silent_latents_does_not_wait() -> None:
    two_steps(a_state(make_config("jumprelu", pre_act_loss_coefficient=1e-3, **TANH)))


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize("n_dead", [0, 3, 48])
@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_aux_k_waits_for_the_number_of_dead_latents_alone(
    architecture: str, n_dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(architecture, aux_coefficient=1 / 32, k_aux=8, dead_window=1000)
    with pytest.raises(WAITS):
        two_steps(a_state(config, n_tokens=1001))
    monkeypatch.setattr(active, "count_true", lambda mask: n_dead)
    two_steps(a_state(config, n_tokens=1001))


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize("off", [{"aux_coefficient": 0.0, "k_aux": 8}, {"aux_coefficient": 1.0, "k_aux": 0}])
def test_without_aux_k_nobody_counts_the_dead(off: dict[str, Any]) -> None:
    two_steps(a_state(make_config("topk", dead_window=1000, **off), n_tokens=1001))


@pytest.mark.usefixtures("_no_device")
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "weight_decay": 0.01},
        {"optimizer": "signum", "momentum": 0.9},
        {"optimizer": "muon", "momentum": 0.9},
        {"optimizer": "schedule_free"},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_no_optimizer_waits(settings: dict[str, Any]) -> None:
    two_steps(a_state(make_config("topk", **settings)))
