"""``max_pool2d([relu](conv2d(x, weight) * scale + shift))`` by the CUDA C++ kernel of
``kernels/csrc/cuda/stem/conv_bn_relu_pool.cuh``: the stem of a residual network and the pooling behind it in one
launch."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...ops.spec import ConvSpec
from ..layer import Gpu, Layer, gpu_of

__all__ = ["StemPlan", "conv_bn_relu_pool", "kernel_name", "kernel_of", "plan", "pooled_layer", "register"]

_ALIGN = 16
_CHANNELS = 3
_FILTERS = 64  # output channels of a block
# The poolings that kernels have, as window, stride and padding, and whether their windows overlap.
_POOLS: dict[tuple[int, ...], int] = {(2, 2, 2, 2, 0, 0): 0, (3, 3, 2, 2, 1, 1): 1}
_STRUCT = "4q20i"


def kernel_name(dtype: torch.dtype, kernel: int) -> str:
    """The kernel's name in the launch seam."""
    return f"conv_bn_relu_pool_fwd_kernel<{str(dtype).removeprefix('torch.')}, {kernel}>"


@functools.cache
def _kernels() -> dict[tuple[int, ...], int]:
    numbers = torch.ops.resnet_fast.conv_bn_relu_pool_kernels()
    return {tuple(numbers[i : i + 3]): i // 3 for i in range(0, len(numbers), 3)}


def kernel_of(layer: Layer, pool: Sequence[int]) -> int | None:
    """The number of the kernel that computes ``layer`` and max pooling by ``pool``, or None."""
    overlap = _POOLS.get(tuple(pool))
    filter_rows = layer.kernel[0]
    if (
        overlap is None
        or layer.channels != _CHANNELS
        or layer.out_channels % 16 != 0
        or layer.kernel != (filter_rows, filter_rows)
        or layer.stride != (2, 2)
        or min(layer.out_height, layer.out_width) < (1 if overlap else 2)
        or layer.residual
    ):
        return None
    simt = layer.dtype == torch.float32 and layer.precision == "ieee"
    return _kernels().get((filter_rows, overlap, int(simt)))


def pooled_layer(
    specs: tuple[ConvSpec, ...], shape: torch.Size, dtype: torch.dtype, precision: str, pool: tuple[int, ...]
) -> Layer | None:
    """The layer of the one-layer chain ``specs`` for ``x`` of ``shape``, if a kernel computes it with ``pool``; else
    None."""
    found = _layer_and_kernel(specs, shape, dtype, precision, pool)
    return None if found is None or not launch.has_cuda(kernel_name(dtype, found[1])) else found[0]


@functools.lru_cache(maxsize=1024)
def _layer_and_kernel(
    specs: tuple[ConvSpec, ...], shape: torch.Size, dtype: torch.dtype, precision: str, pool: tuple[int, ...]
) -> tuple[Layer, int] | None:
    if len(specs) != 1 or specs[0][:2] != (0, -1) or len(shape) != 4:
        return None
    (spec,) = specs
    n, c, h, w = shape
    sizes = (spec.kernel, spec.stride, spec.padding)
    layer = Layer(n, h, w, c, spec.out_channels, *sizes, dtype, precision, False, spec.relu)
    kernel = kernel_of(layer, pool)
    return None if kernel is None else (layer, kernel)


@dataclass(frozen=True)
class StemPlan:
    """A launch: its grid is ``(blocks, groups of 64 filters)``; with the kernel's argument struct."""

    blocks: int
    threads: int
    shared: int
    args: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def plan(
    layer: Layer, kernel: int, strides: tuple[int, ...], aligned: bool, gpu: Gpu, rows: int = 0, tiles: int = 0
) -> StemPlan | None:
    """The launch of a layer for an input of these strides, or None if nothing fits the GPU's shared memory.

    rows, tiles: pooled rows of a warp, and tiles of eight pooled pixels across; 0 to let a cost model choose.
    """
    args = [
        *(*strides, layer.batch, layer.height, layer.width, layer.out_channels, *layer.padding, int(layer.relu)),
        *(rows, tiles, *[0] * 11),
    ]
    numbers = torch.ops.resnet_fast.conv_bn_relu_pool_plan(
        kernel, args, layer.dtype.itemsize, aligned, gpu.multiprocessors, gpu.shared
    )
    if not numbers:
        return None
    blocks, threads, shared, *args = numbers
    return StemPlan(blocks, threads, shared, tuple(args))


def conv_bn_relu_pool(
    layer: Layer, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, pool: Sequence[int], y: Tensor
) -> None:
    """Writes ``max_pool2d([relu](conv2d(x, weight) * scale + shift))`` to ``y``.

    layer: three channels, 7x7 or 3x3 filters, stride 2. x: ``[N, 3, H, W]`` in any layout; unless it is NCHW or
    channels_last with 16-byte rows, it is read element by element. weight: ``[K, R, S, 3]``; scale, shift: float32
    ``[K]``. pool: window, stride and padding, 2x2 / 2 / 0 or 3x3 / 2 / 1. y: channels_last, ``[N, K, ...]``.

    Raises:
        RuntimeError: no kernel computes this.
    """
    kernel = kernel_of(layer, pool)
    if kernel is None:
        raise RuntimeError(f"conv_bn_relu_pool: no kernel computes {layer} and pooling by {list(pool)}")
    made = plan(layer, kernel, x.stride(), x.data_ptr() % _ALIGN == 0, gpu_of(x.device))
    if made is None:
        raise RuntimeError(f"conv_bn_relu_pool: {layer} does not fit this GPU's shared memory")
    if made.blocks == 0 or layer.out_channels == 0:
        return
    if weight.data_ptr() % _ALIGN != 0:
        weight = weight.clone()
    launch.cuda_launch(
        kernel_name(layer.dtype, kernel),
        (made.blocks, -(-layer.out_channels // _FILTERS)),
        (made.threads,),
        made.shared,
        (x, weight, scale, shift, y, struct.pack(_STRUCT, *made.args)),
    )


def _launcher(kernel: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        torch.ops.resnet_fast.conv_bn_relu_pool_launch(*tensors, kernel, grid[0], list(struct.unpack(_STRUCT, packed)))

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for (_, _, simt), kernel in _kernels().items():
            if not simt or dtype == torch.float32:
                launch.gpu.register(kernel_name(dtype, kernel), _launcher(kernel))
