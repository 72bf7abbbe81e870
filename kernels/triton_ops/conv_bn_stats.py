"""``y = conv2d([relu](scale * x + shift), weight) + bias`` on NVIDIA GPUs, with mean and variance of y, NHWC.

An implicit GEMM with batch norm at both ends. The prologue normalises x as it is loaded. The epilogue takes statistics
of the block's tile of y: the mean over its pixels and the squared deviations from that mean, so that nothing cancels.
:func:`.finalize.finalize_stats` joins the blocks in fixed order.

Source: Jung et al. 2018, "Restructuring Batch Normalization to Accelerate CNN Training".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends import launch

from .batch_norm import as_rows, bn_apply
from .batch_stats import batch_stats
from .finalize import PartialStats
from .implicit_gemm import SIZES, constants, mainloop, sizes

if TYPE_CHECKING:
    from resnet_fast.gpu.candidates.triton import Config
    from resnet_fast.gpu.layer import Layer

__all__ = ["activation", "aten", "conv_bn_stats"]


@triton.jit(do_not_specialize=SIZES)
def _conv_bn_stats_kernel(
    x,
    scale_shift,
    weight,
    bias,
    y,
    partial,
    pixels,
    height,
    width,
    out_height,
    out_width,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RELU: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    block = tl.program_id(0)
    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = mainloop(
        *(x, scale_shift, weight, m, n, pixels, height, width, out_height, out_width, 0),
        *(C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, RELU, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, 1),
    )
    offsets = m.to(index)[:, None] * K + n[None, :]
    inside = (m < pixels)[:, None] & (n < K)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < K, other=0.0)[None, :]
    z = acc.to(y.dtype.element_ty)
    tl.store(y + offsets, z, mask=inside)
    if STATS:
        # Of the values as they were stored, which is what the next kernel normalises.
        v = z.to(tl.float32)
        count = tl.minimum(pixels - (block // columns) * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(tl.where(inside, v, 0.0), 0) / count
        v = tl.where(inside, v - mean[None, :], 0.0)
        to = partial + (block // columns).to(tl.int64) * (2 * K) + n
        tl.store(to, mean, mask=n < K)
        tl.store(to + K, tl.sum(v * v, 0), mask=n < K)


def conv_bn_stats(
    layer: Layer,
    config: Config,
    x: Tensor,
    scale_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stats: bool,
) -> PartialStats | None:
    """Writes y; with ``stats`` returns its partial statistics.

    Args:
        layer: sizes, those of the tensors; ``layer.relu`` is of the input.
        x, y: ``[N, C, H, W]`` in channels_last, one dtype. ``weight``: ``[K, R, S, C]``, contiguous.
        scale_shift: ``[2, C]``, ``bias``: ``[K]``, float32, or None.
    """
    blocks = triton.cdiv(layer.pixels, config.block_m)
    partial = torch.empty(blocks, 2, layer.out_channels, dtype=torch.float32, device=x.device) if stats else None
    launch.launch(
        _conv_bn_stats_kernel,
        (blocks * triton.cdiv(layer.out_channels, config.block_n),),
        (x, scale_shift, weight, bias, y, partial, *sizes(layer)),
        **constants(layer, config),
        RELU=layer.relu,
        STATS=stats,
    )
    return None if partial is None else PartialStats(partial, layer.pixels, config.block_m, None)


def activation(x: Tensor, scale_shift: Tensor | None, relu: bool) -> Tensor:
    """``[relu](scale * x + shift)`` in memory; x itself where that is x."""
    if scale_shift is None and not relu:
        return x
    out = torch.empty_like(x)
    bn_apply(as_rows(x), scale_shift, None, None, as_rows(out), relu)
    return out


def aten(
    layer: Layer, x: Tensor, scale_shift: Tensor | None, weight: Tensor, bias: Tensor | None, stats: bool
) -> tuple[Tensor, PartialStats | None]:
    """The same by PyTorch's convolution, between a pass that normalises and one over its result. ``weight``:
    ``[K, C, R, S]``."""
    own_bias = None if bias is None else bias.to(x.dtype)
    a = activation(x, scale_shift, layer.relu)
    y = F.conv2d(a, weight, own_bias, layer.stride, layer.padding)
    y = y.contiguous(memory_format=torch.channels_last)
    return y, batch_stats(as_rows(y)) if stats else None
