"""``[relu](conv2d(x, weight) * scale + shift [+ residual])`` by the CUDA C++ kernels of ``kernels/csrc/cuda/conv``."""

from __future__ import annotations

import struct
import weakref
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ..candidates.cuda import CudaConfig, plan, tiles
from ..layer import Layer

__all__ = ["conv_bn_relu", "counters_of", "kernel_name"]

_ALIGN = 16


def kernel_name(dtype: torch.dtype, tile: int) -> str:
    """The kernel's name in the launch seam."""
    return f"conv_bn_relu_fwd_kernel<{str(dtype).removeprefix('torch.')}, {tile}>"


def _aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % _ALIGN == 0 for t in tensors)


# By (GPU, stream, whether it is being captured): the capture, and the counters; for each device of the launch seam.
_Counters = dict[tuple[int, int, bool], tuple[int, Tensor]]
_counters: weakref.WeakKeyDictionary[launch.Device, _Counters] = weakref.WeakKeyDictionary()
_FEWEST = 4096


def _stream(x: Tensor) -> tuple[int, int, int]:
    """The GPU of ``x``, its current stream, and the CUDA graph capture that the stream is part of, or 0."""
    if not x.is_cuda:  # simulated
        return 0, 0, 0
    stream, capture = torch.ops.resnet_fast.current_capture(x)
    return x.get_device(), stream, capture


def counters_of(x: Tensor, count: int) -> Tensor:
    """At least ``count`` integers that are zero before every kernel on the current stream: kernels reset them.

    They are cached, so that no launch needs a memset. Kernels that may run at the same time must not share them: each
    stream has its own, and so does each CUDA graph, which may be replayed on any stream. A graph's counters are
    allocated within its capture, in its memory, and zeroed there by the graph before the first kernel that uses them,
    so that other uses of that memory between two replays do no harm.
    """
    cached = _counters.setdefault(launch.device(), {})
    device, stream, capture = _stream(x)
    if capture == 0:
        cached.pop((device, stream, True), None)  # that capture is over
    key = (device, stream, capture != 0)
    known, counters = cached.get(key, (0, None))
    if counters is None or known != capture or counters.numel() < count:
        # A tensor made in inference mode cannot be written outside of it.
        with torch.inference_mode(False), launch.unrecorded():
            counters = torch.zeros(max(count, _FEWEST), dtype=torch.int32, device=x.device)
        cached[key] = capture, counters
    return counters


def conv_bn_relu(
    layer: Layer,
    config: CudaConfig,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Writes ``[relu](conv2d(x, weight) * scale + shift [+ residual])`` to ``y``; arguments as for the Triton kernel.

    Split-K reduces float32 partial sums in a workspace; :func:`counters_of` count the blocks that have arrived.
    """
    # Tiles that load 16 bytes at a time need aligned operands: copy views that are not.
    if not _aligned(x) and tiles()[config.tile].load != "scalar":
        x = x.clone(memory_format=torch.channels_last)
    if not _aligned(weight) and tiles()[config.tile].load != "scalar":
        weight = weight.clone()
    made = plan(layer, config, _aligned(x, weight), _aligned(residual, y))
    if made is None:
        raise RuntimeError(f"conv_bn_relu: {config} cannot compute {layer}")
    partial = counters = None
    if config.splits > 1:
        partial = torch.empty(made.partial_floats, device=x.device)
        counters = counters_of(x, made.counters)
    launch.cuda_launch(
        kernel_name(layer.dtype, config.tile),
        (made.blocks, config.splits),
        (made.threads,),
        made.shared,
        (x, weight, scale, shift, residual, y, partial, counters, struct.pack(f"{len(made.args)}i", *made.args)),
    )


def _launcher(tile: int) -> Any:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple[Any, ...]) -> None:
        *tensors, packed = args
        torch.ops.resnet_fast.conv_bn_relu_launch(*tensors, tile, list(struct.unpack(f"{len(packed) // 4}i", packed)))

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for i, tile in enumerate(tiles()):
            if not tile.simt or dtype == torch.float32:
                launch.gpu.register(kernel_name(dtype, i), _launcher(i))
