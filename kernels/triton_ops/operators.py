"""The operators of ``kernels/csrc/ops.cpp`` on CUDA devices: checks, layouts, and a kernel for each layer.

Our own kernels apply batch norm's scale and shift to the float32 sums, and take filters as they are. Libraries want
filters that hold the scale, which rounds 16-bit ones once more: done where that keeps their precision and a library is
the fastest. So packed filters are scale, shift, the shift in the dtype of the images, and the filters as
``[K, R, S, C]``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from resnet_fast import backends, launch, ops
from resnet_fast.gpu import library

from . import add_relu as elementwise
from . import conv_bn_relu as kernels
from . import cuda_conv, cuda_stem
from .configs import Config, Layer
from .cuda_configs import CudaConfig
from .tune import LIBRARY, Choice, tuner

_ALIGN = 4  # floats: 16 bytes
MOST_PIXELS = 2**31 - 1


def _padded(channels: int) -> int:
    return -(-channels // _ALIGN) * _ALIGN


def scale_shift(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``batch_norm(z + bias) = z * scale + shift``, computed in float64, returned as float32 ``[K]``."""
    channels = weight.shape[0]
    for name, t in zip(ops.VECTORS, (bias, bn_weight, bn_bias, running_mean, running_var), strict=True):
        if t is not None and t.shape != (channels,):
            raise RuntimeError(
                f"{name} has shape {tuple(t.shape)}, want ({channels},) as weight has {channels} filters"
            )
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var come together or not at all")
    if running_mean is None and (bn_weight is not None or bn_bias is not None):
        raise RuntimeError("bn_weight and bn_bias come with running_mean and running_var")

    def double(t: Tensor | None, value: float) -> Tensor:
        return weight.new_full((channels,), value, dtype=torch.float64) if t is None else t.double()

    scale = double(bn_weight, 1.0) * (double(running_var, 1.0) + (eps if running_var is not None else 0.0)).rsqrt()
    shift = double(bn_bias, 0.0) + (double(bias, 0.0) - double(running_mean, 0.0)) * scale
    return scale.float(), shift.float()


