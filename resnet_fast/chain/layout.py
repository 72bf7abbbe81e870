"""The memory format of results: that of PyTorch's own operators, though kernels compute in channels_last.

PyTorch's rule: the result of a convolution is channels_last where its input or its weight is, else contiguous; what
follows keeps the format. Code that calls ``view`` depends on it, and so does a dropout, which draws its mask in the
order of memory.
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
    """Whether PyTorch's operators take it so; where both orders fit, the strides of sizes that are 1 tell."""
    if t.dim() != 4:
        return False
    _, c, h, w = t.shape
    n_step, c_step, h_step, w_step = t.stride()
    image = h_step * h
    return c_step == 1 and w_step >= c and h_step >= w_step * w and n_step >= image and image != c_step


def any_channels_last(convolutions: Iterable[nn.Conv2d]) -> bool:
    return any(is_channels_last(conv.weight) for conv in convolutions)


def stays_contiguous(specs: Sequence[ConvSpec], weights: Iterable[Tensor]) -> bool:
    """Whether PyTorch's operators keep a contiguous input contiguous through a chain of convolutions.

    A sum has the format of what the convolution beside it gives.
    """
    contiguous = [True]
    for spec, weight in zip(specs, weights, strict=True):
        contiguous.append(contiguous[spec.source] and not is_channels_last(weight))
    return contiguous[-1]


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the format of ``x``, an image that it was computed from."""
    if is_channels_last(x) or not is_channels_last(y):
        return y
    # Not `contiguous`: maps of one pixel or channel fit both formats, and what reads them next asks for the strides.
    return y.clone(memory_format=torch.contiguous_format)


class Observers:
    """Who sees the maps between the layers of a network, beside its own code: found once, until something changes.

    These are hooks, dropouts at work, and modules of others, which may ask for ``view``.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._guard = StalenessGuard(modules, contents=False, kinds=False)
        self.there = any(map(_observes, modules[1:]))  # the model's own hooks see the images and the scores
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
