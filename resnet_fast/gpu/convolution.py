"""One convolution with its epilogue on a GPU: runs it by a given choice, and makes the trials that find the choice."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import launch
from ..ops.spec import empty_image
from . import library, tune
from .candidates.conv1x1 import Conv1x1Config
from .candidates.cuda import CudaConfig
from .candidates.hopper import HopperConfig
from .candidates.triton import Config
from .cuda import conv as cuda_conv
from .cuda import hopper as hopper_conv
from .layer import Layer, layer_of, precision
from .tune import LIBRARY, Choice

__all__ = ["Filter", "choose", "layer_of", "precision", "prepare", "run", "trials", "wants_folded"]

# Sets of filters that take turns in a measurement, as the layers of a network do: they are not all in cache.
_TRIALS = 8


@dataclass(frozen=True)
class Filter:
    """weight: ``[K, R, S, C]`` in the dtype of the images. scale, shift: float32 ``[K]``. bias: the shift in the dtype
    of the images, where the scale is folded into the weights."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    bias: Tensor | None = None


def _start_triton(*args: object) -> None:
    from .._triton import conv_bn_relu

    conv_bn_relu.conv_bn_relu(*args)


_STARTS: dict[type, Callable[..., None]] = {
    Config: _start_triton,
    CudaConfig: cuda_conv.conv_bn_relu,
    HopperConfig: hopper_conv.conv_bn_relu,
    Conv1x1Config: hopper_conv.conv_bn_relu,
}


def run(layer: Layer, choice: Choice, x: Tensor, filters: Filter, residual: Tensor | None) -> Tensor:
    """``[relu](conv2d(x, weight) * scale + shift [+ residual])`` by ``choice``; images in channels_last."""
    if not isinstance(choice, str):
        start = _STARTS.get(type(choice))
        if start is None:
            raise RuntimeError(f"conv_bn_relu: {choice} is a kernel of training, want one of inference")
        y = empty_image(x, layer.out_channels, layer.out_height, layer.out_width)
        start(layer, choice, x, filters.weight, filters.scale, filters.shift, residual, y)
        return y
    if choice == LIBRARY:
        return _library(layer, x, filters, residual)
    if filters.bias is None:
        raise RuntimeError(f"{choice} wants filters that hold batch norm's scale")
    return library.run(choice, layer, x, filters.weight, filters.bias if layer.shifted else None, residual)


def _library(layer: Layer, x: Tensor, filters: Filter, residual: Tensor | None) -> Tensor:
    """The layer by aten's convolution, and one pass over its result if Triton is installed."""
    if backends.has_triton():
        from .._triton import conv_bn_relu

        return conv_bn_relu.aten(layer, x, filters.weight, filters.scale, filters.shift, residual)
    y = F.conv2d(x, filters.weight.permute(0, 3, 1, 2), stride=layer.stride, padding=layer.padding)
    y = y * filters.scale[:, None, None] + filters.shift[:, None, None]  # in float32
    y = (y if residual is None else y + residual).to(layer.dtype, memory_format=torch.channels_last)
    return y.relu_() if layer.relu else y


def choose(layer: Layer, device: torch.device) -> Choice:
    """What runs ``layer`` on ``device``; measured on random operands if it is not known."""
    return tune.tuner(device).choose(layer, lambda: trials(layer, device), _selected_kind())


def wants_folded(layer: Layer, device: torch.device) -> bool:
    """Whether the layer's choice takes filters with batch norm's scale folded in."""
    return choose(layer, device) in (library.CUDNN, library.CUBLASLT)


def _selected_kind() -> str:
    backend = backends.selected()
    return backend if backend in ("cuda", "triton") else "auto"


def trials(layer: Layer, device: torch.device) -> list[Callable[[Choice], object]]:
    """Functions ``run(choice)`` that compute the layer on random operands, for a measurement.

    They share the input, so it is in cache as far as it fits, as after the layer that writes it.
    """
    x, filters, residual = operands(layer, device)
    shape = (_TRIALS, layer.out_channels, *layer.kernel, layer.channels)
    weights = torch.randn(shape, device=device, dtype=layer.dtype) * layer.gemm_k**-0.5
    return [functools.partial(_run_choice, layer, x, replace(filters, weight=w), residual) for w in weights]


def _run_choice(layer: Layer, x: Tensor, filters: Filter, residual: Tensor | None, choice: Choice) -> Tensor:
    if isinstance(choice, HopperConfig | Conv1x1Config):
        hopper_conv.verify(layer, choice, x.device)
    return run(layer, choice, x, filters, residual)


def operands(layer: Layer, device: torch.device) -> tuple[Tensor, Filter, Tensor | None]:
    """Random input, filter and residual of the layer's shapes."""

    def image(channels: int, height: int, width: int) -> Tensor:
        shape = (layer.batch, height, width, channels)
        return torch.randn(shape, device=device, dtype=layer.dtype).permute(0, 3, 1, 2)

    weight = torch.randn((layer.out_channels, *layer.kernel, layer.channels), device=device, dtype=layer.dtype)
    shift = torch.randn(layer.out_channels, device=device)
    filters = Filter(weight, torch.ones_like(shift), shift, shift.to(layer.dtype) if layer.folded else None)
    residual = image(layer.out_channels, layer.out_height, layer.out_width) if layer.residual else None
    return image(layer.channels, layer.height, layer.width), filters, residual


def prepare(layers: Sequence[Layer], device: torch.device) -> None:
    """Compiles the Triton kernels that choosing for ``layers`` may run, in parallel: one by one takes a minute."""
    if launch.is_simulated():
        return
    wanted = [(layer, c) for layer in dict.fromkeys(layers) for c in tune.tuner(device).wanted(layer, _selected_kind())]
    compiled = [(layer, c) for layer, c in wanted if isinstance(c, Config)]
    if len(compiled) < 2:
        return
    import triton

    # The compiler and ptxas release the GIL.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        torch.cuda.device(device),
        triton.AsyncCompileMode(pool, ignore_errors=True),
        launch.compile_only(),
    ):
        for layer, choice in compiled:
            _compile(layer, choice)
    # CPython 3.11 counts its parser's depth over all threads together, and may fail for that: compile what is missing
    # one by one. What cannot be compiled at all raises where it is run.
    with torch.cuda.device(device), launch.compile_only():
        for layer, choice in compiled:
            with contextlib.suppress(Exception):
                _compile(layer, choice)


def _compile(layer: Layer, choice: Choice) -> None:
    x, filters, residual = operands(layer, torch.device("meta"))
    run(layer, choice, x, filters, residual)
