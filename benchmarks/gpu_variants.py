"""What a module is run by on a GPU. Each is synchronised and verified like those on the CPU.

Without a word about weights, they stay float32 and run under autocast, as people run them; "cast weights" are in the
arithmetic's dtype from the start, which saves the casts of every call. A CUDA graph replays all launches at once; its
input is copied into the graph's own at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import resnet_fast

from .cases import Twin
from .variants import BASELINE, OURS, Call, UnavailableError, Variant
from .verify import in_layout

__all__ = ["GPU_VARIANTS", "SLOW"]


def graphed(call: Call, x: Tensor) -> Call:
    """``call`` as one CUDA graph. What it returns is overwritten by the next call."""
    held = x.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their algorithms before the capture
        for _ in range(3):
            call(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(held)

    def replay(image: Tensor) -> Any:
        held.copy_(image)
        graph.replay()
        return outputs

    return replay


def eager(module: Twin, x: Tensor) -> Call:
    return in_layout(module, torch.channels_last).to(x.dtype)


def eager_graph(module: Twin, x: Tensor) -> Call:
    return graphed(eager(module, x), x)


def max_autotune(module: Twin, x: Tensor) -> Call:
    torch.compiler.reset()
    compiled = torch.compile(eager(module, x), mode="max-autotune")
    for _ in range(3):  # compiles, warms up, captures
        compiled(x)
    return compiled


def fused(module: Twin, x: Tensor) -> Call:
    status = resnet_fast.backends.status()["triton"]
    if not status.startswith("loaded"):
        raise UnavailableError(status)
    fast = module.fast().to(x.device, x.dtype)
    resnet_fast.backends.fallbacks(clear=True)
    with resnet_fast.backends.use("triton"):  # raises where something would run unfused; measures kernels, once
        fast(x)
    return fast


def fused_graph(module: Twin, x: Tensor) -> Call:
    return graphed(fused(module, x), x)


GPU_VARIANTS = {
    BASELINE: Variant(eager),
    f"{BASELINE}, cast weights": Variant(eager, cast=True),
    "CUDA graph of eager, cast weights": Variant(eager_graph, cast=True),
    "torch.compile, max-autotune": Variant(max_autotune, cast=True),
    OURS: Variant(fused),
    f"{OURS}, cast weights": Variant(fused, cast=True),
    f"CUDA graph of {OURS}, cast weights": Variant(fused_graph, cast=True),
}
SLOW = ("torch.compile, max-autotune",)  # minutes of compiling for each case
