"""The 3x3 convolution with statistics and its data gradient by the kernels of ``kernels/csrc/cuda/hopper/training``."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import launch
from ..candidates.cuda import Plan
from ..candidates.hopper import KERNELS
from ..candidates.hopper_training import TrainingConfig, instance, parts, plan, tile_pixels, tiles
from ..layer import Layer

if TYPE_CHECKING:
    from ..._triton.finalize import PartialStats

__all__ = ["conv_bn_stats", "data_gradient", "kernel_name", "verify"]

_STEMS = {"conv_bn_stats": "conv_halo_stats", "data gradient": "conv_halo_gradient"}


def kernel_name(role: str, dtype: torch.dtype, number: int) -> str:
    """The kernel's name in the launch seam."""
    return f"{_STEMS[role]}_kernel<{str(dtype).removeprefix('torch.')}, {number}>"


def _planned(layer: Layer, config: TrainingConfig, relu: bool) -> Plan:
    made = plan(layer, config, relu)
    if made is None:
        raise RuntimeError(f"{layer.role}: {config} cannot compute {layer}")
    return made


def _start(layer: Layer, config: TrainingConfig, made: Plan, operands: tuple[Tensor | None, ...], *out: Any) -> None:
    """Launches the kernel: operands are copied where they are not aligned to 16 bytes."""
    aligned = (None if t is None else launch.aligned(t) for t in operands)
    launch.cuda_launch(
        kernel_name(layer.role, layer.dtype, instance(layer, config)),
        (made.blocks,),
        (made.threads,),
        made.shared,
        (*aligned, *out, struct.pack(f"{len(made.args)}I", *made.args)),
    )


def conv_bn_stats(
    layer: Layer,
    config: TrainingConfig,
    x: Tensor,
    scale_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stats: bool,
) -> PartialStats | None:
    """Writes ``y = conv2d([relu](scale * x + shift), weight) + bias``; with ``stats`` returns its partial statistics.

    Arguments as for :func:`resnet_fast._triton.conv_bn_stats.conv_bn_stats`.
    """
    from ..._triton.finalize import PartialStats

    made = _planned(layer, config, layer.relu)
    partial = None
    if stats:
        partial = torch.empty(parts(made), 2, layer.out_channels, dtype=torch.float32, device=x.device)
    _start(layer, config, made, (x, scale_shift, weight, bias), y, partial)
    return None if partial is None else PartialStats(partial, layer.pixels, tile_pixels(made), None)


def data_gradient(
    layer: Layer,
    config: TrainingConfig,
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    bn_sums: bool,
    ys: list[Tensor],
    stats: list[Tensor],
    dx: Tensor,
) -> Tensor | None:
    """Writes dx; with ``bn_sums`` returns its partial sums, float32 ``[parts, 1 + ys, C]``.

    Arguments as for :func:`resnet_fast._triton.conv_backward.data_gradient`.
    """
    relu = bn_sums and (layer.relu or scale_shift is None)
    made = _planned(layer, config, relu)
    partial = None
    if bn_sums:
        partial = torch.empty(parts(made), 1 + len(ys), layer.channels, dtype=torch.float32, device=x.device)
    masked = (x, scale_shift) if relu else (None, None)
    reduced = (*[*ys, None, None][:2], *[*stats, None, None][:2]) if bn_sums else (None,) * 4
    _start(layer, config, made, (grad, y, coefficients, weight, residual, *masked, *reduced), dx, partial)
    return partial


@functools.cache
def verify(layer: Layer, config: TrainingConfig, device: torch.device) -> None:
    """Raises RuntimeError unless ``config`` computes ``layer`` exactly on small integers, whose sums are exact.

    Runs once for each, before a measurement: no GPU has run these kernels in a release's tests.
    """

    def whole(most: int, *shape: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.randint(-most, most + 1, shape, device=device).to(dtype)

    def image(channels: int, height: int, width: int) -> Tensor:
        return whole(2, layer.batch, height, width, channels).permute(0, 3, 1, 2)

    def columns(t: Tensor) -> Tensor:
        return t.double()[:, :, None, None]

    c, k = layer.channels, layer.out_channels
    x, weight = image(c, layer.height, layer.width), whole(1, k, 3, 3, c)
    filters, (scale, shift) = (
        weight.permute(0, 3, 1, 2).double(),
        columns(affine := whole(1, 2, c, dtype=torch.float32)),
    )
    activation = scale * x + shift
    if layer.role == "conv_bn_stats":
        found = image(k, layer.out_height, layer.out_width)
        partial = conv_bn_stats(layer, config, x, affine, weight, None, found, True)
        exact = F.conv2d(activation.relu() if layer.relu else activation, filters, None, layer.stride, 1)
        assert partial is not None
        sums = partial.partial[:, 0].double()
        counts = (layer.pixels - torch.arange(len(sums), device=device) * partial.rows).clamp(max=partial.rows)
        sums, wanted = (sums * counts[:, None]).sum(0), found.double().sum((0, 2, 3))
    else:
        grad, y, residual = (image(n, layer.height, layer.width) for n in (k, k, c))
        coefficients = whole(1, 4, k, dtype=torch.float32)
        a, b, constant, mean = columns(coefficients)
        found = torch.empty_like(x)
        operands = (grad, y, coefficients, weight, residual, x, affine)
        parted = data_gradient(layer, config, *operands, True, [x], [torch.zeros(2, c, device=device)], found)
        assert parted is not None
        dy = a * grad + b * (y - mean) + constant
        exact = F.conv_transpose2d(dy, filters, None, 1, 1) + residual
        exact = torch.where(activation > 0, exact, 0) if layer.relu else exact
        sums, wanted = parted[:, 1].double().sum(0), (found.double() * x).sum((0, 2, 3))
    near = torch.allclose(sums, wanted, rtol=1e-4, atol=1e-2 * layer.pixels**0.5)
    if not (near and torch.equal(found.double(), exact.to(layer.dtype).double())):
        raise RuntimeError(f"{config} computes {layer} wrongly on {device}")


def _launcher(role: str, tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        op = getattr(torch.ops.resnet_fast, f"{_STEMS[role]}_launch")
        op(*tensors, tile, list(struct.unpack(f"{len(packed) // 4}I", packed)))

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for role in _STEMS:
        for dtype in (torch.float16, torch.bfloat16):
            for i in range(KERNELS * len(tiles())):
                launch.gpu.register(kernel_name(role, dtype, i), _launcher(role, i // KERNELS))