def pack_conv_bn(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    algorithm: int = 0,
) -> Tensor:
    if algorithm not in (0, 1):
        raise RuntimeError(f"algorithm is {algorithm}, want 0, or 1 for folded filters, on CUDA devices")
    check_dtype("weight", weight)
    scale, shift = scale_shift(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    return packed(weight, scale, shift, weight.dtype, folded=algorithm == 1)


def packed(weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, *, folded: bool) -> Tensor:
    """Filters in ``dtype``, scale and shift as ``ops.cuda_unpack`` reads them; folded: the filters hold the scale."""
    channels, at = weight.shape[0], _padded(weight.shape[0])
    filters = (weight.double() * scale.double()[:, None, None, None] if folded else weight).to(dtype)
    out = torch.zeros(ops.cuda_packed_size(filters), dtype=torch.float32, device=weight.device)
    out[:channels] = 1 if folded else scale
    out[at : at + channels] = shift
    out[2 * at :].view(dtype)[:channels] = shift
    out[3 * at :].view(dtype)[: filters.numel()] = filters.permute(0, 2, 3, 1).reshape(-1)
    return out


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in ops.DTYPES["cuda"]:
        raise RuntimeError(f"{name} has dtype {t.dtype}, want float16, bfloat16 or float32")


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Operands:
    """What a layer computes with.

    x, residual, y: channels_last, one dtype; ``y`` takes the result of kernels that do not allocate it.
    weight: ``[K, R, S, C]``. scale, shift: ``[K]``, float32. bias: the shift in the dtype of ``x``, where the scale is
    in the filters.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    y: Tensor
    bias: Tensor | None = None

    def run(self, layer: Layer, choice: Choice) -> Tensor:
        """``[relu](conv2d(x, weight) * scale + shift [+ residual])`` by ``choice``."""
        if isinstance(choice, Config | CudaConfig):
            start = cuda_conv.conv_bn_relu if isinstance(choice, CudaConfig) else kernels.conv_bn_relu
            start(layer, choice, self.x, self.weight, self.scale, self.shift, self.residual, self.y)  # type: ignore[arg-type]
            return self.y
        if choice == LIBRARY:
            return kernels.library(layer, self.x, self.weight, self.scale, self.shift, self.residual)
        if self.bias is None:
            raise RuntimeError(f"{choice} wants filters that hold batch norm's scale")
        bias = self.bias if layer.shifted else None
        return library.run(choice, layer, self.x, self.weight, bias, self.residual)


# So many layers' filters take turns in a measurement, as a network's do.
_TRIALS = 8


def trials(layer: Layer, device: torch.device) -> list[Callable[[Choice], object]]:
    """Runs of a layer on numbers of their own, for a measurement: ``run(choice)``.

    The input is in the cache as far as it fits, as behind the layer that writes it.
    """

    first = _operands(layer, device)
    return [functools.partial(dataclasses.replace(first, weight=w).run, layer) for w in _weights(layer, device)]


def _weights(layer: Layer, device: torch.device) -> list[Tensor]:
    shape = (_TRIALS, layer.out_channels, *layer.kernel, layer.channels)
    return list(torch.randn(shape, device=device, dtype=layer.dtype) * layer.products**-0.5)


def _operands(layer: Layer, device: torch.device) -> Operands:
    """Of the layer's sizes; random numbers."""

    def image(channels: int, height: int, width: int) -> Tensor:
        shape = (layer.batch, height, width, channels)
        return torch.randn(shape, device=device, dtype=layer.dtype).permute(0, 3, 1, 2)

    x = image(layer.channels, layer.height, layer.width)
    y = image(layer.out_channels, layer.out_height, layer.out_width)
    weight = torch.empty((layer.out_channels, *layer.kernel, layer.channels), device=device, dtype=layer.dtype)
    shift = torch.randn(layer.out_channels, device=device)
    bias = shift.to(layer.dtype) if layer.folded else None
    residual = torch.randn_like(y) if layer.residual else None
    return Operands(x, weight, torch.ones_like(shift), shift, residual, y, bias)


def prepare(layers: Sequence[Layer], device: torch.device) -> None:
    """Compiles what the choices of ``layers`` may want, all at once: in a row it takes a minute a network."""
    if launch.is_simulated():
        return
    wanted = [(layer, c) for layer in dict.fromkeys(layers) for c in tuner(device).wanted(layer, _named())]
    compiled = [(layer, c) for layer, c in wanted if isinstance(c, Config)]
    if len(compiled) < 2:
        return
    # The compiler and ptxas work outside of Python's lock.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        torch.cuda.device(device),
        triton.AsyncCompileMode(pool, ignore_errors=True),
        launch.compile_only(),
    ):
        for layer, choice in compiled:
            _operands(layer, torch.device("meta")).run(layer, choice)


def _named() -> str:
    backend = backends.selected()
    return backend if backend in ("cuda", "triton") else "auto"


def choose(layer: Layer, device: torch.device) -> Choice:
    """What runs the layer there, measured if need be on numbers of its own."""
    return tuner(device).choose(layer, lambda: trials(layer, device), _named())


def wants_folded(layer: Layer, device: torch.device) -> bool:
    """Whether the layer's choice reads filters that hold batch norm's scale."""
    return choose(layer, device) in (library.CUDNN, library.CUBLASLT)


def layer_of(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool,
    relu: bool,
    folded: bool = False,
    shifted: bool = True,
) -> Layer:
    """shape: of the input. kernel: ``[K, R, S]``."""
    batch, channels, height, width = shape
    k, r, s = kernel
    return Layer(
        *(batch, height, width, channels, k, (r, s), (stride[0], stride[1]), (padding[0], padding[1])),
        *(dtype, precision(dtype), residual, relu),
        folded=folded,
        shifted=shifted,
    )


def _run(layer: Layer, operands: Operands) -> Tensor:
    if layer.pixels > MOST_PIXELS:
        raise RuntimeError(f"x gives {layer.pixels} output pixels, more than the {MOST_PIXELS} that one launch covers")
    if operands.y.numel() == 0:
        return operands.y
    x, residual = operands.x, operands.residual
    operands = dataclasses.replace(
        operands,
        x=x.contiguous(memory_format=torch.channels_last),
        residual=None if residual is None else residual.contiguous(memory_format=torch.channels_last),
    )
    return operands.run(layer, choose(layer, x.device))


