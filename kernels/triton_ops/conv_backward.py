"""Both gradients of a convolution between two batch norms on NVIDIA GPUs, NHWC.

Prologues of :mod:`.implicit_gemm` make the gradient of the convolution's output as it is loaded,
``dy = a * grad + b * (y - mean) + constant``, and so the activation, ``[relu](scale * x + shift)``.

    data      dx[p] = sum over taps and output channels of dy[(p + pad - tap) / stride] * weight[tap]. Pixels that share
              their place modulo the stride take the same taps: a block works on one such phase. The epilogue adds the
              residual's gradient, applies the ReLU of the layer before, and takes partial sums for its batch norm.
    weight    a block sums dy[p] x activation[p * stride - pad + tap] over its pixels, for one tap. The sum is split
              over SPLIT_K blocks; a second kernel adds the slices in fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends import launch

from .batch_norm import affine, relu_passes
from .filters import filter_offsets, is_wide, strides
from .implicit_gemm import (
    SIZES,
    constants,
    load_activation,
    load_gradient,
    multiply_accumulate,
    pixel_coordinates,
    sizes,
    tap_bits,
    tap_is_inside,
)

if TYPE_CHECKING:
    from resnet_fast.gpu.candidates.triton import Config
    from resnet_fast.gpu.layer import Layer

__all__ = ["data_gradient", "reduce_split_k", "weight_gradient"]


@triton.jit
def _store_centred_sum(to, g, y, stats, inside, n, C):
    """Stores the sum of g * (y - mean) over the pixels of a tile."""
    u = y.to(tl.float32) - tl.load(stats + n, mask=n < C, other=0.0)[None, :]
    tl.store(to, tl.sum(tl.where(inside, g * u, 0.0), 0), mask=n < C)


@triton.jit(do_not_specialize=("batch", *SIZES[1:]))
def _data_gradient_kernel(
    grad,
    y,
    coefficients,
    weight,
    residual,
    x,
    scale_shift,
    y1,
    y2,
    stats1,
    stats2,
    dx,
    partial,
    batch,
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
    BN_SUMS: tl.constexpr,
    RELU: tl.constexpr,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    most_rows: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    most_cols: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    block = tl.program_id(0)
    phase = tl.program_id(1)
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    # The phase's pixels, and its first tap; the others follow at the stride.
    rows_here = (height - phase_h + STRIDE_H - 1) // STRIDE_H
    cols_here = (width - phase_w + STRIDE_W - 1) // STRIDE_W
    pixels = batch * rows_here * cols_here
    r0 = (phase_h + PAD_H) % STRIDE_H
    s0 = (phase_w + PAD_W) % STRIDE_W
    taps_h = tl.maximum(R - r0 + STRIDE_H - 1, 0) // STRIDE_H
    taps_w = tl.maximum(S - s0 + STRIDE_W - 1, 0) // STRIDE_W

    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    image, i, j = pixel_coordinates(m, tl.maximum(rows_here, 1), tl.maximum(cols_here, 1))
    # Output pixel of the first tap; the next tap's is one before.
    bottom = (phase_h + PAD_H - r0) // STRIDE_H + i
    right = (phase_w + PAD_W - s0) // STRIDE_W + j
    valid = m < pixels
    # Pixels past the end read nothing.
    below = tl.where(valid, out_height, 0)
    rows = tap_bits(bottom, below, most_rows, -1)
    cols = tap_bits(right, out_width, most_cols, -1)
    corner = ((image.to(index) * out_height + bottom) * out_width + right) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    taps = taps_h * taps_w
    # No tap reaches some phases (1x1 filters at stride 2): their loop does not run. Its divisions are hoisted in front
    # of it all the same; dividing by zero is undefined, so LLVM would conclude that the loop runs and drop the masks of
    # the first copies, which then read past the weights.
    divisor = tl.maximum(taps, 1)
    divisor_w = tl.maximum(taps_w, 1)
    for step in tl.range(0, taps * ((K + BLOCK_K - 1) // BLOCK_K)):
        tap = step % divisor
        th = tap // divisor_w
        tw = tap % divisor_w
        c = step // divisor * BLOCK_K + k
        inside = tap_is_inside(rows, cols, th, tw, bottom, right, below, out_width, most_rows, most_cols, -1)[:, None]
        if K % BLOCK_K != 0:
            inside = inside & (c < K)[None, :]
        offsets = corner[:, None] + (c[None, :] - (th.to(index) * out_width + tw) * K)
        g = load_gradient(grad, y, offsets, inside, coefficients, c, K)
        at = ((r0 + th * STRIDE_H) * S + s0 + tw * STRIDE_W) * C
        w = weight + c.to(tl.int64)[:, None] * (R * S * C) + (at + n)[None, :]
        b = tl.load(w, mask=(c < K)[:, None] & (n < C)[None, :], other=0.0)
        acc = multiply_accumulate(g, b, acc, PRECISION)

    ih = phase_h + i * STRIDE_H
    iw = phase_w + j * STRIDE_W
    offsets = ((image.to(index) * height + ih) * width + iw)[:, None] * C + n[None, :]
    inside = valid[:, None] & (n < C)[None, :]
    if residual is not None:
        acc += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if BN_SUMS:
        if RELU or SAME:
            v = tl.load(x + offsets, mask=inside, other=0.0)
        if RELU:
            acc = tl.where(relu_passes(affine(v, scale_shift, n, C)), acc, 0.0)
    out = acc.to(dx.dtype.element_ty)
    tl.store(dx + offsets, out, mask=inside)
    if BN_SUMS:
        # Sums of the gradient as it was stored.
        g = tl.where(inside, out.to(tl.float32), 0.0)
        parts = tl.num_programs(0) // columns
        to = partial + (phase * parts + block // columns).to(tl.int64) * (ROWS * C) + n
        tl.store(to, tl.sum(g, 0), mask=n < C)
        if y1 is not None:
            u = v if SAME else tl.load(y1 + offsets, mask=inside, other=0.0)
            _store_centred_sum(to + C, g, u, stats1, inside, n, C)
        if y2 is not None:
            u = tl.load(y2 + offsets, mask=inside, other=0.0)
            _store_centred_sum(to + 2 * C, g, u, stats2, inside, n, C)


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient_kernel(
    grad,
    y,
    coefficients,
    x,
    scale_shift,
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
    across: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    block = tl.program_id(0)
    tap = block % (R * S)  # blocks of neighbouring taps read the same pixels at about the same time
    r = tap // S
    s = tap % S
    n = block // (R * S) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block // (R * S) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    steps = (pixels + BLOCK_K - 1) // BLOCK_K
    first = (tl.program_id(1).to(tl.int64) * steps // SPLIT_K).to(tl.int32)
    last = ((tl.program_id(1) + 1).to(tl.int64) * steps // SPLIT_K).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(first, last):
        p = step * BLOCK_K + tl.arange(0, BLOCK_K)
        image, row, col = pixel_coordinates(p, out_height, out_width)
        ih = row * STRIDE_H - PAD_H + r
        iw = col * STRIDE_W - PAD_W + s
        there = (p < pixels) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        # Where the tap lies in the padding the activation is zero: the gradient need not be read.
        inside = there[:, None] & (m < K)[None, :]
        g = load_gradient(grad, y, p.to(index)[:, None] * K + m[None, :], inside, coefficients, m, K)
        inside = there[:, None] & (n < C)[None, :]
        offsets = ((image.to(index) * height + ih) * width + iw)[:, None] * C + n[None, :]
        a = load_activation(x, offsets, inside, scale_shift, n, C, RELU)
        acc = multiply_accumulate(g, a, acc, PRECISION, TRANSPOSE_A=True)
    offsets = (m.to(tl.int64)[:, None] * (R * S) + tap) * C + n[None, :]
    offsets += tl.program_id(1).to(tl.int64) * (K * R * S * C)
    tl.store(partial + offsets, acc, mask=(m < K)[:, None] & (n < C)[None, :])


@triton.jit(do_not_specialize=range(2, 11))
def _reduce_split_k_kernel(
    partial,
    out,
    elements,
    splits,
    channels,
    height,
    width,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the slices of the split sum in fixed order, ROWS at a time, from [K, R, S, C] to the filters' layout."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    i = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, splits, ROWS):
        split = first + tl.arange(0, ROWS)
        at = split.to(tl.int64)[:, None] * elements + i[None, :]
        acc += tl.load(partial + at, (split < splits)[:, None] & (i < elements)[None, :], 0.0)
    to = filter_offsets(i, channels, height, width, stride_k, stride_c, stride_r, stride_s)
    tl.store(out + to, tl.sum(acc, 0).to(out.dtype.element_ty), i < elements)


def data_gradient(
    layer: Layer,
    config: Config,
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    bn_sums: bool,
    ys: list[Tensor],
    stats: list[Tensor],
    dx: Tensor,
) -> Tensor | None:
    """Writes dx. With ``bn_sums`` dx is behind the ReLU of ``scale * x + shift``, and its partial sums, of dx and of
    dx * (y - mean) for each y of ``ys``, are returned: float32 ``[parts, 1 + ys, C]``.

    Images are ``[N, C, H, W]`` in channels_last, ``weight`` is ``[K, R, S, C]``, contiguous. ``layer.relu``: whether x
    has a ReLU to come; x without scale_shift is what a ReLU gave. ``stats``: mean and variance of each y.
    """
    stride_h, stride_w = layer.stride
    most = layer.batch * -(-layer.height // stride_h) * -(-layer.width // stride_w)
    blocks, phases = triton.cdiv(most, config.block_m), stride_h * stride_w
    rows = 1 + len(ys)
    relu = bn_sums and (layer.relu or scale_shift is None)
    y1, y2 = [*ys, None, None][:2]
    stats1, stats2 = [*stats, None, None][:2]
    partial = None
    if bn_sums:
        partial = torch.empty(blocks * phases, rows, layer.channels, dtype=torch.float32, device=x.device)
    launch.launch(
        _data_gradient_kernel,
        (blocks * triton.cdiv(layer.channels, config.block_n), phases),
        (
            *(grad, y, coefficients, weight, residual, x if bn_sums else None, scale_shift if relu else None),
            *(y1, y2, stats1, stats2, dx, partial, layer.batch, *sizes(layer)[1:]),
        ),
        **constants(layer, config),
        BN_SUMS=bn_sums,
        RELU=relu,
        SAME=bn_sums and y1 is not None and y1.data_ptr() == x.data_ptr(),
        ROWS=rows,
    )
    return partial


def weight_gradient(
    layer: Layer,
    config: Config,
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    dw: Tensor,
) -> None:
    """Writes dw, ``[K, C, R, S]`` in any layout; other arguments as of :func:`data_gradient`."""
    splits = config.split_k
    taps = layer.kernel[0] * layer.kernel[1]
    across = triton.cdiv(layer.channels, config.block_n)
    partial = torch.empty(splits, dw.numel(), dtype=torch.float32, device=x.device)
    launch.launch(
        _weight_gradient_kernel,
        (taps * across * triton.cdiv(layer.out_channels, config.block_m), splits),
        (grad, y, coefficients, x, scale_shift, partial, *sizes(layer)),
        **constants(layer, config),
        RELU=layer.relu,
        SPLIT_K=splits,
    )
    reduce_split_k(partial, dw)


def reduce_split_k(partial: Tensor, dw: Tensor) -> None:
    """Writes the sum of ``partial``, float32 ``[splits, K * R * S * C]``, to dw, ``[K, C, R, S]`` in any layout.

    The order of the sum depends on the number of splits alone.
    """
    splits, elements = partial.shape
    # Few elements have many splits: their loads are in flight together.
    rows, block = (64, 64) if splits > 8 else (4, 512)
    launch.launch(
        _reduce_split_k_kernel,
        (triton.cdiv(elements, block),),
        (partial, dw, elements, splits, *strides(dw)),
        WIDE=is_wide(dw),
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
