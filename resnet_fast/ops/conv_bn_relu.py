"""``[relu](batch_norm(conv2d(x)) [+ residual])`` with fixed statistics: the public functions.

Their fakes, gradients and autocast rules are in :mod:`.conv_autograd`.

Source: batch norm with fixed statistics is an affine function per channel (Ioffe and Szegedy 2015, section 3.1) and
folds into the convolution before it: ``weight * s`` and ``(bias - mean) * s + bn_bias``, with
``s = bn_weight / sqrt(var + eps)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .arguments import check_conv, raised
from .unfused import taps_reason, unfused_conv, unfused_reason

__all__ = ["conv_bn", "conv_bn_add_relu", "conv_bn_relu"]

IntPair = int | tuple[int, int]


def _pair(name: str, value: IntPair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} is {value!r}, want an int or two of them")
    return pair


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
    """``batch_norm(conv2d(x, weight, bias))`` with the running statistics; arguments as for :func:`conv_bn_relu`."""
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
    """``relu(batch_norm(conv2d(x, weight, bias)))`` with the running statistics.

    Equivalent to ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride, padding), running_mean, running_var,
    bn_weight, bn_bias, training=False, eps=eps))``; without statistics there is no batch norm.

    Args:
        x: ``[N, C, H, W]``, float32, float64 or bfloat16, any memory format.
        weight: ``[K, C, R, S]``, dtype of ``x``.
        bias, bn_weight, bn_bias, running_mean, running_var: ``[K]``, any of these dtypes. Give both statistics or
            neither; ``bn_weight`` and ``bn_bias`` only with them.
        eps: added to the variance, at least 0.
        stride, padding, dilation: an int or ``(height, width)``; ``groups``: as in ``F.conv2d``. Dilation, groups and
            filters of more than 1024 taps run on PyTorch's own operators.

    Returns:
        ``[N, K, (H + 2 padding - R) // stride + 1, ...]``, dtype of ``x``, channels_last. NaN passes through the ReLU.

    Raises:
        RuntimeError: a shape, dtype, device or number does not fit; the message names the argument.
        TypeError: an argument has the wrong type.
        ValueError: ``stride``, ``padding`` or ``dilation`` is neither an int nor two.
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
        residual: shape of the result, dtype of ``x``, any memory format; may be ``x`` itself.
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
        reason = unfused_reason(op, inputs[0])
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
