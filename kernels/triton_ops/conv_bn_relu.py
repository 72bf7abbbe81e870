"""``[relu](conv2d(x, weight) * scale + shift [+ residual])``: an implicit GEMM with an epilogue, NHWC.

With few output pixels the sum over taps and channels is split over SPLIT_K blocks, which write float32 partial sums; a
second kernel adds them in fixed order and applies the epilogue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends import launch

from .implicit_gemm import SIZES, constants, mainloop, sizes

if TYPE_CHECKING:
    from resnet_fast.gpu.candidates.triton import Config
    from resnet_fast.gpu.layer import Layer

__all__ = ["aten", "conv_bn_relu", "conv_grid", "epilogue"]


@triton.jit
def _store_epilogue(acc, scale, shift, residual, y, offsets, inside, n, K, RELU: tl.constexpr):
    """Scales, shifts, adds the residual, applies ReLU, which keeps NaN, and stores."""
    z = acc * tl.load(scale + n, mask=n < K, other=0.0)[None, :] + tl.load(shift + n, mask=n < K, other=0.0)[None, :]
    if residual is not None:
        z += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _conv_bn_relu_fwd_kernel(
    x,
    weight,
    scale,
    shift,
    residual,
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
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    block = tl.program_id(0)
    split = tl.program_id(1)
    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = mainloop(
        *(x, None, weight, m, n, pixels, height, width, out_height, out_width, split),
        *(C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, False, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K),
    )
    offsets = m.to(index)[:, None] * K + n[None, :]
    inside = (m < pixels)[:, None] & (n < K)[None, :]
    if SPLIT_K > 1:
        tl.store(partial + split.to(tl.int64) * pixels * K + offsets, acc, mask=inside)
    else:
        _store_epilogue(acc, scale, shift, residual, y, offsets, inside, n, K, RELU)


@triton.jit(do_not_specialize=("pixels",))
def _epilogue_kernel(
    partial,
    scale,
    shift,
    residual,
    y,
    pixels,
    K: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the slices of a split sum in order and applies the epilogue. ``y`` may be ``partial``."""
    columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    # A thread takes 16 bytes of partial sums. A whole vector of a 16-bit result would be two loads of float32, each of
    # which touches every sector and takes half of it.
    vector: tl.constexpr = 128 // partial.dtype.element_ty.primitive_bitwidth
    n = (block % columns) * BLOCK_N + tl.max_contiguous(tl.arange(0, BLOCK_N), vector)
    offsets = m.to(tl.int64)[:, None] * K + n[None, :]
    inside = (m < pixels)[:, None] & (n < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(SPLIT_K):
        acc += tl.load(partial + pixels.to(tl.int64) * (K * i) + offsets, mask=inside, other=0.0).to(tl.float32)
    _store_epilogue(acc, scale, shift, residual, y, offsets, inside, n, K, RELU)


def conv_grid(layer: Layer, config: Config) -> tuple[int, int]:
    """Blocks of the output, neighbours in channels first, and slices of the sum."""
    return config.blocks(layer) // config.split_k, config.split_k


def epilogue(
    partial: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, y: Tensor, relu: bool, splits: int
) -> None:
    """``y = [relu](sum of the slices of partial * scale + shift [+ residual])``, NHWC; ``y`` may be ``partial``."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    block_n = min(128, triton.next_power_of_2(channels))
    block_m = max(1, 2048 // block_n)
    grid = (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n),)
    launch.launch(
        _epilogue_kernel,
        grid,
        (partial, scale, shift, residual, y, pixels),
        K=channels,
        RELU=relu,
        SPLIT_K=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )


def conv_bn_relu(
    layer: Layer,
    config: Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Writes ``[relu](conv2d(x, weight) * scale + shift [+ residual])`` to ``y``.

    Args:
        layer: sizes; those of the tensors, which the caller has checked.
        config: the tile.
        x, residual, y: ``[N, C, H, W]`` in channels_last, one dtype. ``weight``: ``[K, R, S, C]``, contiguous.
        scale, shift: ``[K]``, float32.
    """
    split = config.split_k
    partial = None if split == 1 else torch.empty((split, layer.pixels, layer.out_channels), device=x.device)
    launch.launch(
        _conv_bn_relu_fwd_kernel,
        conv_grid(layer, config),
        (x, weight, scale, shift, residual if split == 1 else None, y, partial, *sizes(layer)),
        **constants(layer, config),
        RELU=layer.relu,
        SPLIT_K=split,
    )
    if partial is not None:
        epilogue(partial, scale, shift, residual, y, layer.relu, split)


def aten(layer: Layer, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """The same by PyTorch's convolution and one pass over its result."""
    y = F.conv2d(x, weight.permute(0, 3, 1, 2), stride=layer.stride, padding=layer.padding)
    y = y.contiguous(memory_format=torch.channels_last)
    epilogue(y, scale, shift, residual, y, layer.relu, 1)
    return y
