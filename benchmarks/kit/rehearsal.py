"""What a GPU does, replaced on the CPU: a run can be rehearsed before there is a GPU. No time it gives counts.

Our kernels run in the simulator of ``tests/ptxsim``; cuDNN's fused convolutions are PyTorch's own operators one after
another; a CUDA graph is a call.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu import variants as gpu_variants

__all__ = ["CallInstead", "conv_add_relu", "conv_relu", "rehearsal"]


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.cudnn_convolution_relu`` on any device."""
    return F.relu(torch.conv2d(x, weight, bias, stride, padding, dilation, groups))


def conv_add_relu(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    alpha: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.cudnn_convolution_add_relu`` on any device."""
    return F.relu(torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)


class CallInstead(gpu_variants.Graphed):
    """A graph that calls."""

    def __init__(self, call: Callable[[Tensor], Any], x: Tensor) -> None:
        self.call, self.held = call, x.clone()

    def __call__(self, image: Tensor) -> Any:
        self.held.copy_(image)
        return self.call(self.held)

    def replay(self) -> None:
        self.call(self.held)


@contextlib.contextmanager
def rehearsal(**options: Any) -> Iterator[None]:
    """Replaces all of that while open. ``ptxsim`` lies in ``tests``, which must be on the path; ``options`` are those
    of its ``simulated``."""
    device = importlib.import_module("ptxsim.device")
    with (
        device.simulated(**options),
        mock.patch.object(torch, "cudnn_convolution_relu", conv_relu),
        mock.patch.object(torch, "cudnn_convolution_add_relu", conv_add_relu),
        mock.patch.object(gpu_variants, "Graphed", CallInstead),
    ):
        yield
