"""What a forward pass takes from a module beside its input: parameters, buffers, packed and adapted weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from actcache.errors import ModelError


class Part(NamedTuple):
    """A tensor, or a number as text, that a forward pass may use.

    Attributes:
        name: of what it is a part, within the model.
        value: on the "meta" device if accelerate has offloaded it.
        is_kept: whether the model itself keeps it. Another one is made for who asks: its address says nothing, because
            a later one may have the same.
    """

    name: str
    value: Tensor | str
    is_kept: bool


def values_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The detached values of a parameter or buffer. If accelerate has offloaded them, they are fetched.

    Args:
        model: the whole model.
        name: of the tensor within the model.
        tensor: as the model holds it; on the "meta" device if it is offloaded to host memory or disk.

    Raises:
        ModelError: its values are nowhere.
    """
    if not tensor.is_meta:
        return tensor.detach()
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        values = getattr(module, leaf).detach()
    if values.is_meta:
        raise ModelError(f"model_identity: {name} must have values, is on the meta device; load the weights first")
    return values


def used_state(model: nn.Module) -> Iterator[Part]:
    """All that a forward pass may use.

    It is what the modules themselves save: parameters, persistent buffers, packed weights of quantised layers. A tied
    weight comes once for each place. Adapters of peft that are not active, that are merged into the weights or disabled
    are left out, with what they replace; the scaling of an active one is a number of its own.
    """
    idle: list[str] = []
    for path, module in model.named_modules():
        if hasattr(module, "adapter_layer_names"):  # a layer of peft
            idle += [f"{path}.{part}." for part in _idle_parts(module)]
            yield from (Part(f"{path}.scaling", repr(value), True) for value in _scalings(module))
    kept = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    for name, value in model.state_dict(keep_vars=True).items():
        if not f"{name}.".startswith(tuple(idle)):
            is_kept = id(value) in kept and not value.is_quantized
            yield from (Part(name, part, is_kept) for part in _parts(value))


def _active(layer: Any) -> list[str]:
    """The adapters that a layer of peft computes beside its own weights."""
    return [] if layer.disable_adapters or getattr(layer, "merged", False) else list(layer.active_adapters)


def _idle_parts(layer: Any) -> Iterator[str]:
    """Paths within a layer of peft of the modules and parameters that its forward pass does not use."""
    active = _active(layer)
    for kind in layer.adapter_layer_names:
        held = layer.get_submodule(kind).keys() if _holds(layer, kind) else ()
        yield from (f"{kind}.{adapter}" for adapter in held if adapter not in active)
        if kind == "modules_to_save" and set(active) & set(held):
            yield "original_module"


def _holds(layer: nn.Module, path: str) -> bool:
    try:
        return isinstance(layer.get_submodule(path), nn.ModuleDict | nn.ParameterDict)
    except AttributeError:
        return False


def _scalings(layer: Any) -> list[float]:
    """The factors of the active adapters of a layer; 0 of one that has no weights here."""
    scaling = getattr(layer, "scaling", {})
    return [float(scaling[adapter]) for adapter in _active(layer) if adapter in scaling]


def _parts(value: object) -> Iterator[Tensor | str]:
    """The tensors and numbers of a value of a state_dict; a quantised tensor is its integers and how to scale them."""
    if isinstance(value, Tensor) and value.is_quantized:
        yield value.detach().int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            yield from (value.q_per_channel_scales(), value.q_per_channel_zero_points())
            yield f"{value.qscheme()} {value.q_per_channel_axis()}"
        else:
            yield f"{value.qscheme()} {value.q_scale()!r} {value.q_zero_point()}"
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a quantised weight made of others
        names, _ = cast(Any, value).__tensor_flatten__()
        yield from (part for name in names for part in _parts(getattr(value, name)))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (part for each in value.values() for part in _parts(each))
    elif isinstance(value, list | tuple):
        yield from (part for each in value for part in _parts(each))
    elif isinstance(value, int | float | str | torch.dtype):
        yield repr(value)
