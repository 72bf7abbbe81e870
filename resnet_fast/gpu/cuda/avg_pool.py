"""``flatten(avg_pool2d(x, kernel, stride), 1)`` by the CUDA C++ kernel of
``kernels/csrc/cuda/avg_pool_flatten.cuh``: the pooling before a classifier, without a copy to flatten it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import launch

__all__ = ["avg_pool_flatten", "kernel_name", "register", "suits"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACKS = 8
_THREADS = 256
_STRUCT = "10i"


def kernel_name(dtype: torch.dtype) -> str:
    """The kernel's name in the launch seam."""
    return f"avg_pool_flatten_fwd_kernel<{str(dtype).removeprefix('torch.')}, 0>"


def suits(x: Tensor) -> bool:
    """Whether the kernel takes ``x``: four dimensions, dense channels_last, aligned pixels of whole 16 bytes."""
    return (
        x.dim() == 4
        and x.dtype in DTYPES
        and x.shape[1] * x.dtype.itemsize % 16 == 0
        and x.numel() > 0
        and x.stride() == _strides(x.shape)
        and x.data_ptr() % 16 == 0
        and launch.has_cuda(kernel_name(x.dtype))
    )


def _strides(shape: torch.Size) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    return (c * h * w, 1, c * w, c)


def avg_pool_flatten(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """``torch.flatten(F.avg_pool2d(x, kernel, stride), 1)``, for ``x`` that :func:`suits`.

    ``[N, C, H, W] -> [N, C * ceil((H - kernel[0] + 1) / stride[0]) * ...]``, same dtype, float32 accumulators.
    """
    n, c, h, w = x.shape
    for size, k, s in zip((h, w), kernel, stride, strict=True):
        if not (1 <= k <= size and s >= 1):
            raise ValueError(
                f"kernel is {list(kernel)} and stride {list(stride)} in images of {h} x {w}, want a kernel that fits"
            )
    out = [(size - k) // s + 1 for size, k, s in zip((h, w), kernel, stride, strict=True)]
    y = x.new_empty((n, c * out[0] * out[1]))
    chunks = -(-c * x.dtype.itemsize // (16 * _PACKS))
    args = struct.pack(_STRUCT, c, h, w, *kernel, *stride, *out, chunks)
    launch.cuda_launch(kernel_name(x.dtype), (n * chunks,), (_THREADS,), 0, (x, y, args))
    return y


def _start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
    x, y, packed = args
    fields = struct.unpack(_STRUCT, packed)
    torch.ops.resnet_fast.avg_pool_flatten_launch(x, y, fields[3:5], fields[5:7])


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for dtype in DTYPES:
        launch.gpu.register(kernel_name(dtype), _start)
