"""Max pooling that keeps half a byte an output for its backward pass.

PyTorch's own keeps its input, whose values the backward pass does not read, and an int64 index an output: after the
stem of an ImageNet network a sixth of all that training keeps. Here the place within the window is kept, two in a byte:
on CPUs by operators of their own, elsewhere out of PyTorch's indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import backends
from ..ops.differentiation import first_order
from . import devices, patches
from .guard import hooks_reason
from .layout import laid_out
from .plain import as_plain
from .training.layers import dense

__all__ = ["MaxPool2d", "flat_average", "pair", "pooling_window"]

_PLACES = 16  # of a window that four bits tell apart
# Indices of so many outputs are turned into places at once: they stay in a CPU's cache.
_AT_ONCE = 1 << 17


class MaxPool2d(nn.MaxPool2d):
    __doc__ = nn.MaxPool2d.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            return super().forward(x)
        kernel, padding = pair(self.kernel_size), pair(self.padding)
        return laid_out(_MaxPool.apply(x, kernel, pair(self.stride), padding, self.ceil_mode), x)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead."""
        return as_plain(self, nn.MaxPool2d) if type(self) is MaxPool2d else self

    def _fits(self, x: Tensor) -> bool:
        kernel = pair(self.kernel_size)
        return (
            isinstance(x, Tensor)  # no symbol of torch.fx
            and self.training
            and torch.is_grad_enabled()
            and x.requires_grad
            and x.dim() == 4
            and x.numel() > 0
            and kernel[0] * kernel[1] <= _PLACES
            and x.shape[3] >= kernel[1]
            and pair(self.dilation) == [1, 1]
            and not self.return_indices
            and backends.selected() != "eager"
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and backends.transform_reason() is None
            and patches.kept(nn.MaxPool2d, "forward")
        )


patches.register(MaxPool2d)


def pooling_window(pool: nn.Module) -> list[int] | None:
    """Window, stride and padding of ``pool``, each of two integers, where these say all that it does; or None."""
    if type(pool) not in (nn.MaxPool2d, MaxPool2d) or hooks_reason([pool, pool]) is not None:
        return None
    if not (patches.kept(MaxPool2d, "forward") and patches.kept(nn.MaxPool2d, "forward")):
        return None
    assert isinstance(pool, nn.MaxPool2d)
    if pair(pool.dilation) != [1, 1] or pool.ceil_mode or pool.return_indices:
        return None
    return [*pair(pool.kernel_size), *pair(pool.stride), *pair(pool.padding)]


def flat_average(pool: nn.Module, x: Tensor) -> Tensor | None:
    """``torch.flatten(pool(x), 1)`` in one launch: average pooling on a GPU, no gradient wanted; or None."""
    if (
        not isinstance(x, Tensor)
        or backends.kind(x) != "cuda"
        or torch.compiler.is_compiling()
        or not backends.has_kernel("avg_pool_flatten_launch", "cuda")
        or not backends.has_kernel("residual_stage", "cuda")  # the launchers
        or backends.selected() not in ("auto", "cuda")
        or (torch.is_grad_enabled() and x.requires_grad)
        or type(x) is not Tensor
        or x.dim() != 4
        or torch.jit.is_tracing()
        or backends.transform_reason() is not None
        or nn_module._has_any_global_hook()
        or hooks_reason([pool, pool]) is not None
    ):
        return None
    if type(pool) not in (nn.AdaptiveAvgPool2d, nn.AvgPool2d) or not patches.kept(type(pool), "forward"):
        return None
    if type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)):
        kernel = stride = list(x.shape[2:])
    elif type(pool) is nn.AvgPool2d and not pool.ceil_mode and pool.divisor_override is None:
        kernel, stride = pair(pool.kernel_size), pair(pool.stride)
        if pair(pool.padding) != [0, 0] or any(k > size for k, size in zip(kernel, x.shape[2:], strict=True)):
            return None
    else:
        return None
    return devices.gpu.flat_average(x, kernel, stride) if devices.gpu.averages(x) else None


