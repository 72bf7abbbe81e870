"""``[relu](conv2d(x, weight) * scale + shift [+ residual])`` as one implicit matrix product, NHWC.

The convolution is the product of a matrix of input pixels, never written down, with the filters: a row for each output
pixel, a column for each output channel, and a sum over taps (r, s) and input channels. A block owns BLOCK_M pixels and
BLOCK_N channels of it. It walks the taps of one slice of channels before it takes the next slice, so that the nine
reads of a pixel by neighbouring taps come close together and hit L1. Whether a tap of a pixel lies in the padding is
one bit, computed before the loop.

With few output pixels the sum over channels is split over SPLIT_K blocks, which write float32 partial sums; a second
kernel adds them in fixed order and finishes.

Source: implicit GEMM as in Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.layer import Layer

from .rounding import to_operand
from .taps import tap_bits, tap_is_inside

__all__ = ["conv_bn_relu", "conv_grid", "finish", "library"]


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# They change from input to input, and no alignment follows from them: one binary for all.
_SIZES = ("pixels", "height", "width", "out_height", "out_width")


@triton.jit(do_not_specialize=_SIZES)
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
    block = tl.program_id(0)
    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    image = m // (out_height * out_width)
    within = m % (out_height * out_width)
    top = within // out_width * STRIDE_H - PAD_H
    left = within % out_width * STRIDE_W - PAD_W
    # Rows past the end read nothing: their bits stay zero.
    below = tl.where(m < pixels, height, 0)
    # 32-bit offsets take half the registers: 64 bits where the maps need them.
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    corner = ((image.to(index) * height + top) * width + left) * C
    filters = weight + n.to(tl.int64) * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if C % BLOCK_K == 0:
        # A step is one tap of BLOCK_K channels.
        rows = tap_bits(top, below, R)
        cols = tap_bits(left, width, S)
        steps: tl.constexpr = C // BLOCK_K * (R * S)
        first = tl.program_id(1) * steps // SPLIT_K
        last = (tl.program_id(1) + 1) * steps // SPLIT_K
        x_offsets = corner[:, None] + k[None, :]
        w_rows = filters[:, None] + k[None, :]
        for step in tl.range(first, last):
            tap = step % (R * S)
            r = tap // S
            s = tap % S
            c = step // (R * S) * BLOCK_K
            inside = tap_is_inside(rows, cols, r, s, top, left, below, width, R, S)
            a = tl.load(
                x + (x_offsets + ((r.to(index) * width + s) * C + c)),
                mask=inside[:, None],
                other=0.0,
                cache_modifier=".ca",
            )
            if K % BLOCK_N == 0:
                b = tl.load(w_rows + (tap * C + c))
            else:
                b = tl.load(w_rows + (tap * C + c), mask=n[:, None] < K, other=0.0)
            acc = tl.dot(to_operand(a, PRECISION), tl.trans(to_operand(b, PRECISION)), acc, input_precision=PRECISION)
    else:
        # Few or odd channels: a step is BLOCK_K of the R * S * C products in a row, taps and channels mixed.
        total: tl.constexpr = R * S * C
        steps: tl.constexpr = (total + BLOCK_K - 1) // BLOCK_K
        first = tl.program_id(1) * steps // SPLIT_K
        last = (tl.program_id(1) + 1) * steps // SPLIT_K
        for step in tl.range(first, last):
            at = step * BLOCK_K + k
            tap = at // C
            r = tap // S
            s = tap % S
            ih = top[:, None] + r[None, :]
            iw = left[:, None] + s[None, :]
            inside = (ih >= 0) & (ih < below[:, None]) & (iw >= 0) & (iw < width) & (at < total)[None, :]
            a = tl.load(
                x + (corner[:, None] + ((r.to(index) * width + s) * C + at % C)[None, :]),
                mask=inside,
                other=0.0,
                cache_modifier=".ca",
            )
            b = tl.load(filters[:, None] + at[None, :], mask=(n < K)[:, None] & (at < total)[None, :], other=0.0)
            acc = tl.dot(to_operand(a, PRECISION), tl.trans(to_operand(b, PRECISION)), acc, input_precision=PRECISION)

    here = m.to(index)[:, None] * K + n[None, :]
    kept = (m < pixels)[:, None] & (n < K)[None, :]
    if SPLIT_K > 1:
        tl.store(partial + tl.program_id(1).to(tl.int64) * pixels * K + here, acc, mask=kept)
    else:
        z = (
            acc * tl.load(scale + n, mask=n < K, other=0.0)[None, :]
            + tl.load(shift + n, mask=n < K, other=0.0)[None, :]
        )
        if residual is not None:
            z += tl.load(residual + here, mask=kept, other=0.0).to(tl.float32)
        if RELU:
            z = _relu(z)
        tl.store(y + here, z.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=("pixels",))
def _finish_kernel(
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
    """Adds split sums in order, then scales, shifts, adds the residual and applies ReLU. ``y`` may be ``partial``."""
    columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    # A thread takes 16 bytes of the sums: a whole vector of a 16-bit result would be two loads of float32 sums, each of
    # which touches every sector and takes half of it.
    vector: tl.constexpr = 128 // partial.dtype.element_ty.primitive_bitwidth
    n = (block % columns) * BLOCK_N + tl.max_contiguous(tl.arange(0, BLOCK_N), vector)
    here = m.to(tl.int64)[:, None] * K + n[None, :]
    kept = (m < pixels)[:, None] & (n < K)[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(SPLIT_K):
        z += tl.load(partial + pixels.to(tl.int64) * (K * i) + here, mask=kept, other=0.0).to(tl.float32)
    z = z * tl.load(scale + n, mask=n < K, other=0.0)[None, :] + tl.load(shift + n, mask=n < K, other=0.0)[None, :]
    if residual is not None:
        z += tl.load(residual + here, mask=kept, other=0.0).to(tl.float32)
    if RELU:
        z = _relu(z)
    tl.store(y + here, z.to(y.dtype.element_ty), mask=kept)


def conv_grid(layer: Layer, config: Config) -> tuple[int, int]:
    """Blocks of the output, neighbours in channels first, and parts of the sum."""
    return config.blocks(layer) // config.split_k, config.split_k


def finish(
    sums: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, y: Tensor, relu: bool, splits: int
) -> None:
    """``y = [relu](sum of the slices of sums * scale + shift [+ residual])``, NHWC; ``y`` may be ``sums``."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    block_n = min(128, triton.next_power_of_2(channels))
    block_m = max(1, 2048 // block_n)
    grid = (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n),)
    launch.launch(
        _finish_kernel,
        grid,
        (sums, scale, shift, residual, y, pixels),
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
    sums = None if split == 1 else torch.empty((split, layer.pixels, layer.out_channels), device=x.device)
    launch.launch(
        _conv_bn_relu_fwd_kernel,
        conv_grid(layer, config),
        (
            x,
            weight,
            scale,
            shift,
            residual if split == 1 else None,
            y,
            sums,
            layer.pixels,
            layer.height,
            layer.width,
            layer.out_height,
            layer.out_width,
        ),
        C=layer.channels,
        K=layer.out_channels,
        R=layer.kernel[0],
        S=layer.kernel[1],
        STRIDE_H=layer.stride[0],
        STRIDE_W=layer.stride[1],
        PAD_H=layer.padding[0],
        PAD_W=layer.padding[1],
        RELU=layer.relu,
        PRECISION=layer.precision,
        WIDE=layer.is_wide,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=split,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if sums is not None:
        finish(sums, scale, shift, residual, y, layer.relu, split)


def library(layer: Layer, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """The same by PyTorch's convolution and one pass over its result."""
    y = F.conv2d(x, weight.permute(0, 3, 1, 2), stride=layer.stride, padding=layer.padding)
    y = y.contiguous(memory_format=torch.channels_last)
    finish(y, scale, shift, residual, y, layer.relu, 1)
    return y
