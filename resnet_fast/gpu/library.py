"""A layer by the libraries that PyTorch brings: cuDNN's fused convolutions and cuBLASLt, batch norm in the filters.

    y = [relu](conv2d(x, weight) + bias [+ residual])

Filters hold batch norm's scale, rounded once more to the dtype of the images; the bias is in that dtype, too. Whether
filters may be folded says :func:`folds`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CUBLASLT", "CUDNN", "candidates", "folds", "run"]

CUDNN, CUBLASLT = "cudnn", "cublaslt"


def candidates(layer: Any) -> list[str]:
    """Which of the libraries can run a layer whose filters are folded."""
    if layer.residual and not layer.relu:
        return []
    # A 1x1 convolution without a residual is one matrix product with an epilogue.
    pointwise = (layer.kernel, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))
    return [CUDNN, CUBLASLT] if pointwise and not layer.residual and layer.shifted else [CUDNN]


def folds(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether ``weight * scale`` keeps its precision in ``dtype``: a bool on the device of ``weight``.

    weight: ``[K, ...]``, scale: ``[K]``. Rounding to normal numbers errs by up to half an ulp, 0.3 ulp in the mean; a
    filter whose products fall among the subnormals or beyond the largest number errs more, and more than eager
    PyTorch's rounding of the output does.
    """
    exact = weight.double().flatten(1) * scale.double()[:, None]
    error = (exact - exact.to(dtype)).square().sum(1)
    limit = (0.5 * torch.finfo(dtype).eps) ** 2 * exact.square().sum(1)
    return (error <= limit).all()


def run(choice: str, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The layer by ``choice``.

    Args:
        choice: one of :func:`candidates`.
        layer: its sizes.
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
    return y.contiguous(memory_format=torch.channels_last)  # which it is, unless a side of one misled cuDNN
