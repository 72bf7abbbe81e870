"""The operators of ``kernels/csrc/ops.cpp`` on CUDA devices: checks, layouts, and a kernel for each layer.

Batch norm is not folded into 16-bit filters, which would round them once more: its scale and shift are applied to the
float32 sums. So packed filters are scale, shift and the filters as ``[K, R, S, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast import backends, ops

from . import add_relu as elementwise
from . import conv_bn_relu as kernels
from . import cuda_conv, cuda_stem
from .configs import Layer
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
    if algorithm != 0:
        raise RuntimeError(f"algorithm is {algorithm}, want 0 on CUDA devices")
    check_dtype("weight", weight)
    scale, shift = scale_shift(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    channels, at = weight.shape[0], _padded(weight.shape[0])
    packed = torch.zeros(ops.cuda_packed_size(weight), dtype=torch.float32, device=weight.device)
    packed[:channels] = scale
    packed[at : at + channels] = shift
    packed[2 * at :].view(weight.dtype)[: weight.numel()] = weight.permute(0, 2, 3, 1).reshape(-1)
    return packed


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in ops.DTYPES["cuda"]:
        raise RuntimeError(f"{name} has dtype {t.dtype}, want float16, bfloat16 or float32")


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def _layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """One convolution with its epilogue into ``y``, or, by the library, into a tensor of its own."""
    k, r, s, c = weight.shape
    layer = Layer(
        *(x.shape[0], *x.shape[2:], c, k, (r, s)),
        *((stride[0], stride[1]), (padding[0], padding[1]), x.dtype, precision(x.dtype), residual is not None, relu),
    )
    if layer.pixels > MOST_PIXELS:
        raise RuntimeError(f"x gives {layer.pixels} output pixels, more than the {MOST_PIXELS} that one launch covers")
    if y.numel() == 0:
        return y
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)

    def run(choice: Choice) -> Tensor:
        if choice == LIBRARY:
            return kernels.library(layer, x, weight, scale, shift, residual)
        launch = cuda_conv.conv_bn_relu if isinstance(choice, CudaConfig) else kernels.conv_bn_relu
        launch(layer, choice, x, weight, scale, shift, residual, y)  # type: ignore[arg-type]
        return y

    backend = backends.selected()
    return run(tuner(x.device).choose(layer, run, backend if backend in ("cuda", "triton") else "auto"))


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
        source, added, relu, k, r, s, *sizes = layers[i * fields : (i + 1) * fields]
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
        weight, scale, shift = ops.cuda_unpack(packed, (k, r, s, image.shape[1]), x.dtype)
        values.append(_layer(image, weight, scale, shift, residual, y, bool(relu), stride, padding))
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
    weight, scale, shift = ops.cuda_unpack(packed, (layer.out_channels, *layer.kernel, layer.channels), x.dtype)
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
    return _layer(x, filters, scale, shift, residual, y, relu, stride, padding)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    ops.check_add_relu(a, b)
    return elementwise.add_relu(a, b)


def conv_bn(x: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(False, x, None, weight, rest[:5], rest[5:])


def conv_bn_relu(x: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(True, x, None, weight, rest[:5], rest[5:])


def conv_bn_add_relu(x: Tensor, residual: Tensor, weight: Tensor, *rest) -> Tensor:
    return _conv(True, x, residual, weight, rest[:5], rest[5:])
