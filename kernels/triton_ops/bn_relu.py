"""bn_relu on NVIDIA GPUs: batch norm by batch statistics with its ReLU, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .arguments import as_rows, check_image, check_tensor, empty_image_like
from .batch_stats import DTYPES, batch_stats
from .bn_backward import apply_backward, centred, finish_sums, relu_keeps, scale_shift
from .tiles import WARPS, reduction, tiling, vector_hint


@triton.jit(do_not_specialize=["M", "vectors"])
def _bn_relu_fwd_kernel(
    x, mean, invstd, gamma, beta, y, M, vectors, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    C = vectors * VECTOR
    # The last rows first: the pass over x before this one has left them in the cache.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    inside = (i < M - first)[:, None] & (c < C)[None, :]
    offsets = i[:, None] * C + c[None, :]
    scale, shift = scale_shift(invstd, gamma, beta, c, C)
    v = centred(tl.load(x + first * C + offsets, inside, 0.0), tl.load(mean + c, c < C, 0.0)[None, :])
    z = tl.fma(v, scale[None, :], shift[None, :])
    tl.store(y + first * C + offsets, tl.where(relu_keeps(z), z, 0.0).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "vectors", "rows"])
def _bn_relu_bwd_sums_kernel(
    dy,
    x,
    mean,
    invstd,
    gamma,
    beta,
    partial,
    M,
    vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Block p: sums of dz and dz * (x - mean) over rows p * rows ..., to partial[p, 0 and 1, C]."""
    C = vectors * VECTOR
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * rows
    n = tl.minimum(M - first, rows).to(tl.int32)
    dy += first * C
    x += first * C
    offsets = i[:, None] * C + c[None, :]
    scale, shift = scale_shift(invstd, gamma, beta, c, C)
    centre = tl.load(mean + c, c < C, 0.0)[None, :]
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dzx = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, n, BLOCK_M):
        inside = (i < n - start)[:, None] & (c < C)[None, :]
        v = centred(tl.load(x + offsets, inside, 0.0), centre)
        g = tl.load(dy + offsets, inside, 0.0).to(tl.float32)
        dz = tl.where(relu_keeps(tl.fma(v, scale[None, :], shift[None, :])), g, 0.0)
        sum_dz += dz
        sum_dzx += dz * v
        x += BLOCK_M * C
        dy += BLOCK_M * C
    partial += part * 2 * C
    tl.store(partial + c, tl.sum(sum_dz, 0), c < C)
    tl.store(partial + C + c, tl.sum(sum_dzx, 0), c < C)


def bn_relu_fwd(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``relu((x - mean) * invstd * gamma + beta)`` by the statistics of this batch; with mean, variance and invstd.

    Equivalent to ``F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps))``. Reads x twice
    (statistics, normalisation) and writes y once.

    x: [N, C, H, W]; float16, bfloat16, float32; channels_last, else it is copied to that, as y is. gamma, beta: [C],
    any of these dtypes, or None. The other results are float32 [C], the variance biased.
    Raises TypeError and ValueError.
    """
    check_image("x", x, DTYPES)
    check_affine(x, gamma, beta)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var, invstd = batch_stats(x, eps)
    return bn_relu_apply(x, mean, invstd, gamma, beta), mean, var, invstd


def bn_relu_apply(x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """``relu((x - mean) * invstd * gamma + beta)`` by statistics given as float32 [C]; reads x and writes y once."""
    check_image("x", x, DTYPES)
    check_affine(x, gamma, beta)
    check_statistics(x, mean, invstd)
    rows, y = as_rows(x), empty_image_like(x)
    if not rows.numel():
        return y
    m, channels = rows.shape
    plan, vector = tiling(m, channels, x.dtype.itemsize), vector_hint(channels)
    launch.launch(
        _bn_relu_fwd_kernel,
        plan.grid,
        (rows, mean, invstd, gamma, beta, as_rows(y), m, channels // vector),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
    return y


def bn_relu_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gamma and beta, from that of y: ``dz = dy where y > 0``, computed anew from x,
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``, ``dx = gamma * invstd * (dz - dbeta / M - xhat * dgamma / M)``.

    Equivalent to autograd's backward of `bn_relu_fwd`'s equation. Reads dy and x twice (sums, gradient) and writes dx
    once. dy: shape and dtype of x. dgamma and dbeta are float32, there for a missing gamma and beta too.
    """
    check_image("x", x, DTYPES)
    check_tensor("dy", dy, like=x, dtypes=(x.dtype,), shape=x.shape)
    check_affine(x, gamma, beta)
    check_statistics(x, mean, invstd)
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    m, channels = x_rows.shape
    if not x_rows.numel():
        return empty_image_like(x), *torch.zeros(2, channels, dtype=torch.float32, device=x.device)
    plan, vector = reduction(m, channels, x.dtype.itemsize), vector_hint(channels)
    partial = torch.empty(plan.parts, 2, channels, dtype=torch.float32, device=x.device)
    launch.launch(
        _bn_relu_bwd_sums_kernel,
        plan.grid,
        (dy_rows, x_rows, mean, invstd, gamma, beta, partial, m, channels // vector, plan.rows),
        VECTOR=vector,
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        num_warps=WARPS,
    )
    coefficients, dgamma, dbeta = finish_sums(partial, invstd, gamma, m)
    dx = empty_image_like(x)
    apply_backward(dy_rows, x_rows, mean, coefficients, as_rows(dx), relu=(invstd, gamma, beta))
    return dx, dgamma, dbeta


def check_affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    for name, t in (("gamma", gamma), ("beta", beta)):
        if t is not None:
            check_tensor(name, t, like=x, dtypes=DTYPES, shape=(x.shape[1],))
            if t.stride(0) != 1 and len(t) > 1:
                raise ValueError(f"{name} has stride {t.stride(0)}, want 1")


def check_statistics(x: Tensor, mean: Tensor, invstd: Tensor) -> None:
    for name, t in (("mean", mean), ("invstd", invstd)):
        check_tensor(name, t, like=x, dtypes=(torch.float32,), shape=(x.shape[1],))
        if t.stride(0) != 1 and len(t) > 1:
            raise ValueError(f"{name} has stride {t.stride(0)}, want 1")
