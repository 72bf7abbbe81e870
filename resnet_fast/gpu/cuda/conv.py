"""``[relu](conv2d(x, weight) * scale + shift [+ residual])`` by the CUDA C++ kernels of ``kernels/csrc/cuda``."""

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
    """Under this name the launch seam knows a kernel."""
    return f"conv_bn_relu_fwd_kernel<{str(dtype).removeprefix('torch.')}, {tile}>"


def _aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % _ALIGN == 0 for t in tensors)


# For each device behind the launch seam, by GPU, stream and whether that is being captured: the capture, and counters.
_Kept = dict[tuple[int, int, bool], tuple[int, Tensor]]
_counters: weakref.WeakKeyDictionary[launch.Device, _Kept] = weakref.WeakKeyDictionary()
_FEWEST = 4096


def _stream(x: Tensor) -> tuple[int, int, int]:
    """The GPU of ``x``, the stream of its launches, and the capture of a CUDA graph that this takes part in, or 0."""
    if not x.is_cuda:  # simulated
        return 0, 0, 0
    stream, capture = torch.ops.resnet_fast.current_capture(x)
    return x.get_device(), stream, capture


def counters_of(x: Tensor, count: int) -> Tensor:
    """At least ``count`` integers, all zero whenever a kernel on the current stream begins: kernels leave them so.

    They are kept, so that no launch has to zero them. Kernels that may run at the same time do not share them: each
    stream has its own, and so has each graph, which may be replayed on any stream. Those of a graph are made inside of
    its capture, in its own memory, and zeroed once in it, before the first kernel that takes them: whatever else lies
    there between two replays does no harm.
    """
    kept = _counters.setdefault(launch.device(), {})
    device, stream, capture = _stream(x)
    if capture == 0:
        kept.pop((device, stream, True), None)  # that capture is over
    key = (device, stream, capture != 0)
    known, counters = kept.get(key, (0, None))
    if counters is None or known != capture or counters.numel() < count:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False), launch.unrecorded():
            counters = torch.zeros(max(count, _FEWEST), dtype=torch.int32, device=x.device)
        kept[key] = capture, counters
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

    Split sums meet in a workspace of float32, with :func:`counters_of` blocks that have arrived.
    """
    # Tiles that copy 16 bytes at a time need them aligned; slices that are not get a copy that is.
    if not _aligned(x) and tiles()[config.tile].load != "mixed":
        x = x.clone(memory_format=torch.channels_last)
    if not _aligned(weight) and tiles()[config.tile].load != "mixed":
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
    """Tells the launch seam of the kernels that the extension holds."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for i, tile in enumerate(tiles()):
            if not tile.plain or dtype == torch.float32:
                launch.gpu.register(kernel_name(dtype, i), _launcher(i))
