"""Blocks that run compiled, while everything that looks at them stays outside of the graph."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from actcache.errors import ModelError


def compile_blocks_(blocks: Iterable[nn.Module], name: str | None) -> None:
    """Let `torch.compile` make the forward pass of every block, one at a time.

    Hooks on a block run outside of the graph. A graph does not see hooks on what is inside a block: while there is one,
    that block runs as it was. Equal blocks share one graph, and it serves every batch of two or more sequences,
    whichever came first. It is made in the first forward pass (seconds to minutes).

    Args:
        name: of the model, for messages.

    Raises:
        ModelError: in the first forward pass, if a block cannot be compiled, as without a C++ compiler.
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
