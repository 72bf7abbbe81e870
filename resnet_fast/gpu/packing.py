"""Packs filters for GPUs: scale, shift, the shift in the dtype of the images, and the weights as ``[K, R, S, C]``.

Our own kernels apply batch norm's scale and shift to the float32 accumulators, and take plain filters. cuDNN and
cuBLASLt take filters with the scale folded in, which rounds 16-bit filters once more: only where that keeps their
precision and one of the two is the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.arguments import VECTORS
from ..ops.chain import cuda_packed_size
from .checks import check_dtype

__all__ = ["pack_conv_bn", "packed", "scale_shift"]

_ALIGN = 4  # floats: 16 bytes


def _padded(channels: int) -> int:
    return -(-channels // _ALIGN) * _ALIGN


def scale_shift(weight: Tensor, vectors: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """``batch_norm(z + bias) = z * scale + shift``: computed in float64, returned as float32 ``[K]``.

    vectors: in the order of ``VECTORS``.
    """
    channels = weight.shape[0]
    bias, bn_weight, bn_bias, running_mean, running_var = vectors
    for name, t in zip(VECTORS, vectors, strict=True):
        if t is not None and t.shape != (channels,):
            raise RuntimeError(
                f"{name} has shape {tuple(t.shape)}, want ({channels},) as weight has {channels} filters"
            )
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var come together or not at all")
    if running_mean is None and (bn_weight is not None or bn_bias is not None):
        raise RuntimeError("bn_weight and bn_bias come with running_mean and running_var")

    def double(t: Tensor | None, value: float) -> Tensor:
        return weight.new_full((channels,), value, dtype=torch.float64) if t is None else t.double()

    scale = double(bn_weight, 1.0) * (double(running_var, 1.0) + (eps if running_var is not None else 0.0)).rsqrt()
    shift = double(bn_bias, 0.0) + (double(bias, 0.0) - double(running_mean, 0.0)) * scale
    return scale.float(), shift.float()


def pack_conv_bn(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    algorithm: int = 0,
) -> Tensor:
    if algorithm not in (0, 1):
        raise RuntimeError(f"algorithm is {algorithm}, want 0, or 1 for folded filters, on CUDA devices")
    check_dtype("weight", weight)
    vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
    scale, shift = scale_shift(weight, vectors, eps)
    return packed(weight, scale, shift, weight.dtype, folded=algorithm == 1)


def packed(weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, *, folded: bool) -> Tensor:
    """Filters in ``dtype``, scale and shift, as ``cuda_unpack`` reads them; folded: multiply the filters by scale."""
    channels, at = weight.shape[0], _padded(weight.shape[0])
    filters = (weight.double() * scale.double()[:, None, None, None] if folded else weight).to(dtype)
    out = torch.zeros(cuda_packed_size(filters), dtype=torch.float32, device=weight.device)
    out[:channels] = 1 if folded else scale
    out[at : at + channels] = shift
    out[2 * at :].view(dtype)[:channels] = shift
    out[3 * at :].view(dtype)[: filters.numel()] = filters.permute(0, 2, 3, 1).reshape(-1)
    return out
