"""``relu(a + b)``: the public function, its fake and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .arguments import check_add_relu, raised
from .unfused import unfused_reason

__all__ = ["add_relu", "register"]


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)`` in one pass over memory. Equivalent to ``F.relu(a + b)``.

    Args:
        a: any shape and layout; float32, float64 or bfloat16 (on CUDA devices float16, too).
        b: shape, dtype and device of ``a``; it is not broadcast.

    Returns:
        A new tensor with the layout of ``a``. NaN and the sign of zero pass through as in ``F.relu``.

    Raises:
        RuntimeError: ``b`` differs from ``a`` in shape, dtype or device, either is sparse, or PyTorch has no operator
            for their dtype; the message names the argument.
        TypeError: ``a`` or ``b`` is not a tensor.
    """
    try:
        reason = unfused_reason("add_relu", a)
        if reason is None:
            return torch.ops.resnet_fast.add_relu(a, b)
        backends.decline("add_relu", reason)
        if not torch.compiler.is_compiling():
            check_add_relu(a, b, failed=False)
        return F.relu(a + b)
    except Exception:
        wrong = raised(check_add_relu, a, b)
        if wrong is not None:
            raise wrong from None
        raise


def _fake(a: Tensor, b: Tensor) -> Tensor:
    check_add_relu(a, b, failed=False)
    return torch.empty_like(a)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (output,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, output, 0)
    return grad, grad


def register(library: torch.library.Library) -> None:
    torch.library.register_fake("resnet_fast::add_relu", _fake, lib=library)
    torch.library.register_autograd("resnet_fast::add_relu", _backward, setup_context=_setup, lib=library)
