"""Argument checks of the fused operators: each error names the argument, its value and what was wanted.

They run after a call has failed and before PyTorch's operators stand in for a kernel, because PyTorch's errors name no
argument, and its operators accept what the kernels do not: broadcasting and images without a batch. Kernels check
their own arguments, so a successful fused call pays nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .. import backends

__all__ = [
    "DTYPES",
    "MOST_TAPS",
    "VECTORS",
    "check_add_relu",
    "check_conv",
    "check_dense",
    "check_tensor",
    "is_autocast",
    "raised",
    "shapeless",
]

# Dtypes with a kernel, by device.
DTYPES: Final = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
VECTORS: Final = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
# Taps of a filter: kMaxRuns in kernels/csrc/cpu/kernels/kernels.h.
MOST_TAPS: Final = 1024
# Limits of strides and paddings: kMaxSize and kMaxPadding in kernels/csrc/checks.h.
_MOST_SIZE: Final = 2**31 - 1
_MOST_PADDING: Final = 65535
# Dtypes that all of PyTorch's operators take on CPUs.
_FLOATS: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, t: Any, like: tuple[str, Tensor] | None = None) -> None:
    """Checks that ``t`` is a dense tensor on the device of ``like``, a (name, tensor) pair.

    Raises:
        TypeError: ``t`` is not a tensor.
        RuntimeError: ``t`` is sparse or nested, or on another device.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {'None' if t is None else f'a {type(t).__name__}'}, want a tensor")
    if t.is_nested or t.layout != torch.strided:
        raise RuntimeError(f"{name} is {'nested' if t.is_nested else t.layout}, want torch.strided")
    if like is not None and t.device != like[1].device:
        raise RuntimeError(f"{name} is on {t.device}, want {like[1].device} as {like[0]} is")


def check_dense(op: str, values: Sequence[Any]) -> None:
    """Checks that all tensors among the arguments of ``torch.ops.resnet_fast.<op>`` are dense.

    Raises:
        RuntimeError: a tensor is sparse, nested or quantized.
    """
    names = (argument.name for argument in getattr(torch.ops.resnet_fast, op).default._schema.arguments)
    for name, value in zip(names, values, strict=False):
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, Tensor):
                check_tensor(f"{op}: {name}", t)
                if t.is_quantized:
                    raise RuntimeError(f"{op}: {name} is quantized, {t.dtype}")


