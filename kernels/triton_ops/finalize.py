"""The second step of batch norm's sums on NVIDIA GPUs, and all that follows from them for a channel, in one launch.

    stats       mean and variance from parts of the pixels; scale and shift; running statistics
    affine      scale and shift of statistics that are given
    gradients   coefficients of the gradient of the convolution's output; gradients of gamma, beta and the bias

Parts are joined in fixed order in float64: a few thousand numbers, and every rounding here is in all outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .batch_stats import _part
from .tiles import FINAL_C, FINAL_P, WARPS, final_grid

__all__ = ["Stats", "affine", "gradients", "stats"]


class Stats(NamedTuple):
    """First step of mean and variance."""

    partial: Tensor  # [parts, 2, C]: mean, and squared deviations from it
    pixels: int
    rows: int  # pixels of each part but the last
    origin: Tensor | None  # [pixels, C]: its first row was taken from all values, if it is given


@triton.jit
def _store_affine(affine, mean, var, gamma, beta, eps, c, C):
    """[scale; shift], from mean and variance as they were stored: float32."""
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
def _stats_final_kernel(
    partial,
    origin,
    gamma,
    beta,
    moments,
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
    """Joins the parts by Chan's rule."""
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
    var = (tl.sum(total, 0) / M).to(tl.float32)
    if origin is not None:
        m += tl.load(origin + c, c < C, 0.0).to(tl.float64)
    mean = m.to(tl.float32)
    tl.store(moments + c, mean, c < C)
    tl.store(moments + C + c, var, c < C)
    if affine is not None:
        _store_affine(affine, mean, var, gamma, beta, eps, c, C)
    if running_mean is not None:
        share = tl.load(momentum)
        mean_before = tl.load(running_mean + c, c < C, 0.0)
        var_before = tl.load(running_var + c, c < C, 0.0)
        # Each warp has all channels, and reads them; one of them writes.
        tl.debug_barrier()
        tl.store(running_mean + c, mean_before * (1.0 - share) + mean * share, c < C)
        tl.store(running_var + c, var_before * (1.0 - share) + var * unbiased * share, c < C)
        if tl.program_id(0) == 0:
            before = tl.load(batches)
            tl.debug_barrier()
            tl.store(batches, before + 1)


@triton.jit(do_not_specialize=["C"])
def _affine_kernel(mean, var, gamma, beta, moments, affine, C, eps, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.load(mean + c, c < C, 0.0).to(tl.float32)
    v = tl.load(var + c, c < C, 1.0).to(tl.float32)
    tl.store(moments + c, m, c < C)
    tl.store(moments + C + c, v, c < C)
    _store_affine(affine, m, v, gamma, beta, eps, c, C)


@triton.jit(do_not_specialize=["M", "C", "parts"])
def _gradients_final_kernel(
    partial,
    moments,
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
    """From the parts' sums of g, and in ROW of g * (y - mean). BATCH: the statistics were the batch's own."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    sum_gy = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        inside = (start + p < parts)[:, None] & (c < C)[None, :]
        offsets = (start + p)[:, None].to(tl.int64) * (ROWS * C) + c[None, :]
        sum_g += tl.load(partial + offsets, inside, 0.0).to(tl.float64)
        if ROW < ROWS:
            sum_gy += tl.load(partial + ROW * C + offsets, inside, 0.0).to(tl.float64)
    of_g = tl.sum(sum_g, 0)
    of_gy = tl.sum(sum_gy, 0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    inv_std = tl.full((BLOCK_C,), 1.0, tl.float64)
    if moments is not None:
        mean = tl.load(moments + c, c < C, 0.0)
        inv_std = 1.0 / tl.sqrt(tl.load(moments + C + c, c < C, 1.0).to(tl.float64) + eps)
    a = inv_std
    if gamma is not None:
        a *= tl.load(gamma + c, c < C, 0.0).to(tl.float64)
    b = tl.zeros_like(a)
    constant = tl.zeros_like(a)
    of_bias = of_g * a
    if BATCH:
        b = -a * inv_std * inv_std * of_gy / M
        constant = -a * of_g / M
        of_bias = tl.zeros_like(a)  # the mean moves along
    tl.store(coefficients + c, a.to(tl.float32), c < C)
    tl.store(coefficients + C + c, b.to(tl.float32), c < C)
    tl.store(coefficients + 2 * C + c, constant.to(tl.float32), c < C)
    tl.store(coefficients + 3 * C + c, mean, c < C)
    if dbias is not None:
        tl.store(dbias + c, of_bias.to(dbias.dtype.element_ty), c < C)
    if dgamma is not None:
        tl.store(dgamma + c, (of_gy * inv_std).to(dgamma.dtype.element_ty), c < C)
    if dbeta is not None:
        tl.store(dbeta + c, of_g.to(dbeta.dtype.element_ty), c < C)


def _rows(count: int, like: Tensor, channels: int) -> Tensor:
    return torch.empty(count, channels, dtype=torch.float32, device=like.device)


def stats(
    found: Stats,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
    running: Any | None = None,
) -> tuple[Tensor, Tensor | None]:
    """float32 ``[mean; variance]``, and ``[scale; shift]`` of batch norm by them where ``eps`` is given.

    ``running`` is updated as ``nn.BatchNorm2d`` does it: the variance there is the unbiased one.
    """
    partial, pixels, rows, origin = found
    parts, _, channels = partial.shape
    moments = _rows(2, partial, channels)
    affine = None if eps is None else _rows(2, partial, channels)
    unbiased = pixels / (pixels - 1) if running is not None else 1.0
    launch.launch(
        _stats_final_kernel,
        final_grid(channels),
        (
            *(partial, origin, gamma, beta, moments, affine, *(running or (None,) * 4)),
            *(pixels, channels, rows, parts, eps or 0.0, unbiased),
        ),
        BLOCK_P=FINAL_P,
        BLOCK_C=FINAL_C,
        num_warps=WARPS,
    )
    return moments, affine


def affine(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`stats`, for statistics that are given."""
    channels = mean.numel()
    moments, found = _rows(2, mean, channels), _rows(2, mean, channels)
    launch.launch(
        _affine_kernel,
        final_grid(channels),
        (mean, var, gamma, beta, moments, found, channels, eps),
        BLOCK_C=FINAL_C,
        num_warps=1,
    )
    return moments, found


def gradients(
    partial: Tensor,
    row: int,
    pixels: int,
    moments: Tensor | None,
    eps: float,
    batch: bool,
    gamma: Tensor | None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """``[a; b; constant; mean]`` of ``dy = a * g + b * (y - mean) + constant``, float32.

    partial: ``[parts, rows, C]``, sums of g in row 0 and of g * (y - mean) in ``row``. batch: whether the statistics
    were the batch's own; given ones have neither b nor constant. moments: None without batch norm. into: the gradients
    of bias, gamma and beta, written in their dtypes, or None.
    """
    parts, rows, channels = partial.shape
    coefficients = _rows(4, partial, channels)
    launch.launch(
        _gradients_final_kernel,
        final_grid(channels),
        (partial, moments, gamma, coefficients, *into, pixels, channels, parts, eps),
        ROWS=rows,
        ROW=row,
        BATCH=batch,
        BLOCK_P=FINAL_P,
        BLOCK_C=FINAL_C,
        num_warps=WARPS,
    )
    return coefficients
