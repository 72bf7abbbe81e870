"""``[relu](conv2d(x, weight) * scale + shift [+ residual])`` by the CUDA C++ kernels of ``kernels/csrc/cuda``."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from resnet_fast import launch

from .configs import Layer
from .cuda_configs import CudaConfig, plan, tiles

__all__ = ["conv_bn_relu", "kernel_name"]

_ALIGN = 16


def kernel_name(dtype: torch.dtype, tile: int) -> str:
    """Under this name the launch seam knows a kernel."""
    return f"conv_bn_relu_fwd_kernel<{str(dtype).removeprefix('torch.')}, {tile}>"


def _aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % _ALIGN == 0 for t in tensors)


def conv_bn_relu(
    layer: Layer,
    config: CudaConfig,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Writes ``[relu](conv2d(x, weight) * scale + shift [+ residual])`` to ``y``; arguments as for the Triton kernel.

    Split sums meet in a workspace of float32, whose counters are zeroed first.
    """
    # Tiles that copy 16 bytes at a time need them aligned; slices that are not get a copy that is.
    if not _aligned(x) and tiles()[config.tile].load != "mixed":
        x = x.clone(memory_format=torch.channels_last)
    if not _aligned(weight) and tiles()[config.tile].load != "mixed":
        weight = weight.clone()
    made = plan(layer, config, _aligned(x, weight), _aligned(residual, y))
    if made is None:
        raise RuntimeError(f"conv_bn_relu: {config} cannot compute {layer}")
    partial = counters = None
    if config.splits > 1:
        partial = torch.empty(made.partial_floats, device=x.device)
        counters = torch.zeros(made.counters, dtype=torch.int32, device=x.device)
    launch.cuda_launch(
        kernel_name(layer.dtype, config.tile),
        (made.blocks, config.splits),
        (made.threads,),
        made.shared,
        (x, weight, scale, shift, residual, y, partial, counters, struct.pack(f"{len(made.args)}i", *made.args)),
    )


def _launcher(tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        torch.ops.resnet_fast.conv_bn_relu_launch(*tensors, tile, list(struct.unpack(f"{len(packed) // 4}i", packed)))

    return start


def register() -> None:
    """Tells the launch seam of the kernels that the extension holds."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for i, tile in enumerate(tiles()):
            if not tile.plain or dtype == torch.float32:
                launch.gpu.register(kernel_name(dtype, i), _launcher(i))
