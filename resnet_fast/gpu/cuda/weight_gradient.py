"""The weight gradient of 3x3 convolutions by the kernels of ``kernels/csrc/cuda/hopper``."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from ...backends import launch
from ..candidates.weight_gradient import GradientConfig, plan, tiles
from ..layer import Layer
from .hopper import small_integers

__all__ = ["kernel_name", "verify", "weight_gradient"]


def kernel_name(dtype: torch.dtype, tile: int) -> str:
    """The kernel's name in the launch seam."""
    return f"weight_gradient_kernel<{str(dtype).removeprefix('torch.')}, {tile}>"


def weight_gradient(
    layer: Layer,
    config: GradientConfig,
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    dw: Tensor,
) -> None:
    """Writes dw, ``[K, C, 3, 3]`` in any layout: ``sum over p of dy[p] * activation[p * stride - 1 + tap]``.

    ``dy = a * grad + b * (y - mean) + constant`` or ``grad``, ``activation = [relu](scale * x + shift)``, both rounded
    to the dtype of x. Images are ``[N, C, H, W]`` in channels_last; those that are not aligned to 16 bytes are copied.
    Blocks share the pixels; their float32 sums are added in fixed order.
    """
    from ..._triton.conv_backward import reduce_split_k

    made = plan(layer, config, scale_shift is not None, coefficients is not None)
    if made is None:
        raise RuntimeError(f"weight_gradient: {config} cannot compute {layer}")
    partial = torch.empty(config.splits, dw.numel(), dtype=torch.float32, device=x.device)
    operands = [None if t is None else launch.aligned(t) for t in (grad, y, coefficients, x, scale_shift)]
    launch.cuda_launch(
        kernel_name(layer.dtype, config.gradient),
        (made.blocks, config.splits),
        (made.threads,),
        made.shared,
        (*operands, partial, struct.pack(f"{len(made.args)}I", *made.args)),
    )
    reduce_split_k(partial, dw)


@functools.cache
def verify(layer: Layer, config: GradientConfig, device: torch.device) -> None:
    """Raises RuntimeError unless ``config`` computes ``layer`` exactly on small integers, whose sums are exact.

    Runs once for each, before a measurement: no GPU has run these kernels in a release's tests.
    """

    whole = small_integers(device, layer.dtype)

    def image(channels: int, height: int, width: int) -> Tensor:
        return whole(2, layer.batch, height, width, channels).permute(0, 3, 1, 2)

    def rows(t: Tensor) -> Tensor:
        return t.double()[:, :, None, None]

    k, c = layer.out_channels, layer.channels
    grad, y = (image(k, layer.out_height, layer.out_width) for _ in range(2))
    x = image(c, layer.height, layer.width)
    coefficients, scale_shift = whole(1, 4, k, dtype=torch.float32), whole(1, 2, c, dtype=torch.float32)
    if layer.pixels > 2**21:
        # b * (y - mean) + constant is zero in the mean: sums over all pixels stay below 2^24, and so exact.
        coefficients[2] = coefficients[1] * coefficients[3]
    dw = torch.empty(k, c, 3, 3, dtype=torch.float32, device=device)
    weight_gradient(layer, config, grad, y, coefficients, x, scale_shift, dw)
    a, b, constant, mean = rows(coefficients)
    scale, shift = rows(scale_shift)
    dy, activation = a * grad + b * (y - mean) + constant, scale * x + shift
    operands = (dy, activation.relu() if layer.relu else activation, torch.zeros_like(dw, dtype=torch.float64), None)
    geometry = (*map(list, (layer.stride, layer.padding)), [1, 1], False, [0, 0], 1, [False, True, False])
    exact = torch.ops.aten.convolution_backward(*operands, *geometry)[1]
    if not torch.equal(dw, exact.float()):
        raise RuntimeError(f"{config} computes {layer} wrongly on {device}")


def _launcher(tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        torch.ops.resnet_fast.weight_gradient_launch(
            *tensors, tile, list(struct.unpack(f"{len(packed) // 4}I", packed))
        )

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for dtype in (torch.float16, torch.bfloat16):
        for i in range(len(tiles())):
            launch.gpu.register(kernel_name(dtype, i), _launcher(i))
