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
from .hopper import small_integers

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
    shift = None if bias is None else bias.float()
    _start(layer, config, made, (x, scale_shift, weight, shift), y, partial)
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

    whole = small_integers(device, layer.dtype)

    def image(channels: int, height: int, width: int) -> Tensor:
        return whole(2, layer.batch, height, width, channels).permute(0, 3, 1, 2)

    def check(what: str, found: Tensor, exact: Tensor) -> None:
        if not torch.equal(found.double(), exact.round().to(layer.dtype).double()):
            raise RuntimeError(f"{config} computes {what} of {layer} wrongly on {device}")

    def check_sums(what: str, found: Tensor, exact: Tensor) -> None:
        # In float32: rounded, and added in another order. Sums of squares are of one sign.
        if not torch.allclose(found, exact, rtol=1e-4, atol=1e-2 * layer.pixels**0.5):
            raise RuntimeError(f"{config} computes {what} of {layer} wrongly on {device}")

    x, weight = image(layer.channels, layer.height, layer.width), whole(1, layer.out_channels, 3, 3, layer.channels)
    affine = whole(1, 2, layer.channels, dtype=torch.float32)
    if layer.role == "conv_bn_stats":
        found = image(layer.out_channels, layer.out_height, layer.out_width)
        for scale_shift, bias in ((affine, None), (None, whole(2, layer.out_channels))):
            partial = conv_bn_stats(layer, config, x, scale_shift, weight, bias, found, True)
            assert partial is not None
            activation = _activation(x, scale_shift, layer.relu)
            filters = weight.permute(0, 3, 1, 2).double()
            check("y", found, F.conv2d(activation, filters, None if bias is None else bias.double(), layer.stride, 1))
            means, squares = partial.partial.double().unbind(1)
            counts = (layer.pixels - torch.arange(len(means), device=device) * partial.rows).clamp(max=partial.rows)
            wanted = found.double()
            mean = wanted.mean((0, 2, 3))
            check_sums("sums", (means * counts[:, None]).sum(0), wanted.sum((0, 2, 3)))
            moved = (squares + counts[:, None] * (means - mean) ** 2).sum(0)
            check_sums("M2", moved, ((wanted - mean[:, None, None]) ** 2).sum((0, 2, 3)))
        return
    grad, y = (image(layer.out_channels, layer.height, layer.width) for _ in range(2))
    residual, y2 = (image(layer.channels, layer.height, layer.width) for _ in range(2))
    coefficients, found = whole(1, 4, layer.out_channels, dtype=torch.float32), torch.empty_like(x)
    stats = torch.zeros(2, layer.channels, dtype=torch.float32, device=device)
    forms: tuple[tuple[Any, ...], ...] = (
        (y, coefficients, residual, affine, [x, y2], True),
        (None, None, None, None, [x], True),
        (y, coefficients, None, None, [], False),
    )
    for own, rows, added, scale_shift, ys, sums in forms:
        operands = (grad, own, rows, weight, added, x, scale_shift, sums, ys, [stats] * len(ys), found)
        parted = data_gradient(layer, config, *operands)
        exact = F.conv_transpose2d(_output_gradient(grad, own, rows), weight.permute(0, 3, 1, 2).double(), None, 1, 1)
        exact = exact if added is None else exact + added
        if sums and (layer.relu or scale_shift is None):
            exact = torch.where(_activation(x, scale_shift, False) > 0, exact, 0)
        check("dx", found, exact)
        if parted is not None:
            for row, factor in enumerate((torch.ones_like(x), *ys)):
                check_sums("sums", parted[:, row].double().sum(0), (found.double() * factor).sum((0, 2, 3)))


def _activation(x: Tensor, scale_shift: Tensor | None, relu: bool) -> Tensor:
    """``[relu](scale * x + shift)`` in float64."""
    if scale_shift is None:
        affine = x.double()
    else:
        scale, shift = scale_shift.double()[:, :, None, None]
        affine = scale * x + shift
    return affine.relu() if relu else affine


def _output_gradient(grad: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """``a * grad + b * (y - mean) + constant`` in float64."""
    if y is None or coefficients is None:
        return grad.double()
    a, b, constant, mean = coefficients.double()[:, :, None, None]
    return a * grad + b * (y - mean) + constant


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
