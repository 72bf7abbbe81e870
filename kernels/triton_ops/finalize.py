"""Partial sums of batch norm, finalized on NVIDIA GPUs: one launch gives all that follows from them for a channel.

    finalize_stats       mean and variance of partial statistics; scale and shift; running statistics
    finalize_affine      scale and shift of statistics that are given
    finalize_gradients   coefficients of the gradient of the convolution's output; gradients of gamma, beta and the bias
    finalize_sums        the sums alone

Partial sums are added in fixed order in float64: a few thousand numbers, and every rounding here is in all outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import WARPS, cdiv

__all__ = ["PartialStats", "finalize_affine", "finalize_gradients", "finalize_stats", "finalize_sums"]

# Channels and parts of a tile: 16 floats are two sectors, and 64 parts keep four warps busy with whole vectors.
BLOCK_C = 16
BLOCK_P = 64


class PartialStats(NamedTuple):
    """Mean and squared deviations of parts of the pixels."""

    partial: Tensor  # [parts, 2, C]: mean, and squared deviations from it
    pixels: int
    rows: int  # pixels of each part but the last
    origin: Tensor | None  # [pixels, C]: its first row was subtracted from all values, if it is given


@triton.jit
def _part(partial, p, c, M, C, rows, parts):
    """A tile of partial statistics, and how many rows each part has."""
    inside = (p < parts)[:, None] & (c < C)[None, :]
    count = tl.minimum(tl.maximum(M - p.to(tl.int64) * rows, 0), rows).to(tl.float64)
    return tl.load(partial + p[:, None] * (2 * C) + c[None, :], inside, 0.0), count[:, None]


@triton.jit
def _store_affine(affine, mean, var, gamma, beta, eps, c, C):
    """Stores [scale; shift], of mean and variance as they were stored: float32."""
    scale = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
    if gamma is not None:
        scale *= tl.load(gamma + c, c < C, 0.0).to(tl.float64)
    scale = scale.to(tl.float32)
    shift = -mean.to(tl.float64) * scale
    if beta is not None:
        shift += tl.load(beta + c, c < C, 0.0).to(tl.float64)
    tl.store(affine + c, scale, c < C)
    tl.store(affine + C + c, shift.to(tl.float32), c < C)


@triton.jit(do_not_specialize=["momentum", "M", "C", "rows", "parts"])
def _finalize_stats_kernel(
    partial,
    origin,
    gamma,
    beta,
    stats,
    affine,
    running_mean,
    running_var,
    momentum,
    batches,
    M,
    C,
    rows,
    parts,
    eps,
    unbiased,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Joins the parts by Chan's rule (Chan, Golub, LeVeque 1983, eq. 2.1)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        v, count = _part(partial, start + p, c, M, C, rows, parts)
        acc += v * count
    m = tl.sum(acc, 0) / M
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        v, count = _part(partial, start + p, c, M, C, rows, parts)
        m2, count = _part(partial + C, start + p, c, M, C, rows, parts)
        delta = v - m[None, :]
        acc += m2 + tl.where(count > 0, delta * delta * count, 0.0)
    var = (tl.sum(acc, 0) / M).to(tl.float32)
    if origin is not None:
        m += tl.load(origin + c, c < C, 0.0).to(tl.float64)
    mean = m.to(tl.float32)
    tl.store(stats + c, mean, c < C)
    tl.store(stats + C + c, var, c < C)
    if affine is not None:
        _store_affine(affine, mean, var, gamma, beta, eps, c, C)
    if running_mean is not None:
        share = tl.load(momentum)
        mean_before = tl.load(running_mean + c, c < C, 0.0)
        var_before = tl.load(running_var + c, c < C, 0.0)
        # All warps hold all channels and read them, then one warp writes them.
        tl.debug_barrier()
        tl.store(running_mean + c, mean_before * (1.0 - share) + mean * share, c < C)
        tl.store(running_var + c, var_before * (1.0 - share) + var * unbiased * share, c < C)
        if tl.program_id(0) == 0:
            before = tl.load(batches)
            tl.debug_barrier()
            tl.store(batches, before + 1)


@triton.jit(do_not_specialize=["C"])
def _finalize_affine_kernel(mean, var, gamma, beta, stats, affine, C, eps, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.load(mean + c, c < C, 0.0).to(tl.float32)
    v = tl.load(var + c, c < C, 1.0).to(tl.float32)
    tl.store(stats + c, m, c < C)
    tl.store(stats + C + c, v, c < C)
    _store_affine(affine, m, v, gamma, beta, eps, c, C)


@triton.jit(do_not_specialize=["M", "C", "parts"])
def _finalize_gradients_kernel(
    partial,
    stats,
    gamma,
    coefficients,
    dbias,
    dgamma,
    dbeta,
    M,
    C,
    parts,
    eps,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From partial sums of g in row 0 and of g * (y - mean) in ROW. BATCH: the statistics are the batch's own."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    acc_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    acc_gy = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        inside = (start + p < parts)[:, None] & (c < C)[None, :]
        offsets = (start + p)[:, None].to(tl.int64) * (ROWS * C) + c[None, :]
        acc_g += tl.load(partial + offsets, inside, 0.0).to(tl.float64)
        if ROW < ROWS:
            acc_gy += tl.load(partial + ROW * C + offsets, inside, 0.0).to(tl.float64)
    total_g = tl.sum(acc_g, 0)
    total_gy = tl.sum(acc_gy, 0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    inv_std = tl.full((BLOCK_C,), 1.0, tl.float64)
    if stats is not None:
        mean = tl.load(stats + c, c < C, 0.0)
        inv_std = 1.0 / tl.sqrt(tl.load(stats + C + c, c < C, 1.0).to(tl.float64) + eps)
    a = inv_std
    if gamma is not None:
        a *= tl.load(gamma + c, c < C, 0.0).to(tl.float64)
    b = tl.zeros_like(a)
    constant = tl.zeros_like(a)
    bias_gradient = total_g * a
    if BATCH:
        b = -a * inv_std * inv_std * total_gy / M
        constant = -a * total_g / M
        bias_gradient = tl.zeros_like(a)  # batch norm subtracts the mean, and the bias with it
    tl.store(coefficients + c, a.to(tl.float32), c < C)
    tl.store(coefficients + C + c, b.to(tl.float32), c < C)
    tl.store(coefficients + 2 * C + c, constant.to(tl.float32), c < C)
    tl.store(coefficients + 3 * C + c, mean, c < C)
    if dbias is not None:
        tl.store(dbias + c, bias_gradient.to(dbias.dtype.element_ty), c < C)
    if dgamma is not None:
        tl.store(dgamma + c, (total_gy * inv_std).to(dgamma.dtype.element_ty), c < C)
    if dbeta is not None:
        tl.store(dbeta + c, total_g.to(dbeta.dtype.element_ty), c < C)


@triton.jit(do_not_specialize=["C", "parts"])
def _finalize_sums_kernel(partial, sums, C, parts, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row r of [3, C] is the sum of the parts' rows r; rows from ROWS on are zero."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    for row in tl.static_range(3):
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
        if row < ROWS:
            for start in range(0, parts, BLOCK_P):
                inside = (start + p < parts)[:, None] & (c < C)[None, :]
                offsets = (start + p)[:, None].to(tl.int64) * (ROWS * C) + (row * C + c)[None, :]
                acc += tl.load(partial + offsets, inside, 0.0).to(tl.float64)
        tl.store(sums + row * C + c, tl.sum(acc, 0).to(tl.float32), c < C)


def _grid(channels: int) -> tuple[int]:
    return (cdiv(channels, BLOCK_C),)


def _rows(count: int, like: Tensor, channels: int) -> Tensor:
    return torch.empty(count, channels, dtype=torch.float32, device=like.device)


def finalize_stats(
    partial_stats: PartialStats,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
    running: Any | None = None,
) -> tuple[Tensor, Tensor | None]:
    """float32 ``[mean; variance]``, and ``[scale; shift]`` of batch norm by them where ``eps`` is given.

    Updates ``running`` as ``nn.BatchNorm2d`` does, by the unbiased variance.
    """
    partial, pixels, rows, origin = partial_stats
    parts, _, channels = partial.shape
    stats = _rows(2, partial, channels)
    affine = None if eps is None else _rows(2, partial, channels)
    unbiased = pixels / (pixels - 1) if running is not None else 1.0
    launch.launch(
        _finalize_stats_kernel,
        _grid(channels),
        (
            *(partial, origin, gamma, beta, stats, affine, *(running or (None,) * 4)),
            *(pixels, channels, rows, parts, eps or 0.0, unbiased),
        ),
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=WARPS,
    )
    return stats, affine


def finalize_affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As :func:`finalize_stats`, for statistics that are given."""
    channels = mean.numel()
    stats, affine = _rows(2, mean, channels), _rows(2, mean, channels)
    launch.launch(
        _finalize_affine_kernel,
        _grid(channels),
        (mean, var, gamma, beta, stats, affine, channels, eps),
        BLOCK_C=BLOCK_C,
        num_warps=1,
    )
    return stats, affine


