"""Batch statistics on NVIDIA GPUs: mean and biased variance of each channel, in two steps of fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .arguments import as_rows, check_image
from .tiles import FINAL_C, FINAL_P, WARPS, Reduction, final_grid, reduction, vector_hint

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["M", "vectors", "rows"])
def _batch_stats_partial_kernel(
    x, partial, M, vectors, rows, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Block p: mean, less x[0], and squared deviations' sum of rows p * rows ..., to partial[p, 0 and 1, C]."""
    C = vectors * VECTOR  # so the compiler sees what divides it
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * rows
    n = tl.minimum(M - first, rows).to(tl.int32)
    # Deviations from the tensor's first row, so that a large mean is in no sum. The final kernel adds the row again.
    origin = tl.load(x + c, c < C, 0.0).to(tl.float32)[None, :]
    x += first * C
    offsets = i[:, None] * C + c[None, :]
    # Welford's recurrence in each element of the tile: should the first row be an outlier, nothing cancels either.
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, n, BLOCK_M):
        inside = (i < n - start)[:, None]
        v = tl.load(x + offsets, inside & (c < C)[None, :], 0.0).to(tl.float32) - origin
        delta = tl.where(inside, v - mean, 0.0)
        mean += delta * (1.0 / (start // BLOCK_M + 1).to(tl.float32))
        m2 += delta * (v - mean)
        x += BLOCK_M * C
    # Chan's rule joins the rows of the tile: the deviations of their means, weighted by how many values each has seen.
    count = tl.maximum((n - i + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)[:, None]
    # Their mean is added up in float64: its rounding would be of the size of the deviations, not of the result.
    joint = tl.sum((mean * count).to(tl.float64), 0) / n
    delta = tl.where(count > 0, mean - joint.to(tl.float32)[None, :], 0.0)
    m2 = tl.sum(m2 + delta * delta * count, 0)
    partial += part * 2 * C
    tl.store(partial + c, joint, c < C)
    tl.store(partial + C + c, m2.to(tl.float64), c < C)


@triton.jit(do_not_specialize=["M", "vectors", "rows", "parts"])
def _batch_stats_final_kernel(
    x,
    partial,
    mean,
    var,
    invstd,
    M,
    vectors,
    rows,
    parts,
    eps,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Joins the parts by Chan's rule, in float64: a few thousand numbers, and every rounding here is in all outputs."""
    C = vectors * VECTOR
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        v, count = _part(partial, start + p, c, M, C, rows, parts)
        total += v * count
    m = tl.sum(total, 0) / M
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        v, count = _part(partial, start + p, c, M, C, rows, parts)
        m2, count = _part(partial + C, start + p, c, M, C, rows, parts)
        delta = v - m[None, :]
        total += m2 + tl.where(count > 0, delta * delta * count, 0.0)
    v = tl.sum(total, 0) / M
    origin = tl.load(x + c, c < C, 0.0).to(tl.float64)
    tl.store(mean + c, (m + origin).to(tl.float32), c < C)
    tl.store(var + c, v.to(tl.float32), c < C)
    tl.store(invstd + c, (1.0 / tl.sqrt(v + eps)).to(tl.float32), c < C)


@triton.jit
def _part(partial, p, c, M, C, rows, parts):
    """A tile of the partial results and how many rows each part has."""
    inside = (p < parts)[:, None] & (c < C)[None, :]
    count = tl.minimum(tl.maximum(M - p.to(tl.int64) * rows, 0), rows).to(tl.float64)
    return tl.load(partial + p[:, None] * (2 * C) + c[None, :], inside, 0.0), count[:, None]


def batch_stats(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """``mean, var = E[x], E[(x - mean)^2]`` and ``invstd = 1 / sqrt(var + eps)`` over N, H, W: float32 [C].

    Equivalent to ``torch.var_mean(x.float(), (0, 2, 3), correction=0)``. Reads x once.

    x: [N, C, H, W]; float16, bfloat16, float32; channels_last, else it is copied to that. The order of every sum
    depends on the shape alone, so results are the same bits each time. Of no values, mean and variance are 0.
    Raises TypeError and ValueError.

    Source: Welford 1962; Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    check_image("x", x, DTYPES)
    return stats_of_rows(as_rows(x), eps)


def stats_of_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_stats`, of a dense [M, C] tensor."""
    m, channels = rows.shape
    if not m:
        zeros = torch.zeros(2, channels, dtype=torch.float32, device=rows.device)
        return zeros[0], zeros[1], torch.full_like(zeros[0], eps**-0.5 if eps else torch.inf)
    mean, var, invstd = (torch.empty(channels, dtype=torch.float32, device=rows.device) for _ in range(3))
    partial, plan = partial_stats(rows)
    vector = vector_hint(channels)
    launch.launch(
        _batch_stats_final_kernel,
        final_grid(channels),
        (rows, partial, mean, var, invstd, m, channels // vector, plan.rows, plan.parts, eps),
        VECTOR=vector,
        BLOCK_P=FINAL_P,
        BLOCK_C=FINAL_C,
        num_warps=WARPS,
    )
    return mean, var, invstd


def partial_stats(rows: Tensor) -> tuple[Tensor, Reduction]:
    """The first step, of [M, C] with M >= 1: float64 [parts, 2, C], mean less the first row, and squared deviations."""
    m, channels = rows.shape
    plan, vector = reduction(m, channels, rows.dtype.itemsize), vector_hint(channels)
    partial = torch.empty(plan.parts, 2, channels, dtype=torch.float64, device=rows.device)
    launch.launch(
        _batch_stats_partial_kernel,
        plan.grid,
        (rows, partial, m, channels // vector, plan.rows),
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        VECTOR=vector,
        num_warps=WARPS,
    )
    return partial, plan
