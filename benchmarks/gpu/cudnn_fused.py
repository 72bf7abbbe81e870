"""A network as a careful user writes it for cuDNN: batch norm folded into the filters, ReLU and residual add fused.

    relu(conv(x, w) + b)              torch.cudnn_convolution_relu
    relu(conv(x, w) + b + residual)   torch.cudnn_convolution_add_relu

The projection of a block is a plain convolution; stem, pooling and head are PyTorch's. Filters are folded in float64
and rounded once to the dtype of the images; everything is channels_last.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import reference

from ..cases import ConvBnRelu, Twin
from ..variants import UnavailableError

__all__ = ["fold", "folded_conv"]


def folded_conv(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> nn.Conv2d:
    """``bn(conv(x))`` in eval mode as one convolution with a bias, in ``dtype`` and channels_last."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = 0 if conv.bias is None else conv.bias.double()
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups, True)
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, *settings)  # type: ignore[arg-type]
    folded = folded.to(conv.weight.device, torch.float64)
    with torch.no_grad():
        folded.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        assert folded.bias is not None
        folded.bias.copy_(bn.bias.double() + (bias - bn.running_mean.double()) * scale)
    return folded.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]


def _conv_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.cudnn_convolution_relu(
        *(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    )


def _conv_add_relu(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, conv.bias, *settings)  # type: ignore[arg-type]


class _Block(nn.Module):
    """A residual block of any of the three kinds: all convolutions but the last with ReLU, the last with the sum."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        self.convs = nn.ModuleList(folded_conv(getattr(block, c), getattr(block, b), dtype) for c, b in pairs)
        projection: Any = block.downsample
        self.projection = None if projection is None else folded_conv(projection[0], projection[1], dtype)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.convs
        y = x
        for conv in inner:
            y = _conv_relu(conv, y)  # type: ignore[arg-type]
        return _conv_add_relu(last, y, x if self.projection is None else self.projection(x))  # type: ignore[arg-type]


class _ConvBnRelu(nn.Module):
    def __init__(self, module: ConvBnRelu, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = folded_conv(module.conv, module.bn, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _conv_relu(self.conv, x)


def fold(module: Twin, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` that computes so.

    Raises:
        UnavailableError: it is neither a network of :mod:`resnet_fast.reference` nor a single convolution.
    """
    if isinstance(module, ConvBnRelu):
        return _ConvBnRelu(module, dtype)
    net = getattr(module, "net", None)
    if not isinstance(net, (reference.ResNet32, reference.CifarResNet, reference.ResNet)):
        raise UnavailableError(f"nobody has written a {type(module).__name__} for cuDNN by hand")
    copied: Any = copy.deepcopy(module)
    net = copied.net
    for stage in (net.layer1, net.layer2, net.layer3, getattr(net, "layer4", nn.Sequential())):
        for name, block in stage.named_children():
            setattr(stage, name, _Block(block, dtype))
    if hasattr(net, "bn1"):
        net.conv1, net.bn1 = folded_conv(net.conv1, net.bn1, dtype), nn.Identity()
    return copied.to(dtype=dtype, memory_format=torch.channels_last)
