"""Derivatives without a fused kernel: the forward runs again on PyTorch's own operators, under autograd.

Gradients are enabled within a backward exactly where its result is differentiated again: with ``create_graph=True``,
hence in ``torch.autograd.functional.jvp``, ``hvp`` and ``hessian``. ``once_differentiable`` would return gradients
without a graph there, and sums of gradients would silently lack the second derivative. With ``is_grads_batched=True``
gradients are batches of tensors, which kernels cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from .arguments import check_dense, raised

__all__ = ["Registry", "first_order", "gradients_again", "wanted"]


def first_order(grad: Tensor) -> bool:
    """Within a backward: whether plain first derivatives suffice. ``grad``: the incoming gradient."""
    if torch.is_grad_enabled() or backends.transform_reason() is not None:
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(grad)  # the vmap of is_grads_batched


def wanted(ctx: Any) -> list[bool]:
    """Within a backward: for each argument of ``apply``, whether this pass computes its gradient.

    ``ctx.needs_input_grad`` says which arguments require one at all; ``torch.autograd.grad(y, x)`` wants that of ``x``
    alone.
    """
    nodes = iter(ctx.next_functions)  # one for each tensor argument
    return [
        tensor and _goes_on(next(nodes)[0], need)
        for tensor, need in zip(ctx.tensors, ctx.needs_input_grad, strict=True)
    ]


def _goes_on(node: Any, need: bool) -> bool:
    if not need or node is None:
        return need
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for the leaves that torch.autograd.grad was asked for, and for no others
        return need


def gradients_again(
    run: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``run(*tensors)``, by running it again; differentiable themselves where gradients are enabled.

    tensors: the function's inputs, out of ``ctx.saved_tensors``. needed: whether the gradient of each is wanted. grad:
    the gradient of the result.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one tensor may come twice or be made from another, and each argument has a gradient of its own.
        own: list[Any] = [
            None if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needed, strict=True)
        ]
        y = run(*own)
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    # PyTorch computes no gradient of given statistics: hence allow_unused.
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(grads) if need else None for need in needed]


class Registry(torch.library.Library):
    """A library whose operators never drop a derivative silently.

    Kernels that PyTorch generates from a backward formula ignore tangents and ``torch.func``. There, the operators in
    ``unfused`` run on PyTorch's own operators, and the others raise.
    """

    def __init__(self, namespace: str, kind: str, unfused: dict[str, Callable[..., Tensor]]) -> None:
        super().__init__(namespace, kind)
        self._unfused = unfused

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **settings: Any) -> Any:
        if dispatch_key == "Autograd":
            fn = _guarded(op_name, fn, self._unfused.get(op_name))
        return super().impl(op_name, fn, dispatch_key, **settings)


def _guarded(op: str, kernel: Callable[..., Any], unfused: Callable[..., Tensor] | None) -> Callable[..., Any]:
    def guarded(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        reason = backends.transform_reason()
        if reason is None:
            try:
                return kernel(keyset, *args, **kwargs)
            except NotImplementedError:  # the dispatcher's lists all backends but names no argument
                wrong = raised(check_dense, op, args)
                if wrong is not None:
                    raise wrong from None
                raise
        if unfused is not None:
            backends.decline(op, reason)
            return unfused(*args, **kwargs)
        if _has_tangent(args):
            raise RuntimeError(
                f"resnet_fast::{op} has no derivative in forward mode: use conv_bn_relu and its kin, "
                "or an uncompiled module"
            )
        return kernel(keyset, *args, **kwargs)

    return guarded


def _has_tangent(value: Any) -> bool:
    if isinstance(value, Tensor):
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
    return isinstance(value, (list, tuple)) and any(_has_tangent(each) for each in value)
