"""Activation checkpoints in a graph: chains inside of them run again in the backward pass, as eager code does.

:func:`resnet_fast.compiler.backend` takes the body out, finds its chains and puts :func:`checkpointed` in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed", "plain_checkpoint"]

_CHECKPOINT: Any = torch.ops.higher_order.tag_activation_checkpoint


def plain_checkpoint(graph_module: fx.GraphModule, call: fx.Node) -> fx.GraphModule | None:
    """The body of the checkpoint if ``call`` is one that saves nothing but its inputs; any code may run in it."""
    if call.target is not _CHECKPOINT:
        return None
    body: Any = call.args[0]
    inner = getattr(graph_module, str(body.target), None) if body.op == "get_attr" else None
    return inner if isinstance(inner, fx.GraphModule) and "_checkpoint_context_fn" not in inner.meta else None


def checkpointed(body: Callable[..., Any], lasting: list[bool]) -> Callable[..., Any]:
    """``body`` as a function of the same arguments that saves those that are not ``lasting`` for its second run.

    Parameters and buffers are not saved: running statistics change in the meantime, and autograd refuses that.
    """

    def run(*operands: Any, **settings: Any) -> Any:
        def again(*images: Any) -> Any:
            given = iter(images)
            return body(*(o if lasts else next(given) for o, lasts in zip(lasting_operands, lasting, strict=True)))

        lasting_operands = [o if lasts else None for o, lasts in zip(operands, lasting, strict=True)]
        images = [o for o, lasts in zip(operands, lasting, strict=True) if not lasts]
        return checkpoint(again, *images, **settings)

    return run
