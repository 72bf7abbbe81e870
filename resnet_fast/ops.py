"""The fused operators as functions, and what PyTorch needs to know of them: shapes, gradients, autocast.

Every function takes tensors of any memory format and returns a new tensor, ``channels_last`` where it is an image. On
CPUs these functions compute in float32 for float32 and bfloat16, in float64 for float64; other dtypes, devices without
a kernel, dilation, groups and filters of more than 1024 taps run on PyTorch's own operators, which
:func:`resnet_fast.backends.fallbacks` then shows. So does everything within forward-mode differentiation and
``torch.func``. The operators have derivatives of any order.

Source: batch norm by fixed statistics is an affine map per channel (Ioffe and Szegedy 2015, section 3.1) and folds
into the convolution before it: ``weight * s`` and ``(bias - mean) * s + bn_bias``, ``s = bn_weight / sqrt(var + eps)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, flops
from .arguments import DTYPES as DTYPES
from .arguments import MOST_TAPS, VECTORS, check_add_relu, check_conv, check_tensor, is_autocast, raised, shapeless
from .conv_gradient import convolution_backward
from .differentiation import Registry

__all__ = ["add_relu", "conv_bn", "conv_bn_add_relu", "conv_bn_relu"]

IntPair = int | tuple[int, int]


def _pair(name: str, value: IntPair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} is {value!r}, want an int or two of them")
    return pair


def _unfused_reason(op: str, x: Tensor) -> str | None:
    """Why the kernel cannot run, or None. Autocast is the operator's own affair."""
    kind = backends.kind(x)
    reason = backends.unfused_reason(op, kind)
    # add_relu has a kernel in CUDA C++ that takes float64, too; meta tensors are for shapes.
    if reason is None and x.dtype not in DTYPES.get(kind, (x.dtype,)) and (op, kind) != ("add_relu", "cuda"):
        return f"no kernel for {x.dtype}"
    if reason is None and not torch.compiler.is_compiling():
        return backends.transform_reason()
    return reason


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)`` in one pass over memory. Equivalent to ``F.relu(a + b)``.

    Args:
        a: any shape and layout; float32, float64 or bfloat16 (on CUDA devices float16, too).
        b: shape, dtype and device of ``a``: there is no broadcasting.

    Returns:
        A new tensor with the layout of ``a``. NaN and the sign of zero are kept, as ``F.relu`` keeps them.

    Raises:
        RuntimeError: ``b`` differs from ``a`` in shape, dtype or device, one of them is sparse, or no operator of
            PyTorch takes their dtype; the message names the argument.
        TypeError: one is not a tensor.
    """
    try:
        reason = _unfused_reason("add_relu", a)
        if reason is None:
            return torch.ops.resnet_fast.add_relu(a, b)
        backends.decline("add_relu", reason)
        if not torch.compiler.is_compiling():
            check_add_relu(a, b, failed=False)
        return F.relu(a + b)
    except Exception:
        wrong = raised(check_add_relu, a, b)
        if wrong is not None:
            raise wrong from None
        raise


def conv_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """``batch_norm(conv2d(x, weight, bias))`` by the running statistics; arguments as for :func:`conv_bn_relu`."""
    return _conv(
        "conv_bn",
        [x],
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        eps,
        stride,
        padding,
        dilation,
        groups,
    )


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(batch_norm(conv2d(x, weight, bias)))`` by the running statistics.

    Equivalent to ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride, padding), running_mean, running_var,
    bn_weight, bn_bias, training=False, eps=eps))``; without statistics the batch norm is left out.

    Args:
        x: ``[N, C, H, W]``, float32, float64 or bfloat16, any memory format.
        weight: ``[K, C, R, S]``, dtype of ``x``.
        bias, bn_weight, bn_bias, running_mean, running_var: ``[K]``, any of these dtypes. The statistics come
            together or not at all, and ``bn_weight`` and ``bn_bias`` only with them.
        eps: added to the variance, at least 0.
        stride, padding, dilation: an int or ``(height, width)``; ``groups``: as in ``F.conv2d``. With dilation, groups
            or a filter of more than 1024 taps PyTorch's own operators run.

    Returns:
        ``[N, K, (H + 2 padding - R) // stride + 1, ...]``, dtype of ``x``, channels_last. NaN is kept by the ReLU.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit; the message names the argument.
        TypeError: an argument is of another type.
        ValueError: a pair is not a pair.
    """
    return _conv(
        "conv_bn_relu",
        [x],
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        eps,
        stride,
        padding,
        dilation,
        groups,
    )