def residual_stage(x: Tensor, filters: list[Tensor], layers: list[int], pool: Sequence[int] = ()) -> Tensor:
    fields = ops.LAYER_FIELDS
    if x.dim() != 4:
        raise RuntimeError(f"x has {x.dim()} dimensions, want 4: [batch, channels, height, width]")
    check_dtype("x", x)
    if len(layers) != fields * len(filters) or not filters:
        raise RuntimeError(f"layers has {len(layers)} integers, want {fields} for each of {len(filters)} filters")
    for packed in filters:
        if packed.device != x.device or packed.dtype != torch.float32:
            raise RuntimeError(f"filters has one on {packed.device} in {packed.dtype}, want {x.device} and float32")
    if pool:
        return _pooled_stage(x, filters[0], layers, pool)
    last_use = {layers[i + j]: i // fields for i in range(0, len(layers), fields) for j in (0, 1)}
    values: list[Tensor | None] = [x]
    for i, packed in enumerate(filters):
        source, added, flags, k, r, s, *sizes = layers[i * fields : (i + 1) * fields]
        image = values[source]
        residual = values[added] if added >= 0 else None
        if image is None or (added >= 0 and residual is None):
            raise RuntimeError(f"layers has a layer {i} that reads a value {source} or {added} that is not there")
        stride, padding = sizes[:2], sizes[2:]
        height, width = (
            ops.conv_size(n, p, size, t) for n, p, size, t in zip(image.shape[2:], padding, (r, s), stride, strict=True)
        )
        y = ops.empty_image(image, k, height, width)
        if residual is not None and residual.shape != y.shape:
            raise RuntimeError(f"residual of layer {i} has shape {tuple(residual.shape)}, want {tuple(y.shape)}")
        weight, scale, shift, bias = ops.cuda_unpack(packed, (k, r, s, image.shape[1]), x.dtype)
        layer = layer_of(
            *(image.shape, (k, r, s), stride, padding, x.dtype),
            residual=residual is not None,
            relu=bool(flags & ops.RELU),
            folded=bool(flags & ops.FOLDED),
            shifted=not flags & ops.DEFERRED,
        )
        operands = Operands(image, weight, scale, shift, residual, y, bias if layer.folded else None)
        values.append(_run(layer, operands))
        # What no later layer reads goes back to the allocator.
        for v in (source, added):
            if v >= 0 and last_use[v] == i:
                values[v] = None
    result = values[-1]
    assert result is not None
    return result


def _pooled_stage(x: Tensor, packed: Tensor, layers: list[int], pool: Sequence[int]) -> Tensor:
    """One convolution and the pooling behind it in one launch; no other chain has a kernel for it."""
    layer = cuda_stem.pooled_layer(tuple(layers), x.shape, x.dtype, precision(x.dtype), tuple(pool))
    if layer is None:
        raise RuntimeError(
            f"pool is {list(pool)}, want none: on CUDA devices max pooling of 2 x 2, or of 3 x 3 with stride 2 and "
            "padding 1, runs with one convolution of 7 x 7 or 3 x 3 and stride 2 from 3 channels to a multiple of 16"
        )
    weight, scale, shift, _ = ops.cuda_unpack(packed, (layer.out_channels, *layer.kernel, layer.channels), x.dtype)
    sizes = ((layer.out_height, layer.out_width), pool[4:], pool[:2], pool[2:4])
    y = ops.empty_image(x, layer.out_channels, *(ops.conv_size(*size) for size in zip(*sizes, strict=True)))
    cuda_stem.conv_bn_relu_pool(layer, x, weight, scale, shift, pool, y)
    return y


def _conv(
    relu: bool, x: Tensor, residual: Tensor | None, weight: Tensor, vectors: Sequence[Tensor | None], rest: tuple
) -> Tensor:
    eps, stride, padding = rest
    y = (
        ops.fake_conv(x, weight, *vectors, eps, stride, padding)
        if residual is None
        else ops.fake_add_layer(x, residual, weight, *vectors, eps, stride, padding)
    )
    check_dtype("x", x)
    if residual is not None and residual.dtype != x.dtype:
        raise RuntimeError(f"residual has dtype {residual.dtype}, want {x.dtype} as x has")
    scale, shift = scale_shift(weight, *vectors, eps)
    filters = weight.permute(0, 2, 3, 1).contiguous()
    k, _, *taps = weight.shape
    layer = layer_of(x.shape, (k, *taps), stride, padding, x.dtype, residual=residual is not None, relu=relu)
    return _run(layer, Operands(x, filters, scale, shift, residual, y))


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    ops.check_add_relu(a, b)
    return elementwise.add_relu(a, b)


def conv_bn(x: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(False, x, None, weight, rest[:5], rest[5:])


def conv_bn_relu(x: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(True, x, None, weight, rest[:5], rest[5:])


def conv_bn_add_relu(x: Tensor, residual: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(True, x, residual, weight, rest[:5], rest[5:])
