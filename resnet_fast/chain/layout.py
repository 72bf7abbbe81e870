"""The memory format of results: PyTorch's, although the kernels compute in channels_last.

PyTorch's rule: the result of a convolution is channels_last where its input or its weight is, else contiguous; later
operators preserve the format. Code that calls ``view`` depends on it, and so does dropout, which draws its mask in
memory order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.spec import ConvSpec
from .guard import HOOKS, StalenessGuard

__all__ = ["Observers", "any_channels_last", "is_channels_last", "laid_out", "stays_contiguous"]


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch treats ``t`` as channels_last; where both formats fit, the strides of dimensions of 1 decide."""
    if t.dim() != 4:
        return False
    _, c, h, w = t.shape
    n_step, c_step, h_step, w_step = t.stride()
    image = h_step * h
    return c_step == 1 and w_step >= c and h_step >= w_step * w and n_step >= image and image != c_step


def any_channels_last(convolutions: Iterable[nn.Conv2d]) -> bool:
    return any(is_channels_last(conv.weight) for conv in convolutions)


def stays_contiguous(specs: Sequence[ConvSpec], weights: Iterable[Tensor]) -> bool:
    """Whether PyTorch's operators would keep a contiguous input contiguous through this chain.

    A residual sum takes the format of the convolution's output.
    """
    contiguous = [True]
    for spec, weight in zip(specs, weights, strict=True):
        contiguous.append(contiguous[spec.source] and not is_channels_last(weight))
    return contiguous[-1]


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``, the image that it was computed from."""
    if is_channels_last(x) or not is_channels_last(y):
        return y
    # Not `contiguous`, which returns y itself where it has one pixel or channel: the next operator reads the strides.
    return y.clone(memory_format=torch.contiguous_format)


class Observers:
    """Whether anyone sees the activations between the layers of a network; valid until a module changes.

    Observers are hooks, active dropouts, and modules from outside this package and PyTorch, which may call ``view``.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._guard = StalenessGuard(modules, contents=False, kinds=False)
        self.there = any(map(_observes, modules[1:]))  # hooks on the model itself see only its input and output
        self.convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]

    def is_valid(self) -> bool:
        return self._guard.is_valid()


_RANDOM: Any = (nn.modules.dropout._DropoutNd, nn.RReLU)


def _observes(module: nn.Module) -> bool:
    kind = getattr(type(module), "fused_from", type(module))
    if kind.__module__.partition(".")[0] not in ("torch", "resnet_fast") or "forward" in vars(module):
        return True
    draws = isinstance(module, _RANDOM) and module.training and getattr(module, "p", 1) > 0
    return draws or any(getattr(module, hooks) for hooks in HOOKS)
