"""Fakes, gradients and autocast of ``conv_bn``, ``conv_bn_relu`` and ``conv_bn_add_relu``, for :mod:`.register`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .arguments import DTYPES, VECTORS, check_tensor, shapeless
from .conv_gradient import convolution_backward
from .spec import conv_size, empty_image
from .unfused import channel, unfused_conv

__all__ = ["OPERATORS", "fake_add_layer", "fake_conv", "register", "unfused_operator"]

# Image arguments of each operator: x, and the residual.
OPERATORS = {"conv_bn": 1, "conv_bn_relu": 1, "conv_bn_add_relu": 2}


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


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.stride, ctx.padding = inputs
    ctx.has_residual = len(inputs) == 11
    ctx.save_for_backward(*tensors, output)


def _conv_backward(ctx: Any, grad: Tensor, relu: bool) -> tuple[Any, ...]:
    """Gradients of ``[relu](batch_norm(conv2d(x)) [+ residual])`` with fixed statistics, on aten's operators."""
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
        scaled = grad * channel(scale)  # float32 for bfloat16 images with float32 statistics: the reductions need it
        grad_z = scaled.to(grad.dtype)
        if need_gamma or need_var:
            z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), ctx.stride, ctx.padding)
            normalized = (z - channel(mean)) * channel(inv_std)
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


def _autocast_conv(op: str, inputs: int) -> Any:
    """The autocast kernel: casts images and filters; biases and statistics keep their dtype."""

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


def unfused_operator(op: str) -> Any:
    """The operator on PyTorch's own operators, with the operator's signature."""
    inputs = OPERATORS[op]

    def unfused(*args: Any) -> Tensor:
        weight, bias, *bn, stride, padding = args[inputs:]
        return unfused_conv(op, list(args[:inputs]), weight, bias, tuple(bn), stride, padding, [1, 1], 1)

    return unfused


def register(library: torch.library.Library) -> None:
    for op, inputs in OPERATORS.items():
        name = f"resnet_fast::{op}"
        fake = shapeless(op, fake_conv if inputs == 1 else fake_add_layer)
        torch.library.register_fake(name, fake, lib=library)

        def backward(ctx: Any, grad: Tensor, relu: bool = op != "conv_bn") -> tuple[Any, ...]:
            return _conv_backward(ctx, grad, relu)

        torch.library.register_autograd(name, backward, setup_context=_setup_conv, lib=library)
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(op, _autocast_conv(op, inputs), key)
