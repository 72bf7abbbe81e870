"""``aten::convolution_backward``, with a workaround for oneDNN; called where no kernel of ours has the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# Input channels in a block of oneDNN's 1x1 convolutions, on any instruction set.
_ONEDNN_BLOCK = 16


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, C, H, W], weight [K, C, R, S] and bias: those that ``mask`` marks, None for the others.

    For a strided 1x1 filter on CPUs, oneDNN gathers the pixels that the filter reads. In channels_last, with fewer
    channels than one of its blocks, it writes past its workspace: the weight gradient is wrong on several threads and
    other tensors are overwritten (uxlfoundation/oneDNN#6035; seen in PyTorch 2.11 and 2.13). So gather the pixels here.
    """
    aten = torch.ops.aten.convolution_backward
    strided = tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and max(padding) == 0
    if not (strided and mask[1] and x.device.type == "cpu" and x.shape[1] < _ONEDNN_BLOCK):
        return aten(grad, x, weight, bias_sizes, stride, padding, [1, 1], False, [0, 0], 1, mask)
    gathered = x[:, :, :: stride[0], :: stride[1]]
    _, *rest = aten(grad, gathered, weight, bias_sizes, [1, 1], padding, [1, 1], False, [0, 0], 1, [False, *mask[1:]])
    grad_x = None
    if mask[0]:
        grad_x = aten(grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False])[0]
    return grad_x, *rest
