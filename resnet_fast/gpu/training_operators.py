"""The training operators on CUDA devices: check arguments, choose the fastest form of each convolution, and run it.

There are two forms: aten's convolution between elementwise passes that normalise and reduce, and Triton kernels that do
both in the prologue and epilogue of the convolution. Forward, data gradient and weight gradient are chosen separately.
:mod:`.register` registers the operators; :mod:`.training` calls :func:`convolve`, :func:`sums` and :func:`gradients`,
which leave reductions as partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._triton import batch_norm
from .._triton import conv_backward as backward
from .._triton import conv_bn_stats as forward
from .._triton.batch_norm import as_rows
from .._triton.filters import like, packed
from .._triton.finalize import PartialStats, finalize_stats, finalize_sums
from ..ops.conv_autograd import fake_conv
from ..ops.conv_gradient import convolution_backward
from ..ops.training import statistics_rows
from . import tune
from .candidates.hopper_training import TrainingConfig
from .candidates.triton import Config
from .candidates.weight_gradient import GradientConfig
from .checks import check_algorithm, check_dtype, check_image, check_pixels, check_rows, check_sums, fail
from .cuda import hopper_training as hopper
from .cuda import weight_gradient as hopper_weight
from .layer import Layer, layer_of
from .tune import LIBRARY, Choice


def _layer(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], added: bool, relu: bool, role: str
) -> Layer:
    k, _, *kernel = weight.shape
    layer = layer_of(x.shape, (k, *kernel), stride, padding, x.dtype, residual=added, relu=relu, role=role)
    check_pixels(role, max(layer.pixels, x.shape[0] * x.shape[2] * x.shape[3]))
    return layer


def _verified(run: Callable[..., object], layer: Layer, x: Tensor) -> Callable[[Choice], object]:
    """``run`` for a measurement: kernels that no GPU has run yet are verified first."""

    def trial(choice: Choice) -> object:
        if isinstance(choice, TrainingConfig):
            hopper.verify(layer, choice, x.device)
        if isinstance(choice, GradientConfig):
            hopper_weight.verify(layer, choice, x.device)
        return run(choice)

    return trial


def convolve(
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    filters: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    stats: bool,
) -> tuple[Tensor, PartialStats | None]:
    """``y = conv2d([relu](scale * x + shift), weight) + bias``, and partial sums of the statistics of y.

    filters: ``weight`` as :func:`resnet_fast._triton.filters.packed` gives it in the dtype of x, where that is there
    already.
    """
    op = "conv_bn_stats"
    check_image(op, "x", x)
    check_dtype(f"{op}: weight", weight)
    shaped = weight.to(x.dtype) if filters is None else filters
    y = fake_conv(x, shaped, bias, None, None, None, None, 0.0, stride, padding)
    if bias is not None and bias.shape != (weight.shape[0],):
        fail(op, f"bias has shape {tuple(bias.shape)}, want ({weight.shape[0]},)")
    check_rows(op, "scale_shift", scale_shift, 2, x)
    if stats and x.shape[0] == 0:
        fail(op, "x has no images, want at least one for mean and variance")
    if min(*x.shape[2:], *y.shape[2:]) < 1:
        fail(op, f"x is {x.shape[2]} x {x.shape[3]}, smaller than the filter")
    if y.numel() == 0:
        return y, None
    layer = _layer(x, weight, stride, padding, False, relu, op)
    own = packed(weight, x.dtype) if filters is None else filters

    def run(choice: Choice) -> tuple[Tensor, PartialStats | None]:
        operands = (x, scale_shift, own.permute(0, 2, 3, 1), bias, y, stats)
        if isinstance(choice, Config):
            return y, forward.conv_bn_stats(layer, choice, *operands)
        if isinstance(choice, TrainingConfig):
            return y, hopper.conv_bn_stats(layer, choice, *operands)
        return forward.aten(layer, x, scale_shift, own, bias, stats)

    return run(tune.tuner(x.device).choose(layer, lambda: [_verified(run, layer, x)]))


def conv_bn_stats(
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    algorithm: int,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    check_algorithm("conv_bn_stats", algorithm)
    y, found = convolve(x, scale_shift, relu, weight, None, bias, stride, padding, stats)
    if found is None:
        return y, statistics_rows(x, 2, weight.shape[0] if stats else 0)
    return y, finalize_stats(found)[0]


def bn_apply(
    y: Tensor, scale_shift: Tensor | None, residual: Tensor | None, residual_scale_shift: Tensor | None, relu: bool
) -> Tensor:
    op = "bn_apply"
    check_image(op, "y", y)
    check_rows(op, "scale_shift", scale_shift, 2, y)
    if residual is not None:
        check_image(op, "residual", residual, ("y", y))
    check_rows(op, "residual_scale_shift", residual_scale_shift, 2, y)
    out = torch.empty_like(y)
    if y.numel() > 0:
        added = None if residual is None else as_rows(residual)
        batch_norm.bn_apply(as_rows(y), scale_shift, added, residual_scale_shift, as_rows(out), relu)
    return out


def sums(
    grad: Tensor, relu_source: Tensor | None, scale_shift: Tensor | None, ys: list[Tensor], stats: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """``g = grad`` where the ReLU passed, and partial sums of ``g`` and of ``g * (y - mean)`` for each of ``ys``."""
    op = "bn_backward_reduce"
    check_image(op, "grad", grad)
    if relu_source is not None:
        check_image(op, "relu_source", relu_source, ("grad", grad))
    check_rows(op, "scale_shift", scale_shift, 2, grad)
    check_sums(op, ("grad", grad), ys, stats)
    out = torch.empty_like(grad)
    if grad.numel() == 0:
        return out, torch.empty(0, 1 + len(ys), grad.shape[1], dtype=torch.float32, device=grad.device)
    return out, _sums(grad, None, relu_source, scale_shift, ys, stats, out)


def bn_backward_reduce(
    grad: Tensor, relu_source: Tensor | None, scale_shift: Tensor | None, ys: list[Tensor], stats: list[Tensor]
) -> tuple[Tensor, Tensor]:
    out, partial = sums(grad, relu_source, scale_shift, ys, stats)
    return out, finalize_sums(partial)


def channel_sums(grad: Tensor) -> Tensor:
    check_image("channel_sums", "grad", grad)
    return as_rows(grad).sum(0, dtype=torch.float32)


def _sums(
    grad: Tensor,
    added: Tensor | None,
    relu_source: Tensor | None,
    scale_shift: Tensor | None,
    ys: list[Tensor],
    stats: list[Tensor],
    out: Tensor,
) -> Tensor:
    images = [None if t is None else as_rows(t) for t in (added, relu_source)]
    return batch_norm.bn_backward_reduce(
        as_rows(grad), *images, scale_shift, [as_rows(y) for y in ys], stats, as_rows(out)
    )


def _check_gradients(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    weight: Tensor,
    shaped: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Tensor | None,
) -> None:
    """Checks the operands of :func:`gradients`; ``shaped``: ``weight`` in the dtype of x."""
    op = "conv_backward"
    check_image(op, "grad", grad)
    check_image(op, "x", x)
    check_dtype(f"{op}: weight", weight)
    result = fake_conv(x, shaped, None, None, None, None, None, 0.0, stride, padding)
    check_image(op, "grad", grad, ("the convolution's output", result))
    if (y is None) != (coefficients is None):
        fail(op, "y and coefficients come together")
    if y is not None:
        check_image(op, "y", y, ("grad", grad))
    check_rows(op, "coefficients", coefficients, 4, grad)
    check_rows(op, "scale_shift", scale_shift, 2, x)
    if residual is not None:
        check_image(op, "residual", residual, ("x", x))


def gradients(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    relu: bool,
    weight: Tensor,
    filters: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    need_x: bool,
    need_weight: bool,
    residual: Tensor | None,
    reduce: bool,
    ys: list[Tensor],
    stats: list[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, in its dtype and layout; with ``reduce``, also partial sums of the first.

    filters: ``weight`` as :func:`resnet_fast._triton.filters.packed` gives it in the dtype of x, where that is there
    already.
    """
    shaped = weight.to(x.dtype) if filters is None else filters
    _check_gradients(grad, y, coefficients, x, scale_shift, weight, shaped, stride, padding, residual)
    check_sums("conv_backward", ("x", x), ys, stats)
    if reduce and not need_x:
        fail("conv_backward", "reduce without need_x")
    if min(x.numel(), grad.numel()) == 0:
        nothing = torch.zeros(0, 1 + len(ys), x.shape[1], dtype=torch.float32, device=x.device)
        dx = torch.zeros_like(x) if residual is None else residual.clone()
        return dx if need_x else None, torch.zeros_like(weight) if need_weight else None, nothing if reduce else None

    own = packed(weight, x.dtype) if filters is None else filters

    def aten(gradient: Tensor, image: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        return convolution_backward(gradient, image, own, None, [*stride], [*padding], mask)

    def output_gradient() -> Tensor:
        if y is None or coefficients is None:
            return grad
        dy = torch.empty_like(grad)
        batch_norm.bn_input_gradient(as_rows(grad), as_rows(y), coefficients, as_rows(dy))
        return dy

    def data_gradient(choice: Choice, dy: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if isinstance(choice, Config | TrainingConfig):
            dx, gradient = torch.empty_like(x), backward if isinstance(choice, Config) else hopper
            operands = (grad, y, coefficients, own.permute(0, 2, 3, 1), residual, x, scale_shift)
            return dx, gradient.data_gradient(data_layer, choice, *operands, reduce, ys, stats, dx)
        result = aten(output_gradient() if dy is None else dy, x, [True, False, False])[0]
        assert result is not None
        result = result.contiguous(memory_format=torch.channels_last)
        if not reduce:
            return result if residual is None else bn_apply(result, None, residual, None, False), None
        dx = torch.empty_like(x)
        relu_source = x if relu or scale_shift is None else None
        return dx, _sums(result, residual, relu_source, scale_shift, ys, stats, dx)

    def weight_gradient(choice: Choice, dy: Tensor | None = None) -> Tensor:
        if isinstance(choice, Config):
            dw = torch.empty_like(weight)
            backward.weight_gradient(weight_layer, choice, grad, y, coefficients, x, scale_shift, dw)
            return dw
        if isinstance(choice, GradientConfig):
            dw = torch.empty_like(weight)
            output = (grad, y, coefficients) if dy is None else (dy, None, None)
            hopper_weight.weight_gradient(weight_layer, choice, *output, x, scale_shift, dw)
            return dw
        image = forward.activation(x, scale_shift, relu)
        result = aten(output_gradient() if dy is None else dy, image, [False, True, False])[1]
        assert result is not None
        return like(result, weight)

    choose = tune.tuner(x.device).choose
    data_layer = _layer(x, weight, stride, padding, residual is not None, relu, "data gradient")
    weight_layer = _layer(x, weight, stride, padding, False, relu, "weight gradient")
    data_choice = choose(data_layer, lambda: [_verified(data_gradient, data_layer, x)]) if need_x else None
    weight_choice = choose(weight_layer, lambda: [_verified(weight_gradient, weight_layer, x)]) if need_weight else None
    dy = output_gradient() if LIBRARY in (data_choice, weight_choice) else None
    grad_x, partial = (None, None) if data_choice is None else data_gradient(data_choice, dy)
    return grad_x, None if weight_choice is None else weight_gradient(weight_choice, dy), partial


def conv_backward(
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
    reduce: bool,
    ys: list[Tensor],
    stats: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    check_algorithm("conv_backward", algorithm)
    operands = (grad, y, coefficients, x, scale_shift, relu, weight, None, stride, padding)
    dx, dw, partial = gradients(*operands, need_x, need_weight, residual, reduce, ys, stats)
    return (
        x.new_empty((0, *x.shape[1:])) if dx is None else dx,
        torch.empty_like(weight) if dw is None else dw,
        statistics_rows(x, 0, x.shape[1]) if partial is None else finalize_sums(partial),
    )
