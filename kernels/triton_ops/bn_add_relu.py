"""bn_add_relu on NVIDIA GPUs: batch norm by batch statistics, residual add and ReLU, forward and backward.

The residual makes the sign of the ReLU's argument unrecoverable from x, so the forward keeps it as one bit an element:
byte [m, c // 8] has bit c % 8 set where the ReLU passes. That saves the backward a read of y or of the residual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .arguments import as_rows, check_image, check_tensor, empty_image_like
from .batch_stats import DTYPES, batch_stats
from .bn_backward import apply_backward, centred, finish_sums, relu_keeps, scale_shift
from .bn_relu import check_affine, check_statistics
from .tiles import WARPS, cdiv, reduction, tiling, vector_hint


@triton.jit(do_not_specialize=["M", "vectors"])
def _bn_add_relu_fwd_kernel(
    x,
    residual,
    mean,
    invstd,
    gamma,
    beta,
    y,
    mask,
    M,
    vectors,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Tiles are [rows, bytes of the mask, bits]: a thread's 16-byte vector of fp16 is one byte of the mask.
    C = vectors * VECTOR
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M  # last rows first: they are in the cache
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    bit = tl.arange(0, 8)
    c = byte[:, None] * 8 + bit[None, :]
    i = tl.arange(0, BLOCK_M)
    inside = (i < M - first)[:, None, None] & (c < C)[None, :, :]
    offsets = i[:, None, None] * C + c[None, :, :]
    scale, shift = scale_shift(invstd, gamma, beta, c, C)
    v = centred(tl.load(x + first * C + offsets, inside, 0.0), tl.load(mean + c, c < C, 0.0)[None, :, :])
    z = tl.fma(v, scale[None, :, :], shift[None, :, :])
    z += tl.load(residual + first * C + offsets, inside, 0.0).to(tl.float32)
    passes = relu_keeps(z)
    tl.store(y + first * C + offsets, tl.where(passes, z, 0.0).to(y.dtype.element_ty), inside)
    width = (C + 7) // 8
    bits = tl.sum(tl.where(passes & inside, 1 << bit[None, None, :], 0), 2)
    inside_mask = (i < M - first)[:, None] & (byte < width)[None, :]
    tl.store(mask + first * width + i[:, None] * width + byte[None, :], bits.to(tl.uint8), inside_mask)


@triton.jit(do_not_specialize=["M", "vectors", "rows"])
def _bn_add_relu_bwd_sums_kernel(
    dy,
    x,
    mask,
    mean,
    dz,
    partial,
    M,
    vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Block p, rows p * rows ...: writes dz, the residual's gradient, and sums dz and dz * (x - mean)."""
    C = vectors * VECTOR
    width = (C + 7) // 8
    part = tl.program_id(0)
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    bit = tl.arange(0, 8)
    c = byte[:, None] * 8 + bit[None, :]
    i = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * rows
    n = tl.minimum(M - first, rows).to(tl.int32)
    dy += first * C
    x += first * C
    dz += first * C
    mask += first * width
    offsets = i[:, None, None] * C + c[None, :, :]
    centre = tl.load(mean + c, c < C, 0.0)[None, :, :]
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C // 8, 8), tl.float32)
    sum_dzx = tl.zeros((BLOCK_M, BLOCK_C // 8, 8), tl.float32)
    for start in range(0, n, BLOCK_M):
        row = i < n - start
        inside = row[:, None, None] & (c < C)[None, :, :]
        bits = tl.load(mask + i[:, None] * width + byte[None, :], row[:, None] & (byte < width)[None, :], 0)
        passes = ((bits.to(tl.int32)[:, :, None] >> bit[None, None, :]) & 1) != 0
        v = centred(tl.load(x + offsets, inside, 0.0), centre)
        g = tl.load(dy + offsets, inside, 0.0)
        g = tl.where(passes, g, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + offsets, g, inside)
        sum_dz += g.to(tl.float32)
        sum_dzx += g.to(tl.float32) * v
        x += BLOCK_M * C
        dy += BLOCK_M * C
        dz += BLOCK_M * C
        mask += BLOCK_M * width
    partial += part * 2 * C
    tl.store(partial + c, tl.sum(sum_dz, 0), c < C)
    tl.store(partial + C + c, tl.sum(sum_dzx, 0), c < C)


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Of the bit mask of an image [N, C, H, W]: bytes are uint8 [N H W, ceil(C / 8)]."""
    n, channels, height, width = x.shape
    return n * height * width, cdiv(channels, 8)


def bn_add_relu_fwd(
    x: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``relu((x - mean) * invstd * gamma + beta + residual)`` by the statistics of this batch; with mean, variance,
    invstd and the bit mask for the backward.

    Equivalent to ``F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps) + residual)``. Reads x twice
    (statistics, normalisation), the residual once; writes y once and the mask, 1/16 of an fp16 y.

    x: [N, C, H, W]; float16, bfloat16, float32; channels_last, else it is copied to that, as y is. residual: shape and
    dtype of x. gamma, beta: [C], any of these dtypes, or None. The statistics are float32 [C], the variance biased; the
    mask is uint8 [N H W, ceil(C / 8)]. Raises TypeError and ValueError.
    """
    check_image("x", x, DTYPES)
    check_affine(x, gamma, beta)
    check_tensor("residual", residual, like=x, dtypes=(x.dtype,), shape=x.shape)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var, invstd = batch_stats(x, eps)
    y, mask = bn_add_relu_apply(x, residual, mean, invstd, gamma, beta)
    return y, mean, var, invstd, mask


def bn_add_relu_apply(
    x: Tensor, residual: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the bit mask by statistics given as float32 [C]; reads x and the residual once, writes y and mask once."""
    check_image("x", x, DTYPES)
    check_tensor("residual", residual, like=x, dtypes=(x.dtype,), shape=x.shape)
    check_affine(x, gamma, beta)
    check_statistics(x, mean, invstd)
    rows, y = as_rows(x), empty_image_like(x)
    mask = torch.empty(mask_shape(x), dtype=torch.uint8, device=x.device)
    if not rows.numel():
        return y, mask
    m, channels = rows.shape
    plan, vector = tiling(m, channels, x.dtype.itemsize, narrowest=8), vector_hint(channels)
    launch.launch(
        _bn_add_relu_fwd_kernel,
        plan.grid,
        (rows, as_rows(residual), mean, invstd, gamma, beta, as_rows(y), mask, m, channels // vector),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
    return y, mask


def bn_add_relu_bwd(
    dy: Tensor, x: Tensor, mask: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, gamma and beta, from that of y: ``dresidual = dz = dy where the mask is set``,
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``, ``dx = gamma * invstd * (dz - dbeta / M - xhat * dgamma / M)``.

    Equivalent to autograd's backward of `bn_add_relu_fwd`'s equation. Reads dy and the mask once, x twice (sums,
    gradient) and dresidual once; writes dresidual and dx once. dy: shape and dtype of x. dgamma and dbeta are float32.
    """
    check_image("x", x, DTYPES)
    check_tensor("dy", dy, like=x, dtypes=(x.dtype,), shape=x.shape)
    check_tensor("mask", mask, like=x, dtypes=(torch.uint8,), shape=mask_shape(x))
    check_affine(x, gamma, None)
    check_statistics(x, mean, invstd)
    x_rows, dresidual, dx = as_rows(x), empty_image_like(x), empty_image_like(x)
    m, channels = x_rows.shape
    if not x_rows.numel():
        return dx, dresidual, *torch.zeros(2, channels, dtype=torch.float32, device=x.device)
    plan, vector = reduction(m, channels, x.dtype.itemsize, narrowest=8), vector_hint(channels)
    partial = torch.empty(plan.parts, 2, channels, dtype=torch.float32, device=x.device)
    launch.launch(
        _bn_add_relu_bwd_sums_kernel,
        plan.grid,
        (as_rows(dy), x_rows, mask.contiguous(), mean, as_rows(dresidual), partial, m, channels // vector, plan.rows),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
    coefficients, dgamma, dbeta = finish_sums(partial, invstd, gamma, m)
    apply_backward(as_rows(dresidual), x_rows, mean, coefficients, as_rows(dx))
    return dx, dresidual, dgamma, dbeta
