"""Copies of filters between the layout and dtype of parameters and those of kernels, for training on NVIDIA GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import cdiv

__all__ = ["copy_filters", "filter_offsets", "is_wide", "like", "packed", "strides"]

_BLOCK = 1024


@triton.jit
def filter_offsets(i, channels, height, width, stride_k, stride_c, stride_r, stride_s):
    """Offset of element i, counted in the order [K, R, S, C], in a tensor of these strides."""
    c = i % channels
    s = i // channels % width
    r = i // channels // width % height
    k = i // channels // width // height
    return k * stride_k + c * stride_c + r * stride_r + s * stride_s


@triton.jit(do_not_specialize=range(2, 14))
def _copy_filters_kernel(
    source,
    out,
    elements,
    channels,
    height,
    width,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    out_k,
    out_c,
    out_r,
    out_s,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    i = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(
        source + filter_offsets(i, channels, height, width, stride_k, stride_c, stride_r, stride_s), i < elements
    )
    to = filter_offsets(i, channels, height, width, out_k, out_c, out_r, out_s)
    tl.store(out + to, v.to(out.dtype.element_ty), i < elements)


def is_wide(*filters: Tensor) -> bool:
    """Whether offsets need 64 bits, in which a GPU divides slowly."""
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 - _BLOCK for t in filters)


def strides(t: Tensor) -> tuple[int, ...]:
    """Sizes and strides of ``[K, C, R, S]`` as :func:`filter_offsets` takes them."""
    return (t.shape[1], *t.shape[2:], *t.stride())


def copy_filters(source: Tensor, out: Tensor) -> Tensor:
    """Copies ``source`` to ``out`` and returns it: both ``[K, C, R, S]``, in any layouts and dtypes."""
    elements = out.numel()
    launch.launch(
        _copy_filters_kernel,
        (cdiv(elements, _BLOCK),),
        (source, out, elements, *strides(source), *out.stride()),
        WIDE=is_wide(source, out),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in channels_last and ``dtype``; itself where it is that."""
    if weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=torch.channels_last)
    return copy_filters(weight, out)


def like(found: Tensor, weight: Tensor) -> Tensor:
    """``found`` in dtype and layout of ``weight``; itself where it has them."""
    sizes = zip(weight.shape, found.stride(), weight.stride(), strict=True)
    if found.dtype == weight.dtype and all(own == wanted for size, own, wanted in sizes if size > 1):
        return found
    return copy_filters(found, torch.empty_like(weight))
