"""``[relu](conv2d(x, weight) * scale + shift [+ residual])``, 3x3 and 1x1, by ``kernels/csrc/cuda/hopper``."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import launch
from ..candidates import conv1x1
from ..candidates.conv1x1 import Conv1x1Config
from ..candidates.cuda import Plan
from ..candidates.hopper import KERNELS, HopperConfig, instance, plan, tiles
from ..layer import Layer
from .conv import counters_of

__all__ = ["conv_bn_relu", "kernel_name", "small_integers", "verify"]


def kernel_name(stem: str, dtype: torch.dtype, number: int) -> str:
    """The kernel's name in the launch seam. stem: ``"conv_halo"`` or ``"conv1x1"``."""
    return f"{stem}_fwd_kernel<{str(dtype).removeprefix('torch.')}, {number}>"


def _plan(layer: Layer, config: HopperConfig | Conv1x1Config) -> tuple[str, Plan]:
    """The kernel that computes a layer, and its launch."""
    made = conv1x1.plan(layer, config) if isinstance(config, Conv1x1Config) else plan(layer, config)
    if made is None:
        raise RuntimeError(f"conv_bn_relu: {config} cannot compute {layer}")
    if isinstance(config, Conv1x1Config):
        return kernel_name("conv1x1", layer.dtype, config.conv1x1), made
    return kernel_name("conv_halo", layer.dtype, instance(layer, config)), made


def conv_bn_relu(
    layer: Layer,
    config: HopperConfig | Conv1x1Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Writes ``[relu](conv2d(x, weight) * scale + shift [+ residual])`` to ``y``; arguments as for the Triton kernel.

    ``y`` must be aligned to 16 bytes; other operands are copied if they are not. Split-K reduces float32 partial sums
    in a workspace.
    """
    kernel, made = _plan(layer, config)
    partial = counters = None
    if config.splits > 1:
        partial = torch.empty(made.partial_floats, dtype=torch.float32, device=x.device)
        counters = counters_of(x, made.counters)
    launch.cuda_launch(
        kernel,
        (made.blocks, config.splits),
        (made.threads,),
        made.shared,
        (
            *(launch.aligned(x), launch.aligned(weight), launch.aligned(scale), launch.aligned(shift)),
            *(None if residual is None else launch.aligned(residual), y, partial, counters),
            struct.pack(f"{len(made.args)}I", *made.args),
        ),
    )


def small_integers(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """``draw(most, *shape)``: integers from -most to most, from a generator of their own, not the user's."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(most: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randint(-most, most + 1, shape, device=device, generator=generator).to(dtype)

    return draw


@functools.cache
def verify(layer: Layer, config: HopperConfig | Conv1x1Config, device: torch.device) -> None:
    """Raises RuntimeError unless ``config`` computes ``layer`` exactly on small integers, whose sums are exact.

    Runs once for each, before a measurement: no GPU has run these kernels in a release's tests.
    """

    whole = small_integers(device, layer.dtype)
    x = whole(2, layer.batch, layer.height, layer.width, layer.channels)
    weight = whole(1, layer.out_channels, *layer.kernel, layer.channels)
    y = torch.empty(
        layer.batch, layer.out_height, layer.out_width, layer.out_channels, dtype=layer.dtype, device=device
    )
    residual = whole(9, *y.shape) if layer.residual else None
    scale, shift = torch.arange(2 * layer.out_channels, device=device, dtype=torch.float32).view(2, -1)
    scale, shift = scale % 2 + 1, shift % 5
    images = [None if t is None else t.permute(0, 3, 1, 2) for t in (x, residual, y)]
    conv_bn_relu(layer, config, images[0], weight, scale, shift, images[1], images[2])  # type: ignore[arg-type]
    operands = x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double()
    exact = F.conv2d(*operands, None, layer.stride, layer.padding)
    exact = exact.round().permute(0, 2, 3, 1) * scale + shift + (0 if residual is None else residual)
    if not torch.equal(y, (exact.relu() if layer.relu else exact).to(layer.dtype)):
        raise RuntimeError(f"{config} computes {layer} wrongly on {device}")


def _launcher(stem: str, tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        op = getattr(torch.ops.resnet_fast, f"{stem}_launch")
        op(*tensors, tile, list(struct.unpack(f"{len(packed) // 4}I", packed)))

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for dtype in (torch.float16, torch.bfloat16):
        for i in range(KERNELS * len(tiles())):
            launch.gpu.register(kernel_name("conv_halo", dtype, i), _launcher("conv_halo", i // KERNELS))
        for i in range(len(conv1x1.tiles())):
            launch.gpu.register(kernel_name("conv1x1", dtype, i), _launcher("conv1x1", i))
