"""Batch statistics of an activation that is in memory: one pass over its rows, NVIDIA GPUs.

A block gives mean and squared deviations of its rows; :func:`.finalize.finalize_stats` joins the blocks. The order of
every sum depends on the shape alone, so results are the same bits each time.

Source: Welford 1962; Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .finalize import PartialStats
from .tiles import WARPS, reduction, vector_hint


@triton.jit(do_not_specialize=["M", "vectors", "rows"])
def _batch_stats_kernel(
    x, partial, M, vectors, rows, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Block p: mean, less x[0], and sum of squared deviations of rows p * rows ..., to partial[p, 0 and 1, C]."""
    C = vectors * VECTOR  # the compiler sees what divides it
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * rows
    n = tl.minimum(M - first, rows).to(tl.int32)
    # Deviations from the tensor's first row keep a large mean out of all sums. finalize_stats adds the row again.
    origin = tl.load(x + c, c < C, 0.0).to(tl.float32)[None, :]
    x += first * C
    offsets = i[:, None] * C + c[None, :]
    # Welford's recurrence in each element of the tile: nothing cancels even if the first row is an outlier.
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


def batch_stats(rows: Tensor) -> PartialStats:
    """Partial statistics of dense rows [M, C], M >= 1, in float64; the first row is subtracted from the means."""
    m, channels = rows.shape
    plan, vector = reduction(m, channels, rows.dtype.itemsize), vector_hint(channels)
    partial = torch.empty(plan.parts, 2, channels, dtype=torch.float64, device=rows.device)
    launch.launch(
        _batch_stats_kernel,
        plan.grid,
        (rows, partial, m, channels // vector, plan.rows),
        BLOCK_M=plan.block_m,
        BLOCK_C=plan.block_c,
        VECTOR=vector,
        num_warps=WARPS,
    )
    return PartialStats(partial, m, plan.rows, rows)
