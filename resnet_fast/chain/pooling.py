"""Max pooling that saves half a byte per output for its backward, and average pooling in one launch on GPUs.

PyTorch's max pooling saves its input, whose values the backward never reads, and an int64 index per output: after the
stem of an ImageNet network a sixth of all that training saves. :class:`MaxPool2d` saves the argmax's offset within the
window in 4 bits, two to a byte: by operators of this package on CPUs, made from PyTorch's indices elsewhere.
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

_MOST_OFFSETS = 16  # pixels of a window that four bits tell apart
# Outputs whose indices are converted at a time: they stay in a CPU's cache.
_CHUNK = 1 << 17


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
            isinstance(x, Tensor)  # not a proxy of torch.fx
            and self.training
            and torch.is_grad_enabled()
            and x.requires_grad
            and x.dim() == 4
            and x.numel() > 0
            and kernel[0] * kernel[1] <= _MOST_OFFSETS
            and x.shape[3] >= kernel[1]
            and pair(self.dilation) == [1, 1]
            and not self.return_indices
            and backends.selected() != "eager"
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and backends.transform_reason() is None
            and patches.is_original(nn.MaxPool2d, "forward")
        )


patches.register(MaxPool2d)


def pooling_window(pool: nn.Module) -> list[int] | None:
    """Window, stride and padding of ``pool``, two integers each; None where it does more than these say."""
    if type(pool) not in (nn.MaxPool2d, MaxPool2d) or hooks_reason([pool, pool]) is not None:
        return None
    if not (patches.is_original(MaxPool2d, "forward") and patches.is_original(nn.MaxPool2d, "forward")):
        return None
    assert isinstance(pool, nn.MaxPool2d)
    if pair(pool.dilation) != [1, 1] or pool.ceil_mode or pool.return_indices:
        return None
    return [*pair(pool.kernel_size), *pair(pool.stride), *pair(pool.padding)]


def flat_average(pool: nn.Module, x: Tensor) -> Tensor | None:
    """``torch.flatten(pool(x), 1)`` in one launch, for average pooling on a GPU without gradients; else None."""
    if (
        not isinstance(x, Tensor)
        or backends.kind(x) != "cuda"
        or torch.compiler.is_compiling()
        or not backends.has_kernel("avg_pool_flatten_launch", "cuda")
        or not backends.has_kernel("conv_chain", "cuda")  # the launchers
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
    if type(pool) not in (nn.AdaptiveAvgPool2d, nn.AvgPool2d) or not patches.is_original(type(pool), "forward"):
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
    """(height, width) of a module's setting, which is one integer for both or two."""
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
                out, offsets = torch.ops.resnet_fast.max_pool.default(x, kernel, stride, padding, ceil_mode)
            ctx.save_for_backward(offsets)
            return out
        out, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, [1, 1], ceil_mode)
        ctx.save_for_backward(_offsets(indices, x.shape, kernel, stride, padding))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        offsets = ctx.saved_tensors[0].contiguous()  # a saved-tensor hook may have changed the layout
        kernel, stride, padding, *_ = ctx.settings
        first = first_order(grad)
        if ctx.fused and first:
            with torch._C._AutoDispatchBelowAutograd():
                dx = torch.ops.resnet_fast.max_pool_backward.default(
                    dense(grad), offsets, ctx.shape[2:], kernel, stride, padding
                )
            return dx, None, None, None, None
        indices = _indices(offsets, grad.shape, ctx.shape, kernel, stride, padding)
        # The operator reads only the shape of x.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        grad = dense(grad) if first else grad  # a vmap batch has no memory format
        dx = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.settings, indices)
        return dx, None, None, None, None


def _corners(like: Tensor, shape: torch.Size, width: int, stride: list[int], padding: list[int]) -> Tensor:
    """Linear index of the top left pixel of each window, which padding may put outside: ``[height, width, 1]``."""
    rows, columns = (
        torch.arange(n, device=like.device, dtype=torch.int32) * s - p
        for n, s, p in zip(shape[2:], stride, padding, strict=True)
    )
    return (rows[:, None] * width + columns)[:, :, None]


def _images_per_chunk(shape: torch.Size) -> int:
    return max(1, _CHUNK // max(1, shape[1] * shape[2] * shape[3]))


def _offsets(indices: Tensor, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Argmax offsets of ``indices``, ``row * kernel width + column`` within the window; uint8, two to a byte."""
    width, size = shape[3], indices.shape
    corners = _corners(indices, size, width, stride, padding)
    offsets = torch.empty((indices.numel() + 1) // 2 * 2, dtype=torch.uint8, device=indices.device)
    images, step = offsets[: indices.numel()].view(size[0], *size[2:], size[1]), _images_per_chunk(size)
    for n in range(0, size[0], step):
        distance = indices[n : n + step].permute(0, 2, 3, 1).to(torch.int32) - corners
        offset = distance.clone()
        for row in range(1, kernel[0]):
            offset -= (distance >= row * width).to(torch.int32) * (width - kernel[1])
        images[n : n + step] = offset
    offsets[indices.numel() :] = 0
    low, high = offsets.view(-1, 2).unbind(1)
    return low | high << 4


def _indices(
    packed: Tensor, size: torch.Size, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """The inverse of :func:`_offsets`: PyTorch's indices, int64, channels_last."""
    width, step = shape[3], _images_per_chunk(size)
    offsets = torch.stack((packed & 15, packed >> 4), 1).view(-1)[: size.numel()].view(size[0], *size[2:], size[1])
    corners = _corners(packed, size, width, stride, padding)
    indices = torch.empty((size[0], *size[2:], size[1]), dtype=torch.int64, device=packed.device)
    for n in range(0, size[0], step):
        offset = offsets[n : n + step].to(torch.int32)
        index = offset + corners
        for row in range(1, kernel[0]):
            index += (offset >= row * kernel[1]).to(torch.int32) * (width - kernel[1])
        indices[n : n + step] = index
    return indices.permute(0, 3, 1, 2)