def shapeless(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the fake of ``torch.ops.resnet_fast.<op>``: where no shapes follow, the error names the arguments."""

    def named(*values: Any, **others: Any) -> Any:
        try:
            return fake(*values, **others)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError):
            names = (argument.name for argument in getattr(torch.ops.resnet_fast, op).default._schema.arguments)
            given = [*zip(names, values, strict=False), *others.items()]
            got = [f"{name} {_described(value)}" for name, value in given]
            raise RuntimeError(f"{op}: no shapes follow from {', '.join(got)}") from None

    return named


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    return str(value)


def raised(check: Callable[..., None], *arguments: Any) -> Exception | None:
    """The error that ``check`` raises, to replace one that names no argument; None if it passes."""
    try:
        check(*arguments)
    except (RuntimeError, TypeError) as error:
        return error
    return None


def check_add_relu(a: Any, b: Any, failed: bool = True) -> None:
    """Raises the errors that :func:`resnet_fast.ops.add_relu` documents. ``failed``: the call has raised already."""
    check_tensor("add_relu: a", a)
    check_tensor("add_relu: b", b, ("a", a))
    if b.shape != a.shape:
        raise RuntimeError(f"add_relu: b has shape {list(b.shape)}, want {list(a.shape)} as a has")
    _check_dtype("add_relu", "b", b, "a", a)
    if failed:
        _check_float("add_relu", "a", a)


def check_conv(
    op: str,
    images: Sequence[Any],
    weight: Any,
    vectors: Sequence[Any],
    eps: Any,
    steps: Sequence[Sequence[int]],
    groups: Any,
    failed: bool = True,
) -> None:
    """Raises the errors that :func:`resnet_fast.ops.conv_bn_relu` documents.

    images: x, and the residual if there is one. vectors: in the order of VECTORS. steps: stride, padding and dilation,
    two integers each. failed: the call has raised already.
    """
    named = dict(zip(("x", "residual"), images, strict=False)) | {"weight": weight}
    given = {name: t for name, t in zip(VECTORS, vectors, strict=True) if t is not None}
    x = named["x"]
    check_tensor(f"{op}: x", x)
    for name, t in {**named, **given}.items():
        check_tensor(f"{op}: {name}", t, ("x", x))
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps is a {type(eps).__name__}, want a number")
    size = _conv_size(op, x, weight, steps, groups)
    if "residual" in named and named["residual"].shape != size:
        shape = list(named["residual"].shape)
        raise RuntimeError(f"{op}: residual has shape {shape}, want {list(size)} as the convolution gives")
    for name, t in named.items():
        if failed:
            _check_float(op, name, t)
        if not is_autocast(x) or torch.float64 in (x.dtype, t.dtype):  # autocast casts all but float64
            _check_dtype(op, name, t, "x", x)
    for name, t in given.items():
        if t.shape != weight.shape[:1]:
            shape = list(t.shape)
            raise RuntimeError(f"{op}: {name} has shape {shape}, want [{weight.shape[0]}], the filters of weight")
        taken = DTYPES.get(backends.kind(x), _FLOATS)
        if t.dtype != x.dtype and t.dtype not in taken:
            raise RuntimeError(f"{op}: {name} has dtype {t.dtype}, want one of {', '.join(map(str, taken))}")
    if ("running_mean" in given) != ("running_var" in given):
        raise RuntimeError(f"{op}: running_mean and running_var come together or not at all")
    if "running_mean" not in given and ("bn_weight" in given or "bn_bias" in given):
        raise RuntimeError(f"{op}: bn_weight and bn_bias come with running_mean and running_var")
    if "running_mean" in given and not eps >= 0:
        raise RuntimeError(f"{op}: eps is {eps}, want at least 0")


def _conv_size(op: str, x: Tensor, weight: Tensor, steps: Sequence[Sequence[int]], groups: Any) -> tuple[int, ...]:
    """The shape of the convolution's output; raises where it would be empty or the arguments do not fit."""
    for name, pair, least, most in zip(
        ("stride", "padding", "dilation"), steps, (1, 0, 1), (_MOST_SIZE, _MOST_PADDING, _MOST_SIZE), strict=True
    ):
        if not all(least <= n <= most for n in pair):
            raise RuntimeError(f"{op}: {name} is {list(pair)}, want {least} to {most}")
    if not isinstance(groups, int):
        raise TypeError(f"{op}: groups is a {type(groups).__name__}, want an int")
    for name, t, meaning in (("x", x, "[N, C, H, W]"), ("weight", weight, "[K, C, R, S]")):
        if t.dim() != 4 or 0 in t.shape[1:] or (name == "weight" and t.shape[0] == 0):
            raise RuntimeError(f"{op}: {name} has shape {list(t.shape)}, want {meaning} of at least 1 each")
    if groups < 1 or weight.shape[0] % groups != 0:
        raise RuntimeError(f"{op}: groups is {groups}, want a divisor of {weight.shape[0]}, the filters of weight")
    if x.shape[1] != weight.shape[1] * groups:
        wanted = f"{weight.shape[1] * groups}, as weight {list(weight.shape)} takes in {groups} groups"
        raise RuntimeError(f"{op}: x has {x.shape[1]} channels, want {wanted}")
    size = []
    for n, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *steps, strict=True):
        reach = n + 2 * padding - dilation * (kernel - 1) - 1
        if reach < 0:
            shapes = f"x is {list(x.shape)}, smaller with padding {list(steps[1])} than weight {list(weight.shape)}"
            raise RuntimeError(f"{op}: {shapes}, dilation {list(steps[2])}")
        size.append(reach // stride + 1)
    return (x.shape[0], weight.shape[0], *size)


def _check_dtype(op: str, name: str, t: Tensor, like: str, other: Tensor) -> None:
    if t.dtype != other.dtype:
        raise RuntimeError(f"{op}: {name} has dtype {t.dtype}, want {other.dtype} as {like} has")


def _check_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in _FLOATS:
        raise RuntimeError(f"{op}: {name} has dtype {t.dtype}, want float32, float64, bfloat16 or float16")


def is_autocast(t: Tensor) -> bool:
    """Whether autocast is on for the device of ``t``; meta tensors have no autocast."""
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)
