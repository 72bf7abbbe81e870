"""Both gradients of a convolution between two batch norms on NVIDIA GPUs, NHWC.

The gradient of the convolution's output is made as it is read, ``dy = a * grad + b * (y - mean) + constant``, and so is
the activation that it multiplies for the weight, ``[relu](scale * x + shift)``: neither is in memory.

    data      dx[p] = sum over taps and output channels of dy[(p + pad - tap) / stride] * weight[tap]. Pixels that share
              their place modulo the stride take the same taps: blocks work on one such phase. A tile then gets the
              residual's gradient, passes the ReLU of the layer before, is stored, and summed with that layer's y.
    weight    a block sums dy[p] x activation[p * stride - pad + tap] over its pixels, for one tap; a second pass adds
              the blocks' sums in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.layer import Layer

from . import batch_norm
from .bn_backward import relu_keeps
from .filters import filter_offsets, is_wide, strides
from .rounding import to_operand
from .taps import tap_bits, tap_is_inside

__all__ = ["data_gradient", "weight_gradient"]

_SIZES = ("batch", "height", "width", "out_height", "out_width")


@triton.jit(do_not_specialize=_SIZES)
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
    moments1,
    moments2,
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
    FINISH: tl.constexpr,
    POSITIVE: tl.constexpr,
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
    a_phase = phase // STRIDE_W
    b_phase = phase % STRIDE_W
    # The phase's pixels, and its first tap; the others follow at the stride.
    rows_here = (height - a_phase + STRIDE_H - 1) // STRIDE_H
    cols_here = (width - b_phase + STRIDE_W - 1) // STRIDE_W
    pixels = batch * rows_here * cols_here
    r0 = (a_phase + PAD_H) % STRIDE_H
    s0 = (b_phase + PAD_W) % STRIDE_W
    taps_h = tl.maximum(R - r0 + STRIDE_H - 1, 0) // STRIDE_H
    taps_w = tl.maximum(S - s0 + STRIDE_W - 1, 0) // STRIDE_W

    m = (block // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    per_image = tl.maximum(rows_here * cols_here, 1)
    image = m // per_image
    within = m % per_image
    i = within // tl.maximum(cols_here, 1)
    j = within % tl.maximum(cols_here, 1)
    # Output pixel of the first tap; the next tap's is one before.
    bottom = (a_phase + PAD_H - r0) // STRIDE_H + i
    right = (b_phase + PAD_W - s0) // STRIDE_W + j
    valid = m < pixels
    # Rows past the end read nothing.
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
        g = tl.load(grad + offsets, mask=inside, other=0.0, cache_modifier=".ca")
        if coefficients is not None:
            v = tl.load(y + offsets, mask=inside, other=0.0, cache_modifier=".ca")
            g = tl.where(inside, batch_norm.input_gradient(g, v, coefficients, c, K), 0.0).to(g.dtype)
        at = ((r0 + th * STRIDE_H) * S + s0 + tw * STRIDE_W) * C
        w = weight + c.to(tl.int64)[:, None] * (R * S * C) + (at + n)[None, :]
        b = tl.load(w, mask=(c < K)[:, None] & (n < C)[None, :], other=0.0)
        acc = tl.dot(to_operand(g, PRECISION), to_operand(b, PRECISION), acc, input_precision=PRECISION)

    ih = a_phase + i * STRIDE_H
    iw = b_phase + j * STRIDE_W
    here = ((image.to(index) * height + ih) * width + iw)[:, None] * C + n[None, :]
    kept = valid[:, None] & (n < C)[None, :]
    if residual is not None:
        acc += tl.load(residual + here, mask=kept, other=0.0).to(tl.float32)
    if FINISH:
        if POSITIVE or SAME:
            v = tl.load(x + here, mask=kept, other=0.0)
        if POSITIVE:
            acc = tl.where(relu_keeps(batch_norm.affine(v, scale_shift, n, C)), acc, 0.0)
    out = acc.to(dx.dtype.element_ty)
    tl.store(dx + here, out, mask=kept)
    if FINISH:
        # Sums of the gradient as it was stored.
        g = tl.where(kept, out.to(tl.float32), 0.0)
        parts = tl.num_programs(0) // columns
        to = partial + (phase * parts + block // columns).to(tl.int64) * (ROWS * C) + n
        tl.store(to, tl.sum(g, 0), mask=n < C)
        if y1 is not None:
            u = v if SAME else tl.load(y1 + here, mask=kept, other=0.0)
            u = u.to(tl.float32) - tl.load(moments1 + n, mask=n < C, other=0.0)[None, :]
            tl.store(to + C, tl.sum(tl.where(kept, g * u, 0.0), 0), mask=n < C)
        if y2 is not None:
            u = tl.load(y2 + here, mask=kept, other=0.0).to(tl.float32)
            u -= tl.load(moments2 + n, mask=n < C, other=0.0)[None, :]
            tl.store(to + 2 * C, tl.sum(tl.where(kept, g * u, 0.0), 0), mask=n < C)


@triton.jit(do_not_specialize=("pixels", "height", "width", "out_height", "out_width"))
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
    tap = block % (R * S)  # blocks of neighbouring taps read the same maps at about the same time
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
        image = p // (out_height * out_width)
        within = p % (out_height * out_width)
        ih = within // out_width * STRIDE_H - PAD_H + r
        iw = within % out_width * STRIDE_W - PAD_W + s
        there = (p < pixels) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        # Where the tap lies in the padding the activation is zero: the gradient need not be read.
        inside = there[:, None] & (m < K)[None, :]
        offsets = p.to(index)[:, None] * K + m[None, :]
        g = tl.load(grad + offsets, mask=inside, other=0.0, cache_modifier=".ca")
        if coefficients is not None:
            v = tl.load(y + offsets, mask=inside, other=0.0, cache_modifier=".ca")
            g = tl.where(inside, batch_norm.input_gradient(g, v, coefficients, m, K), 0.0).to(g.dtype)
        inside = there[:, None] & (n < C)[None, :]
        offsets = ((image.to(index) * height + ih) * width + iw)[:, None] * C + n[None, :]
        a = tl.load(x + offsets, mask=inside, other=0.0, cache_modifier=".ca")
        if scale_shift is not None or RELU:
            z = batch_norm.affine(a, scale_shift, n, C)
            if RELU:
                z = tl.where(relu_keeps(z), z, 0.0)
            a = tl.where(inside, z, 0.0).to(a.dtype)
        acc = tl.dot(tl.trans(to_operand(g, PRECISION)), to_operand(a, PRECISION), acc, input_precision=PRECISION)
    here = (m.to(tl.int64)[:, None] * (R * S) + tap) * C + n[None, :]
    here += tl.program_id(1).to(tl.int64) * (K * R * S * C)
    tl.store(partial + here, acc, mask=(m < K)[:, None] & (n < C)[None, :])


@triton.jit(do_not_specialize=range(2, 11))
def _add_parts_kernel(
    partial,
    out,
    elements,
    parts,
    channels,
    height,
    width,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the parts, in order, from [K, R, S, C] to the layout of the filters."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    i = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + part * elements.to(tl.int64) + i, i < elements, 0.0)
    to = filter_offsets(i, channels, height, width, stride_k, stride_c, stride_r, stride_s)
    tl.store(out + to, total.to(out.dtype.element_ty), i < elements)


def _sizes(layer: Layer) -> dict[str, object]:
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
    }


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
    finish: bool,
    ys: list[Tensor],
    means: list[Tensor],
    dx: Tensor,
) -> Tensor | None:
    """Writes dx; with ``finish`` behind the ReLU of ``scale * x + shift``, and returns its parts' sums, float32
    ``[parts, 1 + ys, C]``.

    Images are ``[N, C, H, W]`` in channels_last, ``weight`` is ``[K, R, S, C]``, contiguous; ``layer.relu``: whether x
    has a ReLU to come. x without scale_shift is what a ReLU gave.
    """
    stride_h, stride_w = layer.stride
    most = layer.batch * -(-layer.height // stride_h) * -(-layer.width // stride_w)
    blocks, phases = triton.cdiv(most, config.block_m), stride_h * stride_w
    rows = 1 + len(ys)
    partial = None
    if finish:
        partial = torch.empty(blocks * phases, rows, layer.channels, dtype=torch.float32, device=x.device)
    positive = layer.relu or scale_shift is None
    y1, y2 = [*ys, None, None][:2]
    moments1, moments2 = [*means, None, None][:2]
    launch.launch(
        _data_gradient_kernel,
        (blocks * triton.cdiv(layer.channels, config.block_n), phases),
        (
            *(grad, y, coefficients, weight, residual),
            *(
                x if finish else None,
                scale_shift if finish and positive else None,
                y1,
                y2,
                moments1,
                moments2,
                dx,
                partial,
            ),
            *(layer.batch, layer.height, layer.width, layer.out_height, layer.out_width),
        ),
        **_sizes(layer),
        FINISH=finish,
        POSITIVE=finish and positive,
        SAME=finish and y1 is not None and y1.data_ptr() == x.data_ptr(),
        ROWS=rows,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
    shape = (layer.out_channels, *layer.kernel, layer.channels)
    parts = config.split_k
    partial = torch.empty(parts, *shape, dtype=torch.float32, device=x.device)
    taps = layer.kernel[0] * layer.kernel[1]
    across = triton.cdiv(layer.channels, config.block_n)
    launch.launch(
        _weight_gradient_kernel,
        (taps * across * triton.cdiv(layer.out_channels, config.block_m), parts),
        (
            *(grad, y, coefficients, x, scale_shift, partial),
            *(layer.pixels, layer.height, layer.width, layer.out_height, layer.out_width),
        ),
        **_sizes(layer),
        RELU=layer.relu,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    elements, block = dw.numel(), 1024
    launch.launch(
        _add_parts_kernel,
        (triton.cdiv(elements, block),),
        (partial, dw, elements, parts, *strides(dw)),
        WIDE=is_wide(dw),
        BLOCK=block,
        num_warps=4,
    )
