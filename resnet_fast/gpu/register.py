"""Registers the CUDA implementations with PyTorch's dispatcher, the launch seam and the table of devices, on import."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from .. import backends
from ..backends import launch
from ..chain import devices
from ..ops import training as training_shapes
from ..ops.register import library

__all__ = ["KERNELS"]

KERNELS: dict[str, Callable[..., Any]] = {}
"""Python implementations of the operators of ``torch.ops.resnet_fast`` on CUDA devices, by name."""

# By operator, the file that has it: the kernels of Triton or of CUDA C++, either will do.
_CONVOLUTIONS = {
    "conv_bn": "operators",
    "conv_bn_relu": "operators",
    "conv_bn_add_relu": "operators",
    "pack_conv_bn": "packing",
    "conv_chain": "operators",
}
_LAUNCHES = (
    "conv_bn_relu_launch",
    "conv_bn_relu_pool_launch",
    "avg_pool_flatten_launch",
    "residual_stage_launch",
)


# The files that have launchers of the extension's kernels; the first is for whole networks.
_NETWORK = "residual_network"
_LAUNCHERS = (
    "cuda.conv",
    "cuda.stem",
    "cuda.avg_pool",
    "cuda.hopper",
    "cuda.hopper_training",
    "cuda.weight_gradient",
)


def _lazily(module: str, name: str) -> Callable[..., Any]:
    """``name`` of a module in this folder, imported at the first call: most processes use one device, and importing
    Triton takes a second."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f".{module}", __package__), name)(*args)

    return call


def _register() -> None:
    assert library is not None
    for op in _LAUNCHES:
        backends.note_kernel(op)
    launchers: list[str] = []
    if backends.has_kernel("residual_stage_launch", "cuda"):
        launchers.append(_NETWORK)
        KERNELS["residual_network"] = _lazily(_NETWORK, "residual_network")
    if backends.has_cuda_convolution():
        launchers.extend(_LAUNCHERS)

    def register_launchers() -> None:
        for file in launchers:
            _lazily(file, "register")()

    launch.gpu.register_when_asked(register_launchers)
    if backends.has_cuda_convolution() or backends.has_triton():
        KERNELS.update({op: _lazily(file, op) for op, file in _CONVOLUTIONS.items()})
    if backends.has_triton():
        KERNELS.update({op: _lazily("training_operators", op) for op in training_shapes.FAKES})
        KERNELS.update({op: _lazily("operators", op) for op in ("add_relu", "augment")})
    for op, kernel in KERNELS.items():
        if not backends.has_kernel(op, "cuda"):  # the extension's own
            library.impl(op, kernel, "CUDA")
            backends.note_kernel(op)


if backends.loaded():
    _register()
devices.gpu = devices.Gpu(
    _lazily("chain", "GpuChain"),
    _lazily("training", "ReplayedPasses"),
    _lazily("cuda.avg_pool", "suits"),
    _lazily("cuda.avg_pool", "avg_pool_flatten"),
)
