"""bn_relu and bn_add_relu by the CUDA C++ kernels of ``kernels/csrc/cuda/batch_norm.cuh``: the same functions as those
of :mod:`.bn_relu` and :mod:`.bn_add_relu`, with the same arguments, results and errors."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from resnet_fast import launch

from .arguments import as_rows, check_image, check_tensor, empty_image_like
from .batch_stats import DTYPES
from .bn_add_relu import mask_shape
from .bn_relu import check_affine, check_statistics

__all__ = ["batch_stats", "bn_add_relu_bwd", "bn_add_relu_fwd", "bn_relu_bwd", "bn_relu_fwd"]

THREADS = 256
# By their numbers in batch_norm.cu.
KERNELS = (
    *("bn_stats_partial", "bn_stats_final", "bn_apply", "bn_apply_add"),
    *("bn_backward_sums", "bn_backward_sums_add", "bn_backward_final", "bn_backward_apply", "bn_backward_apply_relu"),
)


@functools.lru_cache(maxsize=4096)
def plan(rows: int, channels: int) -> tuple[int, int, int, int, int, int]:
    """Threads side by side; blocks for rows and channels; parts of a sum, rows of a part; blocks of the second step."""
    return tuple(torch.ops.resnet_fast.batch_norm_plan(rows, channels))


def _launch(name: str, rows: Tensor, grid: tuple[int, int], images: tuple[Tensor, ...], rest: Any, eps: float) -> None:
    """images: those that are read or written eight channels at a time, first among the parameters or not."""
    m, channels = rows.shape
    across, _, _, parts, part_rows, _ = plan(m, channels)
    vector = channels % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in images)
    packed = struct.pack("qqiiif", m, part_rows, channels, parts, across, eps)
    dtype = str(rest[0].dtype).removeprefix("torch.")
    launch.cuda_launch(f"{name}<{dtype}, {int(vector)}>", grid, (THREADS,), 0, (*rest, packed))


def _start(name: str, vector: bool) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        m, part_rows, channels, parts, across, eps = struct.unpack("qqiiif", packed)
        empty = tensors[0].new_empty(0)
        torch.ops.resnet_fast.batch_norm_launch(
            KERNELS.index(name),
            vector,
            [empty if t is None else t for t in tensors],
            list(grid),
            [m, part_rows, channels, parts, across],
            eps,
        )

    return start


def register() -> None:
    """Tells the launch seam of the kernels that the extension holds."""
    for name in KERNELS:
        for dtype in DTYPES:
            for vector in (False, True):
                key = f"{name}<{str(dtype).removeprefix('torch.')}, {int(vector)}>"
                launch.gpu.register(key, _start(name, vector))


def batch_stats(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.batch_stats.batch_stats`: mean, biased variance and ``1 / sqrt(var + eps)``, float32 ``[C]``."""
    check_image("x", x, DTYPES)
    return _stats(as_rows(x), eps)


def _stats(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    m, channels = rows.shape
    mean, var, invstd = torch.zeros(3, channels, dtype=torch.float32, device=rows.device)
    if not rows.numel():
        return mean, var, invstd.fill_(eps**-0.5 if eps else torch.inf)
    _, _, channel_blocks, parts, _, final_blocks = plan(m, channels)
    partial = torch.empty(parts, 2, channels, dtype=torch.float64, device=rows.device)
    _launch("bn_stats_partial", rows, (parts, channel_blocks), (rows,), (rows, partial), eps)
    _launch("bn_stats_final", rows, (final_blocks, 1), (rows,), (rows, partial, mean, var, invstd), eps)
    return mean, var, invstd


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def bn_relu_fwd(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.bn_relu.bn_relu_fwd`: ``relu(batch_norm(x))`` and its mean, variance and invstd."""
    y, _, *statistics = _forward(x, None, gamma, beta, eps)
    return (y, *statistics)


def bn_add_relu_fwd(
    x: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.bn_add_relu.bn_add_relu_fwd`: ``relu(batch_norm(x) + residual)``, its statistics and its bit mask."""
    y, mask, *statistics = _forward(x, residual, gamma, beta, eps)
    return (y, *statistics, mask)


def _forward(x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    check_image("x", x, DTYPES)
    check_affine(x, gamma, beta)
    if residual is not None:
        check_tensor("residual", residual, like=x, dtypes=(x.dtype,), shape=x.shape)
    rows, y = as_rows(x), empty_image_like(x)
    mean, var, invstd = _stats(rows, eps)
    mask = None if residual is None else torch.empty(mask_shape(x), dtype=torch.uint8, device=x.device)
    if rows.numel():
        added = None if residual is None else as_rows(residual)
        _, row_blocks, channel_blocks, *_ = plan(*rows.shape)
        images = tuple(t for t in (rows, added, as_rows(y)) if t is not None)
        parameters = (rows, added, mean, invstd, _float(gamma), _float(beta), as_rows(y), mask)
        name = "bn_apply" if residual is None else "bn_apply_add"
        _launch(name, rows, (row_blocks, channel_blocks), images, parameters, eps)
    return y, mask, mean, var, invstd


def bn_relu_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.bn_relu.bn_relu_bwd`: the gradients of x, gamma and beta."""
    dx, _, dgamma, dbeta = _backward(dy, x, None, mean, invstd, gamma, beta)
    return dx, dgamma, dbeta


def bn_add_relu_bwd(
    dy: Tensor, x: Tensor, mask: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.bn_add_relu.bn_add_relu_bwd`: the gradients of x, residual, gamma and beta."""
    check_tensor("mask", mask, like=x, dtypes=(torch.uint8,), shape=mask_shape(x))
    return _backward(dy, x, mask.contiguous(), mean, invstd, gamma, None)


def _backward(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Any:
    check_image("x", x, DTYPES)
    check_tensor("dy", dy, like=x, dtypes=(x.dtype,), shape=x.shape)
    check_affine(x, gamma, beta)
    check_statistics(x, mean, invstd)
    rows, dy_rows, dx = as_rows(x), as_rows(dy), empty_image_like(x)
    m, channels = rows.shape
    dz = None if mask is None else empty_image_like(x)
    dgamma, dbeta = torch.zeros(2, channels, dtype=torch.float32, device=x.device)
    if not rows.numel():
        return dx, dz, dgamma, dbeta
    gamma, beta = _float(gamma), _float(beta)
    _, row_blocks, channel_blocks, parts, _, final_blocks = plan(m, channels)
    partial = torch.empty(parts, 2, channels, dtype=torch.float32, device=x.device)
    dz_rows = None if dz is None else as_rows(dz)
    images = tuple(t for t in (rows, dy_rows, dz_rows, as_rows(dx)) if t is not None)
    _launch(
        "bn_backward_sums" if mask is None else "bn_backward_sums_add",
        *(rows, (parts, channel_blocks), images),
        (dy_rows, rows, mask, mean, invstd, gamma, beta, dz_rows, partial),
        0.0,
    )
    coefficients = torch.empty(3, channels, dtype=torch.float32, device=x.device)
    final = (partial, invstd, gamma, coefficients, dgamma, dbeta)
    _launch("bn_backward_final", rows, (final_blocks, 1), (), final, 0.0)
    _launch(
        "bn_backward_apply_relu" if mask is None else "bn_backward_apply",
        *(rows, (row_blocks, channel_blocks), images),
        (dy_rows if dz_rows is None else dz_rows, rows, mean, coefficients, invstd, gamma, beta, as_rows(dx)),
        0.0,
    )
    return dx, dz, dgamma, dbeta
