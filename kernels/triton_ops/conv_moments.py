"""``y = conv2d([relu](scale * x + shift), weight) + bias`` on NVIDIA GPUs, with mean and variance of y, NHWC.

The implicit matrix product of :mod:`.conv_bn_relu`, with batch norm at both ends. Where an operand is loaded it is
normalised, so that the activation between two convolutions is never in memory; pixels of the padding stay zero. A block
then sums its tile of y, as it stores it: the mean over its pixels and the squared deviations from that mean, so that
nothing cancels. A second kernel, of :mod:`.finalize`, joins the blocks in fixed order.

Source: Jung et al. 2018, "Restructuring Batch Normalization to Accelerate CNN Training".
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

from . import batch_norm
from .arguments import as_rows
from .batch_stats import partial_stats
from .bn_backward import relu_keeps
from .finalize import Stats
from .rounding import to_operand
from .taps import tap_bits, tap_is_inside

__all__ = ["conv_moments", "library"]

_SIZES = ("pixels", "height", "width", "out_height", "out_width")


@triton.jit(do_not_specialize=_SIZES)
def _conv_moments_kernel(
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
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    # Rows past the end read nothing.
    below = tl.where(m < pixels, height, 0)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    corner = ((image.to(index) * height + top) * width + left) * C
    filters = weight + n.to(tl.int64) * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if C % BLOCK_K == 0:
        # A step is one tap of BLOCK_K channels.
        rows = tap_bits(top, below, R)
        cols = tap_bits(left, width, S)
        x_offsets = corner[:, None] + k[None, :]
        w_rows = filters[:, None] + k[None, :]
        for step in tl.range(0, C // BLOCK_K * (R * S)):
            tap = step % (R * S)
            r = tap // S
            s = tap % S
            c = step // (R * S) * BLOCK_K
            inside = tap_is_inside(rows, cols, r, s, top, left, below, width, R, S)[:, None]
            at = (r.to(index) * width + s) * C + c
            a = tl.load(x + (x_offsets + at), mask=inside, other=0.0, cache_modifier=".ca")
            if scale_shift is not None or RELU:
                z = batch_norm.affine(a, scale_shift, c + k, C)
                if RELU:
                    z = tl.where(relu_keeps(z), z, 0.0)
                a = tl.where(inside, z, 0.0).to(a.dtype)
            if K % BLOCK_N == 0:
                b = tl.load(w_rows + (tap * C + c))
            else:
                b = tl.load(w_rows + (tap * C + c), mask=n[:, None] < K, other=0.0)
            acc = tl.dot(to_operand(a, PRECISION), tl.trans(to_operand(b, PRECISION)), acc, input_precision=PRECISION)
    else:
        # Few or odd channels: a step is BLOCK_K of the R * S * C products in a row, taps and channels mixed.
        total: tl.constexpr = R * S * C
        for step in tl.range(0, (total + BLOCK_K - 1) // BLOCK_K):
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
            if scale_shift is not None or RELU:
                z = batch_norm.affine(a, scale_shift, at % C, C)
                if RELU:
                    z = tl.where(relu_keeps(z), z, 0.0)
                a = tl.where(inside, z, 0.0).to(a.dtype)
            b = tl.load(filters[:, None] + at[None, :], mask=(n < K)[:, None] & (at < total)[None, :], other=0.0)
            acc = tl.dot(to_operand(a, PRECISION), tl.trans(to_operand(b, PRECISION)), acc, input_precision=PRECISION)

    here = m.to(index)[:, None] * K + n[None, :]
    kept = (m < pixels)[:, None] & (n < K)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < K, other=0.0)[None, :]
    z = acc.to(y.dtype.element_ty)
    tl.store(y + here, z, mask=kept)
    if MOMENTS:
        # Of the values as they were stored, which is what the next kernel normalises.
        v = z.to(tl.float32)
        count = tl.minimum(pixels - (block // columns) * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(tl.where(kept, v, 0.0), 0) / count
        v = tl.where(kept, v - mean[None, :], 0.0)
        to = partial + (block // columns).to(tl.int64) * (2 * K) + n
        tl.store(to, mean, mask=n < K)
        tl.store(to + K, tl.sum(v * v, 0), mask=n < K)


def conv_moments(
    layer: Layer,
    config: Config,
    x: Tensor,
    scale_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    moments: bool,
) -> Stats | None:
    """Writes y; returns the first step of mean and variance where they are asked for.

    Args:
        layer: sizes, those of the tensors; ``layer.relu`` is of the input.
        x, y: ``[N, C, H, W]`` in channels_last, one dtype. ``weight``: ``[K, R, S, C]``, contiguous.
        scale_shift: ``[2, C]``, ``bias``: ``[K]``, float32, or None.
    """
    blocks = triton.cdiv(layer.pixels, config.block_m)
    partial = torch.empty(blocks, 2, layer.out_channels, dtype=torch.float32, device=x.device) if moments else None
    launch.launch(
        _conv_moments_kernel,
        (blocks * triton.cdiv(layer.out_channels, config.block_n),),
        (
            x,
            scale_shift,
            weight,
            bias,
            y,
            partial,
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
        MOMENTS=moments,
        PRECISION=layer.precision,
        WIDE=layer.is_wide,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return None if partial is None else Stats(partial, layer.pixels, config.block_m, None)


def activation(x: Tensor, scale_shift: Tensor | None, relu: bool) -> Tensor:
    """``[relu](scale * x + shift)`` written out; x itself where nothing is to be done."""
    if scale_shift is None and not relu:
        return x
    out = torch.empty_like(x)
    batch_norm.bn_apply(as_rows(x), scale_shift, None, None, as_rows(out), relu)
    return out


def library(
    layer: Layer, x: Tensor, scale_shift: Tensor | None, weight: Tensor, bias: Tensor | None, moments: bool
) -> tuple[Tensor, Stats | None]:
    """The same by PyTorch's convolution, between a pass that normalises and one over its result. ``weight``:
    ``[K, C, R, S]``."""
    own_bias = None if bias is None else bias.to(x.dtype)
    a = activation(x, scale_shift, layer.relu)
    y = F.conv2d(a, weight, own_bias, layer.stride, layer.padding)
    y = y.contiguous(memory_format=torch.channels_last)
    if not moments:
        return y, None
    rows = as_rows(y)
    partial, plan = partial_stats(rows)
    return y, Stats(partial, rows.shape[0], plan.rows, rows)
