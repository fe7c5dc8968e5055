"""How an activation is replaced in a pass: which hooks that takes, and in which order they are set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actcache.errors import ModelError

HookFn = Callable[[Tensor], Tensor | None]  # gets an activation; returns its replacement, or None to leave it as it is


def same_shape(replace: HookFn) -> HookFn:
    """`replace` with its result checked, and cast to the dtype and device of the activation."""

    def checked(x: Tensor) -> Tensor | None:
        replaced = replace(x)
        if replaced is None:
            return None
        if replaced.shape != x.shape:
            raise ValueError(
                f"logits_with: replace must keep the shape {tuple(x.shape)}, got {tuple(replaced.shape)}; return one "
                "vector for each token"
            )
        return replaced.to(x)

    return checked


def unless(skips: Callable[[], bool], function: HookFn) -> HookFn:
    """The function, which leaves the activation as it is where `skips()`."""
    return lambda x: None if skips() else function(x)


def in_turn(functions: Sequence[HookFn]) -> HookFn:
    """One function of several: each gets what the one before it returned."""

    def all_of(x: Tensor) -> Tensor | None:
        replaced = None
        for function in functions:
            found = function(x if replaced is None else replaced)
            replaced = replaced if found is None else found
        return replaced

    return all_of


@dataclass(frozen=True, slots=True)
class Parts:
    """The hooks that one replacement takes: those to be set before, with and after the others of a pass."""

    here: list[tuple[str, HookFn]]
    before: list[tuple[str, HookFn]] = field(default_factory=list)
    after: list[tuple[str, HookFn]] = field(default_factory=list)


def parts_of(hook_name: str, replace: HookFn) -> Parts:
    """The hook_fns that replace the activation x at a hook by `replace(x)`.

    In a transformers module a hook at hook_resid_mid changes only the input of the norm before the MLP; the residual
    stream passes by. So the output of the block is replaced as well, by replaced + mlp_out, the sum that the block
    itself computes. Replacing x by x changes no bit. A HookedTransformer has the replaced stream there already. A
    ModelError is raised if the output of the block is neither.
    """
    block, _, site = hook_name.rpartition(".")
    if site != "hook_resid_mid":
        return Parts([(hook_name, replace)])
    seen: dict[str, Tensor | None] = {}

    def at_mid(x: Tensor) -> Tensor | None:
        seen["resid_mid"], seen["replaced"] = x, replace(x)
        return seen["replaced"]

    def at_mlp_out(x: Tensor) -> None:
        seen["mlp_out"] = x

    def at_post(x: Tensor) -> Tensor | None:
        resid_mid, replaced, mlp_out = (seen[name] for name in ("resid_mid", "replaced", "mlp_out"))
        if replaced is None or resid_mid is None or mlp_out is None or torch.equal(x, replaced + mlp_out):
            return None
        if not torch.equal(x, resid_mid + mlp_out):
            raise ModelError(
                f"logits_with: replacing {hook_name} needs a block whose output is hook_resid_mid + hook_mlp_out, this "
                "one gives something else; replace at hook_resid_post"
            )
        return replaced + mlp_out

    return Parts(
        [(hook_name, at_mid)],
        before=[(f"{block}.hook_resid_post", at_post)],
        after=[(f"{block}.hook_mlp_out", at_mlp_out)],
    )