def finalize_gradients(
    partial: Tensor,
    row: int,
    pixels: int,
    stats: Tensor | None,
    eps: float,
    batch: bool,
    gamma: Tensor | None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """``[a; b; constant; mean]`` of ``dy = a * g + b * (y - mean) + constant``, float32.

    partial: ``[parts, rows, C]``, partial sums of g in row 0 and of g * (y - mean) in ``row``. batch: whether the
    statistics are the batch's own; for given ones b and constant are zero. stats: None without batch norm. into: where
    the gradients of bias, gamma and beta are written, in their dtypes, or None.
    """
    parts, rows, channels = partial.shape
    coefficients = _rows(4, partial, channels)
    launch.launch(
        _finalize_gradients_kernel,
        _grid(channels),
        (partial, stats, gamma, coefficients, *into, pixels, channels, parts, eps),
        ROWS=rows,
        ROW=row,
        BATCH=batch,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=WARPS,
    )
    return coefficients


def finalize_sums(partial: Tensor) -> Tensor:
    """float32 ``[3, C]`` from partial sums ``[parts, 1 to 3, C]``."""
    parts, rows, channels = partial.shape
    sums = _rows(3, partial, channels)
    launch.launch(
        _finalize_sums_kernel,
        _grid(channels),
        (partial, sums, channels, parts),
        ROWS=rows,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=WARPS,
    )
    return sums
