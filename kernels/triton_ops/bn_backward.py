"""What bn_relu and bn_add_relu share: the normalisation, the second step of the gradients' sums, the gradient of x.

    dx = A * (dz + B * (x - mean) + D),  A = gamma * invstd,  B = -invstd * dgamma / M,  D = -dbeta / M

x - mean is formed first, so that large means do not cancel. Source: Ioffe and Szegedy 2015, section 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import FINAL_C, FINAL_P, WARPS, final_grid, tiling, vector_hint


@triton.jit
def centred(x, mean):
    return x.to(tl.float32) - mean


@triton.jit
def scale_shift(invstd, gamma, beta, c, C):
    """gamma * invstd and beta; without gamma and beta invstd and 0. One rounding each, the same in every kernel."""
    scale = tl.load(invstd + c, c < C, 0.0)
    shift = tl.zeros_like(scale)
    if gamma is not None:
        scale *= tl.load(gamma + c, c < C, 0.0).to(tl.float32)
    if beta is not None:
        shift = tl.load(beta + c, c < C, 0.0).to(tl.float32)
    return scale, shift


@triton.jit
def relu_keeps(z):
    """False where ReLU gives 0; NaN passes, and its gradient with it, as in torch."""
    return not (z <= 0)


@triton.jit(do_not_specialize=["M", "vectors", "parts"])
def _bn_bwd_final_kernel(
    partial,
    invstd,
    gamma,
    coefficients,
    dgamma,
    dbeta,
    M,
    vectors,
    parts,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the parts in float64: a few thousand numbers. coefficients: A, B, D, each [C]."""
    C = vectors * VECTOR
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    sum_dzx = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        inside = (start + p < parts)[:, None] & (c < C)[None, :]
        offsets = (start + p)[:, None] * (2 * C) + c[None, :]
        sum_dz += tl.load(partial + offsets, inside, 0.0).to(tl.float64)
        sum_dzx += tl.load(partial + C + offsets, inside, 0.0).to(tl.float64)
    s = tl.load(invstd + c, c < C, 0.0).to(tl.float64)
    g_beta = tl.sum(sum_dz, 0)
    g_gamma = tl.sum(sum_dzx, 0) * s
    a, _ = scale_shift(invstd, gamma, None, c, C)
    tl.store(dbeta + c, g_beta.to(tl.float32), c < C)
    tl.store(dgamma + c, g_gamma.to(tl.float32), c < C)
    tl.store(coefficients + c, a, c < C)
    tl.store(coefficients + C + c, (-s * g_gamma / M).to(tl.float32), c < C)
    tl.store(coefficients + 2 * C + c, (-g_beta / M).to(tl.float32), c < C)


@triton.jit(do_not_specialize=["M", "vectors"])
def _bn_bwd_apply_kernel(
    dy,
    x,
    mean,
    coefficients,
    invstd,
    gamma,
    beta,
    dx,
    M,
    vectors,
    RELU: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx from dy where the ReLU is to be undone here (RELU), else from dy that is dz already."""
    C = vectors * VECTOR
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M  # last rows first: they are in the cache
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    inside = (i < M - first)[:, None] & (c < C)[None, :]
    offsets = i[:, None] * C + c[None, :]
    v = centred(tl.load(x + first * C + offsets, inside, 0.0), tl.load(mean + c, c < C, 0.0)[None, :])
    dz = tl.load(dy + first * C + offsets, inside, 0.0).to(tl.float32)
    if RELU:
        scale, shift = scale_shift(invstd, gamma, beta, c, C)
        dz = tl.where(relu_keeps(tl.fma(v, scale[None, :], shift[None, :])), dz, 0.0)
    a = tl.load(coefficients + c, c < C, 0.0)[None, :]
    b = tl.load(coefficients + C + c, c < C, 0.0)[None, :]
    d = tl.load(coefficients + 2 * C + c, c < C, 0.0)[None, :]
    g = a * (dz + tl.fma(b, v, d))
    tl.store(dx + first * C + offsets, g.to(dx.dtype.element_ty), inside)


def finish_sums(partial: Tensor, invstd: Tensor, gamma: Tensor | None, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients A, B, D [3, C], dgamma and dbeta, float32, from the parts' sums [parts, 2, C] over m rows."""
    parts, _, channels = partial.shape
    dgamma, dbeta = (torch.empty(channels, dtype=torch.float32, device=partial.device) for _ in range(2))
    coefficients = torch.empty(3, channels, dtype=torch.float32, device=partial.device)
    vector = vector_hint(channels)
    launch.launch(
        _bn_bwd_final_kernel,
        final_grid(channels),
        (partial, invstd, gamma, coefficients, dgamma, dbeta, m, channels // vector, parts),
        VECTOR=vector,
        BLOCK_P=FINAL_P,
        BLOCK_C=FINAL_C,
        num_warps=WARPS,
    )
    return coefficients, dgamma, dbeta


def apply_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    coefficients: Tensor,
    dx: Tensor,
    relu: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> None:
    """Writes dx; all images are rows [M, C]. relu: invstd, gamma, beta where dy has still to pass the ReLU."""
    m, channels = x.shape
    plan, vector = tiling(m, channels, x.dtype.itemsize), vector_hint(channels)
    launch.launch(
        _bn_bwd_apply_kernel,
        plan.grid,
        (dy, x, mean, coefficients, *(relu or (None,) * 3), dx, m, channels // vector),
        RELU=relu is not None,
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
