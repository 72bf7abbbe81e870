"""A layer by the fused kernels of cuDNN and cuBLASLt, with batch norm folded into the filters.

    y = [relu](conv2d(x, weight) + bias [+ residual])

Folding batch norm's scale rounds the filters once more to the dtype of the images, which the bias has, too;
:func:`folds` tells whether that keeps their precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CUBLASLT", "CUDNN", "candidates", "folds", "run"]

CUDNN, CUBLASLT = "cudnn", "cublaslt"


def candidates(layer: Any) -> list[str]:
    """Which of ``CUDNN`` and ``CUBLASLT`` can run a layer with folded filters."""
    if layer.residual and not layer.relu:
        return []
    # A 1x1 convolution without a residual is one GEMM with an epilogue.
    pointwise = (layer.kernel, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))
    return [CUDNN, CUBLASLT] if pointwise and not layer.residual and layer.shifted else [CUDNN]


def folds(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether ``weight * scale`` can be rounded to ``dtype`` without losing precision: a bool tensor on the device.

    weight: ``[K, ...]``, scale: ``[K]``. Rounding to normal numbers errs by at most half an ulp, 0.3 ulp on average.
    Where a scaled filter underflows to subnormals or overflows, it errs more than eager PyTorch's rounding of the
    output does.
    """
    exact = weight.double().flatten(1) * scale.double()[:, None]
    error = (exact - exact.to(dtype)).square().sum(1)
    limit = (0.5 * torch.finfo(dtype).eps) ** 2 * exact.square().sum(1)
    return (error <= limit).all()


def run(choice: str, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``[relu](conv2d(x, weight) + bias [+ residual])`` by ``choice``, one of :func:`candidates`.

    x, residual: channels_last. weight: ``[K, R, S, C]``. bias: ``[K]`` in their dtype, None for zeros.
    """
    if choice == CUBLASLT:
        rows, columns = x.permute(0, 2, 3, 1).reshape(-1, layer.channels), weight.view(layer.out_channels, -1).t()
        assert bias is not None
        flat = torch._addmm_activation(bias, rows, columns) if layer.relu else torch.addmm(bias, rows, columns)
        return flat.view(layer.batch, layer.out_height, layer.out_width, -1).permute(0, 3, 1, 2)
    filters = weight.permute(0, 3, 1, 2)
    settings = (bias, layer.stride, layer.padding, (1, 1), 1)
    if not layer.relu:
        y = F.conv2d(x, filters, bias, layer.stride, layer.padding)
    elif residual is None:
        y = torch.cudnn_convolution_relu(x, filters, *settings)
    else:
        y = torch.cudnn_convolution_add_relu(x, filters, residual, 1.0, *settings)
    return y.contiguous(memory_format=torch.channels_last)  # no copy, unless a dimension of 1 misled cuDNN
