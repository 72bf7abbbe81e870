"""Batch norm of a training chain on NVIDIA GPUs, as passes over rows [pixels, channels], which are dense.

    bn_apply            [relu](scale * y + shift [+ residual [* its scale + its shift]])
    bn_backward_sums    g = grad where the ReLU passed; partial sums of g, and of g * (y - mean) for up to two ys
    bn_input_gradient   a * g + b * (y - mean) + constant

A pass reads each activation once and writes its result once. The convolutions of :mod:`.implicit_gemm` do the same to
the tiles that they load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import WARPS, reduction, tiling, vector_hint


@triton.jit
def relu_passes(z):
    """False where ReLU gives 0. NaN passes, and its gradient with it, as in torch."""
    return not (z <= 0)


@triton.jit
def affine(v, scale_shift, c, C):
    """scale * v + shift of a tile [pixels, channels], in float32; without scale_shift v itself."""
    v = v.to(tl.float32)
    if scale_shift is not None:
        scale = tl.load(scale_shift + c, c < C, 0.0)[None, :]
        v = tl.fma(v, scale, tl.load(scale_shift + C + c, c < C, 0.0)[None, :])
    return v


@triton.jit
def input_gradient(g, y, coefficients, c, C):
    """a * g + b * (y - mean) + constant of a tile, in float32."""
    a = tl.load(coefficients + c, c < C, 0.0)[None, :]
    b = tl.load(coefficients + C + c, c < C, 0.0)[None, :]
    constant = tl.load(coefficients + 2 * C + c, c < C, 0.0)[None, :]
    mean = tl.load(coefficients + 3 * C + c, c < C, 0.0)[None, :]
    return tl.fma(a, g.to(tl.float32), tl.fma(b, y.to(tl.float32) - mean, constant))


@triton.jit(do_not_specialize=["M", "vectors"])
def _bn_apply_kernel(
    y,
    scale_shift,
    residual,
    residual_scale_shift,
    out,
    M,
    vectors,
    RELU: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = vectors * VECTOR  # the compiler sees what divides it
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M  # last rows first: they are in the cache
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    inside = (i < M - first)[:, None] & (c < C)[None, :]
    offsets = first * C + i[:, None] * C + c[None, :]
    z = affine(tl.load(y + offsets, inside, 0.0), scale_shift, c, C)
    if residual is not None:
        z += affine(tl.load(residual + offsets, inside, 0.0), residual_scale_shift, c, C)
    if RELU:
        z = tl.where(relu_passes(z), z, 0.0)
    tl.store(out + offsets, z.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "vectors"])
def _bn_input_gradient_kernel(
    grad, y, coefficients, dy, M, vectors, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    C = vectors * VECTOR
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    inside = (i < M - first)[:, None] & (c < C)[None, :]
    offsets = first * C + i[:, None] * C + c[None, :]
    g = input_gradient(tl.load(grad + offsets, inside, 0.0), tl.load(y + offsets, inside, 0.0), coefficients, c, C)
    tl.store(dy + offsets, g.to(dy.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "vectors", "rows"])
def _bn_backward_sums_kernel(
    grad,
    added,
    relu_source,
    scale_shift,
    y,
    y2,
    stats,
    stats2,
    out,
    partial,
    M,
    vectors,
    rows,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Block p, rows p * rows ...: writes grad [+ added] where the ReLU passes, and sums it. SAME: y is relu_source."""
    C = vectors * VECTOR
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * rows
    n = tl.minimum(M - first, rows).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    acc_y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    acc_y2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, n, BLOCK_M):
        inside = (i < n - start)[:, None] & (c < C)[None, :]
        offsets = (first + start) * C + i[:, None] * C + c[None, :]
        g = tl.load(grad + offsets, inside, 0.0)
        if added is not None:
            g = (g.to(tl.float32) + tl.load(added + offsets, inside, 0.0).to(tl.float32)).to(out.dtype.element_ty)
        if relu_source is not None:
            v = tl.load(relu_source + offsets, inside, 0.0)
            g = tl.where(relu_passes(affine(v, scale_shift, c, C)), g, 0.0).to(out.dtype.element_ty)
        tl.store(out + offsets, g, inside)
        g = g.to(tl.float32)
        acc += g
        if y is not None:
            w = v if SAME else tl.load(y + offsets, inside, 0.0)
            acc_y += g * tl.where(inside, w.to(tl.float32) - tl.load(stats + c, c < C, 0.0)[None, :], 0.0)
        if y2 is not None:
            w = tl.load(y2 + offsets, inside, 0.0)
            acc_y2 += g * tl.where(inside, w.to(tl.float32) - tl.load(stats2 + c, c < C, 0.0)[None, :], 0.0)
    partial += part.to(tl.int64) * ROWS * C
    tl.store(partial + c, tl.sum(acc, 0), c < C)
    if y is not None:
        tl.store(partial + C + c, tl.sum(acc_y, 0), c < C)
    if y2 is not None:
        tl.store(partial + 2 * C + c, tl.sum(acc_y2, 0), c < C)


def as_rows(t: Tensor) -> Tensor:
    """[N, C, H, W] as [N H W, C] with dense rows: a view of a channels_last tensor, a copy of any other."""
    return t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1])


def bn_apply(
    y: Tensor,
    scale_shift: Tensor | None,
    residual: Tensor | None,
    residual_scale_shift: Tensor | None,
    out: Tensor,
    relu: bool,
) -> None:
    """Writes ``out = [relu](scale * y + shift [+ residual [* its scale + its shift]])``."""
    m, channels = y.shape
    plan, vector = tiling(m, channels, y.dtype.itemsize), vector_hint(channels)
    launch.launch(
        _bn_apply_kernel,
        plan.grid,
        (y, scale_shift, residual, residual_scale_shift, out, m, channels // vector),
        RELU=relu,
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )


def bn_input_gradient(grad: Tensor, y: Tensor, coefficients: Tensor, dy: Tensor) -> None:
    """Writes ``dy = a * grad + b * (y - mean) + constant``; coefficients: their four rows."""
    m, channels = y.shape
    plan, vector = tiling(m, channels, y.dtype.itemsize), vector_hint(channels)
    launch.launch(
        _bn_input_gradient_kernel,
        plan.grid,
        (grad, y, coefficients, dy, m, channels // vector),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )


def bn_backward_sums(
    grad: Tensor,
    added: Tensor | None,
    relu_source: Tensor | None,
    scale_shift: Tensor | None,
    ys: list[Tensor],
    stats: list[Tensor],
    out: Tensor,
) -> Tensor:
    """Writes ``out = grad [+ added]`` where ``relu_source [* scale + shift]`` passes the ReLU; ``out`` may be ``grad``.

    Returns partial sums of out, and of out * (y - mean) for each y of ``ys`` and its mean, the first row of its
    ``stats``: float32 ``[parts, 1 + ys, C]``.
    """
    m, channels = grad.shape
    plan, vector = reduction(m, channels, grad.dtype.itemsize), vector_hint(channels)
    partial = torch.empty(plan.parts, 1 + len(ys), channels, dtype=torch.float32, device=grad.device)
    same = relu_source is not None and len(ys) > 0 and ys[0].data_ptr() == relu_source.data_ptr()
    y, y2 = [*ys, None, None][:2]
    stats1, stats2 = [*stats, None, None][:2]
    launch.launch(
        _bn_backward_sums_kernel,
        plan.grid,
        (grad, added, relu_source, scale_shift, y, y2, stats1, stats2, out, partial, m, channels // vector, plan.rows),
        SAME=same,
        ROWS=1 + len(ys),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
    return partial
