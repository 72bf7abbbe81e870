"""Fakes of the training operators, each a convolution or a pass between two.

They have no autograd of their own: :mod:`resnet_fast.chain.training` calls them in its forward and its backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_autograd import fake_conv
from .spec import empty_image

__all__ = ["FAKES", "FAKES_ON_CPUS", "statistics_rows"]


def _fake_conv_bn_stats(
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    algorithm: int,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    y = fake_conv(x, weight.to(x.dtype), bias, None, None, None, None, 0.0, stride, padding)
    return y, statistics_rows(x, 2, weight.shape[0] if stats else 0)


def statistics_rows(like: Tensor, rows: int, channels: Any) -> Tensor:
    """Empty rows of per-channel statistics, in the dtype of the accumulators."""
    return like.new_empty((rows, channels), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_bn_apply(y: Tensor, *rest: Any) -> Tensor:
    return empty_image(y, *y.shape[1:])


def _fake_bn_backward_reduce(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_image(grad, *grad.shape[1:]), statistics_rows(grad, 3, grad.shape[1])


def _fake_channel_sums(grad: Tensor) -> Tensor:
    return statistics_rows(grad, 1, grad.shape[1])[0]


def _fake_conv_backward(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    algorithm: int,
    need_x: bool,
    need_weight: bool,
    residual: Tensor | None,
    reduce: bool,
    ys: list[Tensor],
    stats: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_image(x if need_x else x[:0], *x.shape[1:])
    return dx, torch.empty_like(weight), statistics_rows(x, 3 if reduce else 0, x.shape[1])


def _fake_max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    out = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    return empty_image(x, *out.shape[1:]), x.new_empty((out.numel() + 1) // 2, dtype=torch.uint8)


def _fake_max_pool_backward(grad: Tensor, argmax: Tensor, size: list[int], *rest: Any) -> Tensor:
    return empty_image(grad, grad.shape[1], *size)


FAKES: dict[str, Any] = {
    "conv_bn_stats": _fake_conv_bn_stats,
    "bn_apply": _fake_bn_apply,
    "bn_backward_reduce": _fake_bn_backward_reduce,
    "channel_sums": _fake_channel_sums,
    "conv_backward": _fake_conv_backward,
}
# Only CPUs have kernels for these.
FAKES_ON_CPUS: dict[str, Any] = {"max_pool": _fake_max_pool, "max_pool_backward": _fake_max_pool_backward}
