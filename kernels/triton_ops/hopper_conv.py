"""``[relu](conv2d(x, weight) * scale + shift [+ residual])``, 3x3, by the kernels of ``kernels/csrc/cuda/hopper``."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from resnet_fast import launch

from .configs import Layer
from .cuda_conv import counters_of
from .hopper_configs import KERNELS, HopperConfig, instance, plan, tiles

__all__ = ["conv_bn_relu", "kernel_name"]

_ALIGN = 16


def kernel_name(dtype: torch.dtype, number: int) -> str:
    """Under this name the launch seam knows a kernel."""
    return f"conv_halo_fwd_kernel<{str(dtype).removeprefix('torch.')}, {number}>"


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % _ALIGN == 0 else t.clone(memory_format=torch.preserve_format)


def conv_bn_relu(
    layer: Layer,
    config: HopperConfig,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Writes ``[relu](conv2d(x, weight) * scale + shift [+ residual])`` to ``y``; arguments as for the Triton kernel.

    ``y`` must be aligned to 16 bytes; others are copied if they are not. Split sums meet in a workspace of float32.
    """
    made = plan(layer, config)
    if made is None:
        raise RuntimeError(f"conv_bn_relu: {config} cannot compute {layer}")
    partial = counters = None
    if config.splits > 1:
        partial = torch.empty(made.partial_floats, device=x.device)
        counters = counters_of(x, made.counters)
    launch.cuda_launch(
        kernel_name(layer.dtype, instance(layer, config)),
        (made.blocks, config.splits),
        (made.threads,),
        made.shared,
        (
            *(_aligned(x), _aligned(weight), _aligned(scale), _aligned(shift)),
            *(None if residual is None else _aligned(residual), y, partial, counters),
            struct.pack(f"{len(made.args)}I", *made.args),
        ),
    )


def _launcher(tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        torch.ops.resnet_fast.conv_halo_launch(*tensors, tile, list(struct.unpack(f"{len(packed) // 4}I", packed)))

    return start


def register() -> None:
    """Tells the launch seam of the kernels that the extension holds."""
    for dtype in (torch.float16, torch.bfloat16):
        for i in range(KERNELS * len(tiles())):
            launch.gpu.register(kernel_name(dtype, i), _launcher(i // KERNELS))