def conv_bn_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(batch_norm(conv2d(x, weight, bias)) + residual)``; arguments as for :func:`conv_bn_relu`.

    Args:
        residual: shape of the result, dtype of ``x``, any memory format; it may be ``x`` itself.
    """
    return _conv(
        "conv_bn_add_relu",
        [x, residual],
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        eps,
        stride,
        padding,
        dilation,
        groups,
    )


def _conv(
    op: str,
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
) -> Tensor:
    pairs = [_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)]
    vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
    arguments = (op, inputs, weight, vectors, eps, pairs, groups)
    try:
        reason = _unfused_reason(op, inputs[0])
        if reason is None and pairs[2] != [1, 1]:
            reason = f"dilation {dilation}"
        if reason is None and groups != 1:
            reason = f"{groups} groups"
        if reason is None:
            reason = taps_reason(weight)
        if reason is None:
            return getattr(torch.ops.resnet_fast, op)(*inputs, weight, *vectors, eps, pairs[0], pairs[1])
        backends.decline(op, reason)
        if not torch.compiler.is_compiling():
            check_conv(*arguments, failed=False)
        bn = (bn_weight, bn_bias, running_mean, running_var, eps)
        return unfused_conv(op, inputs, weight, bias, bn, pairs[0], pairs[1], pairs[2], groups)
    except Exception:
        wrong = raised(check_conv, *arguments)
        if wrong is not None:
            raise wrong from None
        raise


def taps_reason(weight: Tensor) -> str | None:
    """Why no kernel takes filters of this size, or None."""
    *_, rows, columns = weight.shape
    return f"a filter of {rows} x {columns}, more than {MOST_TAPS} taps" if rows * columns > MOST_TAPS else None


BatchNorm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]


def unfused_conv(
    op: str,
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The same on PyTorch's own operators."""
    # The kernels take vectors of another dtype than the images have; PyTorch's own operators do not.
    bias = bias if bias is None or is_autocast(weight) else bias.to(weight.dtype)
    y = F.conv2d(inputs[0], weight, bias, stride, padding, dilation, groups)
    bn_weight, bn_bias, running_mean, running_var = _batch_norm_vectors(y, bn[:4])
    eps = bn[4]
    if running_mean is not None and not _differentiates(running_mean, running_var):
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training=False, eps=eps)
    elif running_mean is not None and running_var is not None:
        # Written out: F.batch_norm has no derivatives by the statistics, these operators have.
        scale = torch.rsqrt(running_var + eps)
        scale = scale if bn_weight is None else scale * bn_weight
        wide = (y - _channel(running_mean)) * _channel(scale)
        y = (wide if bn_bias is None else wide + _channel(bn_bias)).to(y.dtype)
    if len(inputs) > 1:
        y = y + inputs[1]
    return y if op == "conv_bn" else F.relu(y)


def _differentiates(*statistics: Tensor | None) -> bool:
    """Whether derivatives by the statistics may be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in statistics):
        return True
    return not torch.compiler.is_compiling() and backends.transform_reason() is not None


def _batch_norm_vectors(y: Tensor, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In the dtype of ``y``, or all in float32 beside a narrower one: what F.batch_norm takes. Dense, as PyTorch's
    gradient for images in channels_last reads them."""
    narrow = y.dtype in (torch.bfloat16, torch.float16)
    if narrow and all(t is None or t.dtype == y.dtype for t in vectors):
        return [t if t is None else t.contiguous() for t in vectors]
    dtype = torch.float32 if narrow else y.dtype
    return [t if t is None else t.to(dtype).contiguous() for t in vectors]


# What follows registers shapes, gradients and autocast with the operators that the extension defines.


def conv_size(size: Any, padding: int, kernel: int, stride: int) -> Any:
    """Height or width of a convolution's output."""
    return (size + 2 * padding - kernel) // stride + 1


