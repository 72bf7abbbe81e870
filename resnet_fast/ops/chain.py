"""Fakes of ``pack_conv_bn``, ``conv_chain`` and ``residual_network``, and the layout of a filter packed for CUDA.

:mod:`.register` registers the fakes; :mod:`resnet_fast.gpu` reads packed filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .spec import conv_size, decode, empty_image, shapes

__all__ = ["FAKES", "cuda_packed_size", "cuda_unpack"]


def _fake_pack(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    algorithm: int = 0,
) -> Tensor:
    if backends.kind(weight) == "cuda":
        return weight.new_empty(cuda_packed_size(weight), dtype=torch.float32)
    if algorithm >= 3:  # in bfloat16, by pairs of channels (bf16_filters.h)
        k, c, r, s = weight.shape
        rows = (k + 15) // 16 * 16
        row = r * s * ((c + 1) // 2 * 2) if algorithm == 3 else 16 * ((c + 15) // 16 * 16)
        return weight.new_empty(32 + rows * (2 + row), dtype=torch.bfloat16)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    line = 64 // dtype.itemsize  # elements of a cache line
    k, c, r, s = weight.shape
    points = 36 if algorithm == 1 else r * s
    return weight.new_empty(line + (k + line - 1) // line * line * (1 + c * points), dtype=dtype)


def cuda_packed_size(weight: Tensor) -> Any:
    """Length in floats of a filter packed for CUDA: scale, shift and bias, each padded to 16 bytes, then the weights.

    Where batch norm's scale is folded into the weights, the stored scale is one, and the bias is the shift in the dtype
    of the weights, as cuDNN takes it.
    """
    return 3 * ((weight.shape[0] + 3) // 4 * 4) + (weight.numel() * weight.element_size() + 3) // 4


def cuda_unpack(
    packed: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of ``shape`` [K, R, S, C], scale, shift and bias of a filter packed for CUDA, as views."""
    k, r, s, c = shape
    at = (k + 3) // 4 * 4
    filters = packed[3 * at :].view(dtype)[: k * r * s * c]
    if filters.numel() != k * r * s * c:
        raise RuntimeError(f"filters has one of {packed.numel()} floats, too few for {k} x {c} x {r} x {s} of {dtype}")
    return filters.view(shape), packed[:k], packed[at : at + k], packed[2 * at : 3 * at].view(dtype)[:k]


def _fake_stage(x: Tensor, filters: list[Tensor], layers: list[int], pool: Sequence[int] = ()) -> Tensor:
    k, h, w = shapes(decode(layers), x.shape[1:])[-1]
    if pool:
        r, s, stride_h, stride_w, pad_h, pad_w = pool
        h, w = conv_size(h, pad_h, r, stride_h), conv_size(w, pad_w, s, stride_w)
    return empty_image(x, k, h, w)


def _fake_network(x: Tensor, packed: Tensor, layers: list[int], classes: int = 0) -> Tensor:
    return _fake_stage(x, [], layers) if classes == 0 else x.new_empty((x.shape[0], classes))


FAKES: dict[str, Any] = {
    "pack_conv_bn": _fake_pack,
    "conv_chain": _fake_stage,
    "residual_network": _fake_network,
}