def pair(value: Any) -> list[int]:
    """Height and width, as modules keep them: one integer for both, or two."""
    return [value, value] if isinstance(value, int) else list(value)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
    ) -> Tensor:
        x = dense(x)
        ctx.shape, ctx.settings = x.shape, (kernel, stride, padding, [1, 1], ceil_mode)
        ctx.fused = backends.has_kernel("max_pool", x.device.type) and x.dtype != torch.float16
        if ctx.fused:
            with torch._C._AutoDispatchBelowAutograd():
                out, places = torch.ops.resnet_fast.max_pool.default(x, kernel, stride, padding, ceil_mode)
            ctx.save_for_backward(places)
            return out
        out, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, [1, 1], ceil_mode)
        ctx.save_for_backward(_places(indices, x.shape, kernel, stride, padding))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        places = ctx.saved_tensors[0].contiguous()  # whatever a hook of saved tensors made of it
        kernel, stride, padding, *_ = ctx.settings
        first = first_order(grad)
        if ctx.fused and first:
            with torch._C._AutoDispatchBelowAutograd():
                dx = torch.ops.resnet_fast.max_pool_backward.default(
                    dense(grad), places, ctx.shape[2:], kernel, stride, padding
                )
            return dx, None, None, None, None
        indices = _indices(places, grad.shape, ctx.shape, kernel, stride, padding)
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)  # its shape
        grad = dense(grad) if first else grad  # batches of vmap have no layout
        dx = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.settings, indices)
        return dx, None, None, None, None


def _corners(like: Tensor, shape: torch.Size, width: int, stride: list[int], padding: list[int]) -> Tensor:
    """Index of the first pixel of each window, as if there were pixels in the padding: ``[height, width, 1]``."""
    rows, columns = (
        torch.arange(n, device=like.device, dtype=torch.int32) * s - p
        for n, s, p in zip(shape[2:], stride, padding, strict=True)
    )
    return (rows[:, None] * width + columns)[:, :, None]


def _step(shape: torch.Size) -> int:
    return max(1, _AT_ONCE // max(1, shape[1] * shape[2] * shape[3]))


def _places(indices: Tensor, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """uint8, two places in each; a place is ``row * kernel width + column`` within the window."""
    width, size = shape[3], indices.shape
    corners = _corners(indices, size, width, stride, padding)
    places = torch.empty((indices.numel() + 1) // 2 * 2, dtype=torch.uint8, device=indices.device)
    images = places[: indices.numel()].view(size[0], *size[2:], size[1])
    for n in range(0, size[0], _step(size)):
        some = indices[n : n + _step(size)].permute(0, 2, 3, 1).to(torch.int32) - corners
        place = some.clone()
        for row in range(1, kernel[0]):
            place -= (some >= row * width).to(torch.int32) * (width - kernel[1])
        images[n : n + _step(size)] = place
    places[indices.numel() :] = 0
    low, high = places.view(-1, 2).unbind(1)
    return low | high << 4


def _indices(
    packed: Tensor, size: torch.Size, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """What ``_places`` was given, int64, channels_last."""
    width = shape[3]
    places = torch.stack((packed & 15, packed >> 4), 1).view(-1)[: size.numel()].view(size[0], *size[2:], size[1])
    corners = _corners(packed, size, width, stride, padding)
    indices = torch.empty((size[0], *size[2:], size[1]), dtype=torch.int64, device=packed.device)
    for n in range(0, size[0], _step(size)):
        some = places[n : n + _step(size)].to(torch.int32)
        index = some + corners
        for row in range(1, kernel[0]):
            index += (some >= row * kernel[1]).to(torch.int32) * (width - kernel[1])
        indices[n : n + _step(size)] = index
    return indices.permute(0, 3, 1, 2)