def empty_image(x: Tensor, channels: Any, height: Any, width: Any) -> Tensor:
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def fake_conv(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *vectors, _, stride, padding = rest
    check_tensor("x", x)
    check_tensor("weight", weight, ("x", x))
    torch._check(x.dim() == 4, lambda: f"x has {x.dim()} dimensions, want 4: [batch, channels, height, width]")
    torch._check(weight.dim() == 4, lambda: f"weight has {weight.dim()} dimensions, want 4")
    torch._check(
        x.shape[1] == weight.shape[1], lambda: f"x has {x.shape[1]} channels, want {weight.shape[1]} as weight has"
    )
    torch._check(x.dtype == weight.dtype, lambda: f"weight has dtype {weight.dtype}, want {x.dtype} as x has")
    for name, t in zip(VECTORS, vectors, strict=True):
        if t is not None:
            check_tensor(name, t, ("x", x))
            torch._check(
                t.shape == weight.shape[:1],
                lambda name=name, t=t: (
                    f"{name} has shape {list(t.shape)}, want [{weight.shape[0]}] as weight has filters"
                ),
            )
    torch._check(min(stride) > 0, lambda: f"stride is {stride}, want at least 1")
    torch._check(min(padding) >= 0, lambda: f"padding is {padding}, want at least 0")
    height = conv_size(x.shape[2], padding[0], weight.shape[2], stride[0])
    width = conv_size(x.shape[3], padding[1], weight.shape[3], stride[1])
    for size in (height, width):
        torch._check(
            size > 0,
            lambda: f"x has shape {list(x.shape)}, smaller with padding {padding} than weight {list(weight.shape)}",
        )
    return empty_image(x, weight.shape[0], height, width)


def fake_add_layer(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_tensor("x", x)
    check_tensor("residual", residual, ("x", x))
    out = fake_conv(x, weight, *rest)
    torch._check(
        residual.shape == out.shape,
        lambda: f"residual has shape {tuple(residual.shape)}, want {tuple(out.shape)} as the convolution gives",
    )
    return out


def _fake_add_relu(a: Tensor, b: Tensor) -> Tensor:
    check_add_relu(a, b, failed=False)
    return torch.empty_like(a)


def _fake_pack(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    algorithm: int = 0,
) -> Tensor:
    if backends.kind(weight) == "cuda":
        return weight.new_empty(cuda_packed_size(weight), dtype=torch.float32)
    if algorithm >= 3:  # in bfloat16, by pairs of channels (bf16_filters.h)
        k, c, r, s = weight.shape
        rows = (k + 15) // 16 * 16
        products = r * s * ((c + 1) // 2 * 2) if algorithm == 3 else 16 * ((c + 15) // 16 * 16)
        return weight.new_empty(32 + rows * (2 + products), dtype=torch.bfloat16)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    line = 64 // dtype.itemsize  # elements of a cache line
    k, c, r, s = weight.shape
    points = 36 if algorithm == 1 else r * s
    return weight.new_empty(line + (k + line - 1) // line * line * (1 + c * points), dtype=dtype)


def cuda_packed_size(weight: Tensor) -> Any:
    """Length in floats of a filter packed for CUDA devices: scale, shift, bias, each padded to 16 bytes, and weights.

    Where the scale is in the weights it is one, and the bias is the shift in their dtype, as libraries want it.
    """
    return 3 * ((weight.shape[0] + 3) // 4 * 4) + (weight.numel() * weight.element_size() + 3) // 4


def cuda_unpack(
    packed: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The filters ``shape`` = [K, R, S, C], scale, shift and bias of a filter packed for CUDA devices."""
    k, r, s, c = shape
    at = (k + 3) // 4 * 4
    filters = packed[3 * at :].view(dtype)[: k * r * s * c]
    if filters.numel() != k * r * s * c:
        raise RuntimeError(f"filters has one of {packed.numel()} floats, too few for {k} x {c} x {r} x {s} of {dtype}")
    return filters.view(shape), packed[:k], packed[at : at + k], packed[2 * at : 3 * at].view(dtype)[:k]


LAYER_FIELDS = 10
# On CUDA devices a layer's third field holds these bits: it ends in a ReLU; its filters hold batch norm's scale; its
# shift is zero, because the layer that reads its result adds it.
RELU, FOLDED, DEFERRED = 1, 2, 4


def _fake_stage(x: Tensor, filters: list[Tensor], layers: list[int], pool: Sequence[int] = ()) -> Tensor:
    maps: list[Any] = [x.shape[1:]]
    for i in range(0, len(layers), LAYER_FIELDS):
        source, _, _, k, r, s, stride_h, stride_w, pad_h, pad_w = layers[i : i + LAYER_FIELDS]
        _, h, w = maps[source]
        maps.append((k, conv_size(h, pad_h, r, stride_h), conv_size(w, pad_w, s, stride_w)))
    k, h, w = maps[-1]
    if pool:
        r, s, stride_h, stride_w, pad_h, pad_w = pool
        h, w = conv_size(h, pad_h, r, stride_h), conv_size(w, pad_w, s, stride_w)
    return empty_image(x, k, h, w)


def _fake_network(x: Tensor, packed: Tensor, layers: list[int], classes: int = 0) -> Tensor:
    return _fake_stage(x, [], layers) if classes == 0 else x.new_empty((x.shape[0], classes))


def _fake_conv_moments(
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    algorithm: int,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    y = fake_conv(x, weight.to(x.dtype), bias, None, None, None, None, 0.0, stride, padding)
    return y, statistics_rows(x, 2, weight.shape[0] if moments else 0)


def statistics_rows(like: Tensor, rows: int, channels: Any) -> Tensor:
    """Statistics, in the type of the arithmetic."""
    return like.new_empty((rows, channels), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_bn_apply(y: Tensor, *rest: Any) -> Tensor:
    return empty_image(y, *y.shape[1:])


def _fake_bn_backward_sums(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_image(grad, *grad.shape[1:]), statistics_rows(grad, 3, grad.shape[1])


def _fake_channel_sums(grad: Tensor) -> Tensor:
    return statistics_rows(grad, 1, grad.shape[1])[0]


def _fake_max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    out = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    return empty_image(x, *out.shape[1:]), x.new_empty((out.numel() + 1) // 2, dtype=torch.uint8)


def _fake_max_pool_backward(grad: Tensor, places: Tensor, size: list[int], *rest: Any) -> Tensor:
    return empty_image(grad, grad.shape[1], *size)


def _fake_conv_backward(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    algorithm: int,
    need_x: bool,
    need_weight: bool,
    residual: Tensor | None,
    finish: bool,
    ys: list[Tensor],
    means: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_image(x if need_x else x[:0], *x.shape[1:])
    return dx, torch.empty_like(weight), statistics_rows(x, 3 if finish else 0, x.shape[1])


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *ctx.others, ctx.eps, ctx.stride, ctx.padding = inputs
    tensors = ctx.others
    ctx.has_residual = len(inputs) == 11
    ctx.others = None
    ctx.save_for_backward(*tensors, output)


def _channel(t: Tensor) -> Tensor:
    return t[None, :, None, None]


def _conv_backward(ctx: Any, grad: Tensor, relu: bool) -> tuple[Any, ...]:
    """Gradients of conv -> batch norm by fixed statistics -> [+ residual] -> [ReLU], each in its plain form."""
    if ctx.has_residual:
        x, _, weight, bias, gamma, beta, mean, var, output = ctx.saved_tensors
    else:
        x, weight, bias, gamma, beta, mean, var, output = ctx.saved_tensors
    need_x, *need_residual, need_w, need_b, need_gamma, need_beta, need_mean, need_var = ctx.needs_input_grad[:-3]
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    grad_residual = [grad if needed else None for needed in need_residual]
    grad_z = grad  # of the convolution's output
    grad_gamma = grad_beta = grad_mean = grad_var = None
    if mean is not None:
        inv_std = torch.rsqrt(var + ctx.eps)
        scale = inv_std if gamma is None else inv_std * gamma
        scaled = grad * _channel(scale)  # float32 where images are bfloat16 and statistics float32: sums need it
        grad_z = scaled.to(grad.dtype)
        if need_gamma or need_var:
            z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), ctx.stride, ctx.padding)
            normalized = (z - _channel(mean)) * _channel(inv_std)
            grad_scaled = (grad * normalized).sum((0, 2, 3))
            grad_gamma = grad_scaled.to(gamma.dtype) if need_gamma else None
            if need_var:
                grad_var = (-0.5 * grad_scaled * scale * inv_std).to(var.dtype)
        if need_beta:
            grad_beta = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, beta.dtype)).to(beta.dtype)
        if need_mean:
            grad_mean = -scaled.sum((0, 2, 3)).to(mean.dtype)
    mask = [need_x, need_w, need_b]
    grad_x, grad_w, grad_b = (
        convolution_backward(grad_z, x, weight, [weight.shape[0]], ctx.stride, ctx.padding, mask)
        if any(mask)
        else (None, None, None)
    )
    if grad_b is not None:
        grad_b = grad_b.to(bias.dtype)
    return (grad_x, *grad_residual, grad_w, grad_b, grad_gamma, grad_beta, grad_mean, grad_var, None, None, None)


def _add_relu_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _add_relu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (output,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, output, 0)
    return grad, grad


def without_gradient(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"resnet_fast::{op} has no gradient of its own: use conv_bn_relu and its kin, or an uncompiled module"
        )

    return backward


def _autocast_conv(op: str, inputs: int) -> Any:
    """Images and filters in autocast's dtype; the statistics stay as they are."""

    def kernel(*args: Any) -> Tensor:
        images, (weight, bias), rest = args[:inputs], args[inputs : inputs + 2], args[inputs + 2 :]
        for name, t in (("x", images[0]), ("residual", images[-1]), ("weight", weight)):
            check_tensor(f"{op}: {name}", t, ("x", images[0]) if t is not images[0] else None)
        device, kind = images[0].device.type, backends.kind(images[0])
        dtype = torch.get_autocast_dtype(device)
        if not backends.has_kernel(op, kind) or dtype not in DTYPES.get(kind, (dtype,)):
            *bn, stride, padding = rest
            return unfused_conv(op, list(images), weight, bias, tuple(bn), stride, padding, [1, 1], 1)
        with torch.autocast(device, enabled=False):
            cast = [_autocast_to(t, dtype) for t in (*images, weight)]
            return getattr(torch.ops.resnet_fast, op)(*cast, bias, *rest)

    return kernel


def _autocast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


_OPERATORS = ("add_relu", "conv_bn", "conv_bn_relu", "conv_bn_add_relu", "pack_conv_bn", "residual_stage")


_FOLDED: dict[str, Any] = {
    "pack_conv_bn": _fake_pack,
    "residual_stage": _fake_stage,
    "residual_network": _fake_network,
}


_TRAINING: dict[str, Any] = {
    "conv_moments": _fake_conv_moments,
    "bn_apply": _fake_bn_apply,
    "bn_backward_sums": _fake_bn_backward_sums,
    "channel_sums": _fake_channel_sums,
    "conv_backward": _fake_conv_backward,
}


_ON_CPUS: dict[str, Any] = {"max_pool": _fake_max_pool, "max_pool_backward": _fake_max_pool_backward}


def _triton_operator(op: str) -> Any:
    """The kernel of ``op`` on CUDA devices. Triton takes a second to import: that is left to the first call."""

    def kernel(*args: Any) -> Tensor:
        from ._triton import OPERATORS

        return OPERATORS[op](*args)

    return kernel


def _unfused_operator(op: str, inputs: int) -> Any:
    def unfused(*args: Any) -> Tensor:
        weight, bias, *bn, stride, padding = args[inputs:]
        return unfused_conv(op, list(args[:inputs]), weight, bias, tuple(bn), stride, padding, [1, 1], 1)

    return unfused


_UNFUSED: dict[str, Any] = {
    "conv_bn": _unfused_operator("conv_bn", 1),
    "conv_bn_relu": _unfused_operator("conv_bn_relu", 1),
    "conv_bn_add_relu": _unfused_operator("conv_bn_add_relu", 2),
    "add_relu": lambda a, b: F.relu(a + b),
}


def _register_network(library: Any) -> None:
    """The stage kernels are CUDA C++ behind a launcher in Python: Triton is not needed."""
    from . import residual_network

    if residual_network.kernels():
        residual_network.register()
        library.impl("residual_network", residual_network.residual_network, "CUDA")


def _register() -> None:
    library = Registry("resnet_fast", "IMPL", _UNFUSED)
    for op, inputs in (("conv_bn", 1), ("conv_bn_relu", 1), ("conv_bn_add_relu", 2)):
        name = f"resnet_fast::{op}"
        fake = shapeless(op, fake_conv if inputs == 1 else fake_add_layer)
        torch.library.register_fake(name, fake, lib=library)

        def backward(ctx: Any, grad: Tensor, relu: bool = op != "conv_bn") -> tuple[Any, ...]:
            return _conv_backward(ctx, grad, relu)

        torch.library.register_autograd(name, backward, setup_context=_setup_conv, lib=library)
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(op, _autocast_conv(op, inputs), key)
    torch.library.register_fake("resnet_fast::add_relu", _fake_add_relu, lib=library)
    torch.library.register_autograd(
        "resnet_fast::add_relu", _add_relu_backward, setup_context=_add_relu_setup, lib=library
    )
    for op, fake in {**_FOLDED, **_TRAINING, **_ON_CPUS}.items():
        torch.library.register_fake(f"resnet_fast::{op}", shapeless(op, fake), lib=library)
    for op in (*_FOLDED, *_TRAINING, *_ON_CPUS):
        torch.library.register_autograd(f"resnet_fast::{op}", without_gradient(op), lib=library)
    _register_network(library)
    if find_spec("triton") is not None:
        backends.note_kernel("add_relu")
        for op in (*_OPERATORS, *_TRAINING):
            if not backends.has_kernel(op, "cuda"):  # in CUDA C++
                library.impl(op, _triton_operator(op), "CUDA")
    for op in (
        *_OPERATORS,
        *_TRAINING,
        *_ON_CPUS,
        "conv_bn_relu_launch",
        "conv_bn_relu_pool_launch",
        "avg_pool_flatten_launch",
        "residual_network",
    ):
        backends.note_kernel(op)
    # Registrations live as long as their library object.
    globals()["_library"] = library


if backends.loaded():
    _register()
    flops.register_when_imported()
