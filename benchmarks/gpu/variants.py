"""What a module is run by on a GPU. Each is synchronised and verified like those on the CPU.

Without a word about weights, they stay float32 and run under autocast, as people run them; "cast weights" are in the
arithmetic's dtype from the start, which saves the casts of every call. A CUDA graph replays all launches at once; its
input is copied into the graph's own at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast import backends

from ..cases import Twin
from ..variants import BASELINE, OURS, Call, UnavailableError, Variant
from ..verify import in_layout
from .cudnn_fused import fold

__all__ = ["GPU_VARIANTS", "SLOW", "Graphed"]


class Graphed:
    """``call`` as one CUDA graph. What it returns is overwritten by the next call.

    ``replay()`` runs it on the images of the last call, without a copy: that is what is timed where the host and the
    copy are not to count.
    """

    def __init__(self, call: Call, x: Tensor) -> None:
        self.call = call  # the graph reads its weights, but does not keep them
        self.held = x.clone(memory_format=torch.preserve_format)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their algorithms before the capture
            for _ in range(3):
                call(self.held)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call(self.held)

    def __call__(self, image: Tensor) -> Any:
        self.held.copy_(image)
        self.graph.replay()
        return self.outputs

    def replay(self) -> None:
        self.graph.replay()


def eager(module: Twin, x: Tensor) -> Call:
    return in_layout(module, torch.channels_last).to(x.dtype)


def eager_graph(module: Twin, x: Tensor) -> Call:
    return Graphed(eager(module, x), x)


def cudnn_fused(module: Twin, x: Tensor) -> Call:
    """Batch norm folded, convolution with ReLU, and with residual and ReLU, by one call of cuDNN each."""
    folded = fold(module, x.dtype)
    try:
        folded(x)
    except RuntimeError as error:
        raise UnavailableError(f"cuDNN refuses: {str(error).splitlines()[0]}") from error
    return folded


def cudnn_fused_graph(module: Twin, x: Tensor) -> Call:
    return Graphed(cudnn_fused(module, x), x)


def _compiled(module: Twin, x: Tensor, mode: str) -> Call:
    torch.compiler.reset()
    compiled = torch.compile(eager(module, x), mode=mode)
    for _ in range(3):  # compiles, warms up, captures
        compiled(x)
    return compiled


def reduce_overhead(module: Twin, x: Tensor) -> Call:
    return _compiled(module, x, "reduce-overhead")


def max_autotune(module: Twin, x: Tensor) -> Call:
    return _compiled(module, x, "max-autotune")


def fused(module: Twin, x: Tensor) -> Call:
    """What users get: of all kernels those that are fastest on this GPU, measured once.

    Raises:
        RuntimeError: something ran unfused.
    """
    status = backends.status()
    if not any(status[name].startswith("loaded") for name in ("cuda", "triton")):
        raise UnavailableError(f"cuda: {status['cuda']}; triton: {status['triton']}")
    fast = module.fast().to(x.device, x.dtype)
    backends.fallbacks(clear=True)
    fast(x)
    if fallbacks := backends.fallbacks(clear=True):
        raise RuntimeError(f"resnet_fast runs in part unfused: {fallbacks}")
    return fast


def fused_graph(module: Twin, x: Tensor) -> Call:
    return Graphed(fused(module, x), x)


GPU_VARIANTS = {
    BASELINE: Variant(eager),
    f"{BASELINE}, cast weights": Variant(eager, cast=True),
    "CUDA graph of eager, cast weights": Variant(eager_graph, cast=True),
    # Folded filters are rounded anew: another error than eager's, of the same size.
    "cuDNN fused": Variant(cudnn_fused, cast=True, slack=2.0),
    "CUDA graph of cuDNN fused": Variant(cudnn_fused_graph, cast=True, slack=2.0),
    "torch.compile, reduce-overhead": Variant(reduce_overhead, cast=True),
    "torch.compile, max-autotune": Variant(max_autotune, cast=True),
    OURS: Variant(fused),
    f"{OURS}, cast weights": Variant(fused, cast=True),
    f"CUDA graph of {OURS}, cast weights": Variant(fused_graph, cast=True),
}
SLOW = ("torch.compile, reduce-overhead", "torch.compile, max-autotune")  # a minute and more of compiling for each case
