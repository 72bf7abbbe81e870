"""The inference operators on CUDA devices: check arguments, choose a kernel for each layer, and run it.

:mod:`.register` registers them for ``kernels/csrc/ops.cpp``; :class:`.chain.GpuChain` calls :func:`steps` and
:func:`run_steps` itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import check_add_relu
from ..ops.augment import check_augment
from ..ops.chain import cuda_unpack
from ..ops.conv_autograd import fake_add_layer, fake_conv
from ..ops.spec import DEFERRED, FOLDED, ConvSpec, check_values, conv_size, decode, empty_image
from . import convolution as layer_kernels
from .checks import check_dtype, check_input, check_pixels
from .convolution import Filter
from .cuda import stem as cuda_stem
from .layer import Layer, layer_of, precision
from .packing import scale_shift
from .tune import LIBRARY, Choice


@dataclass(frozen=True)
class Step:
    """A layer of a chain, ready to run. source, residual: numbers of values, 0 the input. last: values that no later
    step reads."""

    layer: Layer
    choice: Choice
    filters: Filter
    source: int
    residual: int
    last: tuple[int, ...]


def steps(x: Tensor, filters: Sequence[Tensor], specs: Sequence[ConvSpec]) -> list[Step]:
    """The steps of a chain for inputs like ``x``: checked, and with a kernel chosen for each layer."""
    check_input("x", x)
    if len(specs) != len(filters) or not filters:
        raise RuntimeError(f"layers has {len(specs)} convolutions, want one for each of {len(filters)} filters")
    for packed in filters:
        if packed.device != x.device or packed.dtype != torch.float32:
            raise RuntimeError(f"filters has one on {packed.device} in {packed.dtype}, want {x.device} and float32")
    check_values("layers", specs)
    last_use = {v: i for i, spec in enumerate(specs) for v in (spec.source, spec.residual)}
    shapes = {0: tuple(x.shape)}
    planned = []
    for i, (spec, packed) in enumerate(zip(specs, filters, strict=True)):
        source, added, flags, k, kernel, stride, padding = spec
        folded = bool(flags & FOLDED)
        layer = layer_of(
            *(shapes[source], (k, *kernel), stride, padding, x.dtype),
            residual=added >= 0,
            relu=spec.relu,
            folded=folded,
            shifted=not flags & DEFERRED,
        )
        shape = (x.shape[0], k, layer.out_height, layer.out_width)
        if added >= 0 and shapes[added] != shape:
            raise RuntimeError(f"residual of layer {i} has shape {shapes[added]}, want {shape}")
        check_pixels("conv_bn_relu", layer.pixels)
        weight, scale, shift, bias = cuda_unpack(packed, (k, *kernel, layer.channels), x.dtype)
        filter_ = Filter(weight, scale, shift, bias if folded else None)
        choice = layer_kernels.choose(layer, x.device) if layer.pixels > 0 else LIBRARY
        last = tuple(dict.fromkeys(v for v in (source, added) if v >= 0 and last_use[v] == i))
        planned.append(Step(layer, choice, filter_, source, added, last))
        shapes[i + 1] = shape
    return planned


def run_steps(x: Tensor, planned: Sequence[Step]) -> Tensor:
    """The chain on ``x``; frees each activation after its last use."""
    values = {0: x.contiguous(memory_format=torch.channels_last)}
    for i, step in enumerate(planned):
        layer, residual = step.layer, values[step.residual] if step.residual >= 0 else None
        if layer.pixels == 0:
            y = empty_image(x, layer.out_channels, layer.out_height, layer.out_width)
        else:
            y = layer_kernels.run(layer, step.choice, values[step.source], step.filters, residual)
        values[i + 1] = y
        for v in step.last:
            del values[v]
    return values[len(planned)]


_NO_POOL = (
    "pool is {}, want none: on CUDA devices max pooling of 2 x 2, or of 3 x 3 with stride 2 and padding 1, runs with "
    "one convolution of 7 x 7 or 3 x 3 and stride 2 from 3 channels to a multiple of 16"
)


def conv_chain(x: Tensor, filters: list[Tensor], layers: list[int], pool: Sequence[int] = ()) -> Tensor:
    if pool and len(filters) == 1:
        return _pooled_stage(x, filters[0], decode(layers), pool)
    planned = steps(x, filters, decode(layers))
    if pool:
        raise RuntimeError(_NO_POOL.format(list(pool)))
    return run_steps(x, planned)


def _pooled_stage(x: Tensor, packed: Tensor, specs: Sequence[ConvSpec], pool: Sequence[int]) -> Tensor:
    """One convolution and max pooling in one launch; longer chains have no kernel with pooling."""
    layer = cuda_stem.pooled_layer(tuple(specs), x.shape, x.dtype, precision(x.dtype), tuple(pool))
    if layer is None:
        raise RuntimeError(_NO_POOL.format(list(pool)))
    weight, scale, shift, _ = cuda_unpack(packed, (layer.out_channels, *layer.kernel, layer.channels), x.dtype)
    sizes = ((layer.out_height, layer.out_width), pool[4:], pool[:2], pool[2:4])
    y = empty_image(x, layer.out_channels, *(conv_size(*size) for size in zip(*sizes, strict=True)))
    cuda_stem.conv_bn_relu_pool(layer, x, weight, scale, shift, pool, y)
    return y


def _conv(
    relu: bool, x: Tensor, residual: Tensor | None, weight: Tensor, vectors: Sequence[Tensor | None], rest: tuple
) -> Tensor:
    eps, stride, padding = rest
    y = (
        fake_conv(x, weight, *vectors, eps, stride, padding)
        if residual is None
        else fake_add_layer(x, residual, weight, *vectors, eps, stride, padding)
    )
    check_dtype("x", x)
    if residual is not None and residual.dtype != x.dtype:
        raise RuntimeError(f"residual has dtype {residual.dtype}, want {x.dtype} as x has")
    scale, shift = scale_shift(weight, vectors, eps)
    filters = weight.permute(0, 2, 3, 1).contiguous()
    k, _, *taps = weight.shape
    has_residual = residual is not None
    layer = layer_of(x.shape, (k, *taps), stride, padding, x.dtype, residual=has_residual, relu=relu)
    check_pixels("conv_bn_relu", layer.pixels)
    if layer.pixels == 0 or y.numel() == 0:
        return y
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    choice = layer_kernels.choose(layer, x.device)
    return layer_kernels.run(layer, choice, x, Filter(filters, scale, shift), residual)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    check_add_relu(a, b)
    from .._triton import add_relu as elementwise

    return elementwise.add_relu(a, b)


def augment(images: Tensor, index: Tensor, table: Tensor, stream: int | None, padding: int, flip: bool) -> Tensor:
    check_augment(images, index, table, padding)
    check_pixels("augment", table.shape[0] * images.shape[2] * images.shape[3])
    from .._triton import augment as gather

    return gather.augment(images, index, table, stream, padding, flip)


def conv_bn(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _conv(False, x, None, weight, rest[:5], rest[5:])


def conv_bn_relu(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _conv(True, x, None, weight, rest[:5], rest[5:])


def conv_bn_add_relu(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _conv(True, x, residual, weight, rest[:5], rest[5:])
