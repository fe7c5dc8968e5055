"""Blocks that run through `torch.compile`; hooks stay outside of the compiled graphs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from actcache.errors import ModelError


def compile_blocks_(blocks: Iterable[nn.Module], name: str | None) -> None:
    """Replace the forward pass of every block by a compiled one, block by block.

    A hook on a block runs outside of the graph. A graph would ignore hooks on submodules of a block; so a block runs
    uncompiled while its submodules have hooks. Equal blocks share one graph. It is compiled in the first forward pass
    (seconds to minutes) and serves every batch of two or more sequences.

    Args:
        blocks: the blocks; their `forward` is replaced.
        name: the model's name, for messages.

    Raises:
        ModelError: a block cannot be compiled, for example without a C++ compiler; raised in the first forward pass.
    """
    for block in blocks:
        _compile_(block, name)


def _compile_(block: nn.Module, name: str | None) -> None:
    from torch._dynamo.exc import TorchDynamoException  # imported here: it takes a while, and few runs compile

    inside = [module for module in block.modules() if module is not block]
    plain, fast = block.forward, torch.compile(block.forward, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(module._forward_hooks or module._forward_pre_hooks for module in inside):
            return plain(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{name}: torch.compile failed: {reason}; leave out --compile") from None

    block.forward = forward
