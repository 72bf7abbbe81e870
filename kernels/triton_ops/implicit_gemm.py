"""The implicit GEMM of a convolution, NHWC: what the forward, statistics and gradient kernels share.

A convolution is the GEMM of a matrix of input pixels, which is never in memory, with the filters: a row for each output
pixel, a column for each output channel, and a sum over taps (r, s) and input channels. A block owns BLOCK_M pixels and
BLOCK_N channels. It walks the taps of one slice of channels before it takes the next slice: the reads of a pixel by
neighbouring taps come close together and hit L1.

An operand passes a prologue as it is loaded. Training applies batch norm there: the activation between two convolutions
and the gradient of a convolution's output are never in memory. The padding is masked after the prologue, so that it
stays zero.

Source: Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .batch_norm import affine, input_gradient, relu_passes
from .rounding import to_operand

if TYPE_CHECKING:
    from resnet_fast.gpu.candidates.triton import Config
    from resnet_fast.gpu.layer import Layer

# Sizes change from input to input, and no alignment follows from them: one binary serves all.
SIZES = ("pixels", "height", "width", "out_height", "out_width")
# Taps a side that have a bit each in an int32. constexpr: a global that kernels read.
_MOST: tl.constexpr = tl.constexpr(32)


@triton.jit
def pixel_coordinates(m, height, width):
    """Image, row and column of pixels m, counted over images of height x width."""
    image = m // (height * width)
    within = m % (height * width)
    return image, within // width, within % width


@triton.jit
def tap_bits(first, limit, TAPS: tl.constexpr, STEP: tl.constexpr = 1):
    """Bit t: whether ``first + STEP * t``, the row or column of tap t, is in ``[0, limit)``. Made before the main loop.

    Filters of more than 32 taps a side have no bits.
    """
    bits = first * 0
    if TAPS <= _MOST:
        for t in tl.static_range(TAPS):
            place = first + STEP * t
            bits |= ((place >= 0) & (place < limit)).to(tl.int32) << t
    return bits


@triton.jit
def tap_is_inside(rows, cols, r, s, top, left, height, width, R: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr = 1):
    """Whether tap (r, s) lies on the image. rows and cols: :func:`tap_bits` of top and height, left and width."""
    if R <= _MOST and S <= _MOST:
        return ((rows >> r) & (cols >> s) & 1) != 0
    else:
        ih = top + STEP * r
        iw = left + STEP * s
        return (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)


@triton.jit
def load_activation(x, offsets, inside, scale_shift, c, C, RELU: tl.constexpr):
    """A tile of ``[relu](scale * x + shift)`` for channels c, in the dtype of x; zero outside."""
    a = tl.load(x + offsets, mask=inside, other=0.0, cache_modifier=".ca")
    if scale_shift is not None or RELU:
        z = affine(a, scale_shift, c, C)
        if RELU:
            z = tl.where(relu_passes(z), z, 0.0)
        a = tl.where(inside, z, 0.0).to(a.dtype)
    return a


@triton.jit
def load_gradient(grad, y, offsets, inside, coefficients, c, C):
    """A tile of ``a * grad + b * (y - mean) + constant`` for channels c, in the dtype of grad; zero outside."""
    g = tl.load(grad + offsets, mask=inside, other=0.0, cache_modifier=".ca")
    if coefficients is not None:
        v = tl.load(y + offsets, mask=inside, other=0.0, cache_modifier=".ca")
        g = tl.where(inside, input_gradient(g, v, coefficients, c, C), 0.0).to(g.dtype)
    return g


@triton.jit
def multiply_accumulate(
    a, b, acc, PRECISION: tl.constexpr, TRANSPOSE_A: tl.constexpr = False, TRANSPOSE_B: tl.constexpr = False
):
    """``a @ b + acc``, either transposed first."""
    a = to_operand(a, PRECISION)
    if TRANSPOSE_A:
        a = tl.trans(a)
    b = to_operand(b, PRECISION)
    if TRANSPOSE_B:
        b = tl.trans(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def mainloop(
    x,
    scale_shift,
    weight,
    m,
    n,
    pixels,
    height,
    width,
    out_height,
    out_width,
    split,
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
    """Accumulators of output pixels m and channels n: slice ``split`` of SPLIT_K of the sum, float32."""
    k = tl.arange(0, BLOCK_K)
    image, row, col = pixel_coordinates(m, out_height, out_width)
    top = row * STRIDE_H - PAD_H
    left = col * STRIDE_W - PAD_W
    # Pixels past the end read nothing: none of their taps is inside.
    below = tl.where(m < pixels, height, 0)
    # 32-bit offsets take half the registers: 64 bits where the feature maps need them.
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    corner = ((image.to(index) * height + top) * width + left) * C
    filters = weight + n.to(tl.int64) * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if C % BLOCK_K == 0:
        # A step is one tap of BLOCK_K channels.
        rows = tap_bits(top, below, R)
        cols = tap_bits(left, width, S)
        steps: tl.constexpr = C // BLOCK_K * (R * S)
        x_offsets = corner[:, None] + k[None, :]
        w_rows = filters[:, None] + k[None, :]
        for step in tl.range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
            tap = step % (R * S)
            r = tap // S
            s = tap % S
            c = step // (R * S) * BLOCK_K
            inside = tap_is_inside(rows, cols, r, s, top, left, below, width, R, S)[:, None]
            offsets = x_offsets + ((r.to(index) * width + s) * C + c)
            a = load_activation(x, offsets, inside, scale_shift, c + k, C, RELU)
            if K % BLOCK_N == 0:
                b = tl.load(w_rows + (tap * C + c))
            else:
                b = tl.load(w_rows + (tap * C + c), mask=n[:, None] < K, other=0.0)
            acc = multiply_accumulate(a, b, acc, PRECISION, TRANSPOSE_B=True)
    else:
        # Few or odd channels: a step is BLOCK_K of the R * S * C multiply-accumulates in a row, across taps.
        total: tl.constexpr = R * S * C
        steps: tl.constexpr = (total + BLOCK_K - 1) // BLOCK_K
        for step in tl.range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
            at = step * BLOCK_K + k
            tap = at // C
            r = tap // S
            s = tap % S
            ih = top[:, None] + r[None, :]
            iw = left[:, None] + s[None, :]
            inside = (ih >= 0) & (ih < below[:, None]) & (iw >= 0) & (iw < width) & (at < total)[None, :]
            offsets = corner[:, None] + ((r.to(index) * width + s) * C + at % C)[None, :]
            a = load_activation(x, offsets, inside, scale_shift, at % C, C, RELU)
            b = tl.load(filters[:, None] + at[None, :], mask=(n < K)[:, None] & (at < total)[None, :], other=0.0)
            acc = multiply_accumulate(a, b, acc, PRECISION, TRANSPOSE_B=True)
    return acc


def constants(layer: Layer, config: Config) -> dict[str, object]:
    """What kernels are compiled for: the convolution and its tile."""
    return {
        "C": layer.channels,
        "K": layer.out_channels,
        "R": layer.kernel[0],
        "S": layer.kernel[1],
        "STRIDE_H": layer.stride[0],
        "STRIDE_W": layer.stride[1],
        "PAD_H": layer.padding[0],
        "PAD_W": layer.padding[1],
        "PRECISION": layer.precision,
        "WIDE": layer.is_wide,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def sizes(layer: Layer) -> tuple[int, ...]:
    """The values of :data:`SIZES`."""
    return (layer.pixels, layer.height, layer.width, layer.out_height, layer.out_width)
