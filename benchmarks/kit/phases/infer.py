"""Inference: what a careful user of PyTorch has, and ours, verified against float64, then timed in turn.

Plain calls and graphs are two tables in one: a plain call is timed with its launches, a graph without the host.
``torch.compile``'s graph is a call to its user: the host and the copy of its input are in its time. Images are on the
GPU before a time begins, caches are warm.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ...gpu.device import DTYPES
from ...gpu.variants import GPU_VARIANTS, Graphed
from ...timing import Spread, Timing, interleaved
from ...variants import BASELINE, OURS
from ...verify import Reference
from ..clock import Clock, Replay
from ..options import Options
from ..worker import Emit
from ..workloads import Workload, chosen

__all__ = ["GRAPHS", "PLAIN", "items", "run", "verified"]

OUR_CALL, OUR_GRAPH = f"{OURS}, cast weights", f"CUDA graph of {OURS}, cast weights"
PLAIN = (f"{BASELINE}, cast weights", "cuDNN fused", OUR_CALL)
COMPILED = "torch.compile, reduce-overhead"
GRAPHS = ("CUDA graph of eager, cast weights", "CUDA graph of cuDNN fused", OUR_GRAPH)


def items(options: Options) -> list[str]:
    return chosen(options, training=False)


def clock_of(options: Options) -> Clock:
    return Clock(options.device, DTYPES[options.dtype])


@torch.no_grad()
def verified(
    workload: Workload, names: list[str], clock: Clock, refuse: Callable[[str, Exception], None]
) -> tuple[dict[str, Any], dict[str, float]]:
    """What is ready to be timed on the first kind of images, and its errors as multiples of eager's."""
    case, module = workload.case(), workload.module().to(clock.name)
    images = {kind: case.input(kind).to(clock.name) for kind in case.kinds}
    # No search for the fastest algorithm in float64.
    torch.backends.cudnn.benchmark = False
    references = {kind: Reference.of(module, x, clock) for kind, x in images.items()}
    torch.backends.cudnn.benchmark = True
    ready: dict[str, Any] = {}
    errors: dict[str, float] = {}
    inputs = {
        kind: x.to(clock.dtype).contiguous(memory_format=torch.channels_last)
        for kind, x in reversed(list(images.items()))  # the first kind last: graphs are left with it
    }
    *_, x = inputs.values()
    for name in names:
        variant = GPU_VARIANTS[name]
        try:
            call = variant.prepare(module, x)
            errors[name] = max(
                references[kind].check(f"{name} on {kind}", call(image), variant.slack)
                for kind, image in inputs.items()
            )
            timed = Replay(call) if isinstance(call, Graphed) else lambda call=call: call(x)
            clock.sample(timed, 1)  # can it be timed?
        except Exception as error:
            refuse(name, error)
            if clock.name == "cuda":
                torch.cuda.synchronize()  # raises where the context is lost
                gc.collect()
                torch.cuda.empty_cache()
            continue
        ready[name] = timed
    return ready, errors


def best(timing: Timing, names: list[str]) -> str | None:
    return min(names, key=lambda name: timing.seconds(name).median, default=None)


def _spread(name: str, spread: Spread, scale: float = 1.0) -> dict[str, float]:
    return {name: spread.median * scale, f"{name} low": spread.low * scale, f"{name} high": spread.high * scale}


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    workload, clock = Workload.of(item), clock_of(options)
    names = [*PLAIN, *([COMPILED] if options.compiled and not options.simulated else []), *GRAPHS]

    def refuse(name: str, error: Exception) -> None:
        first = str(error).strip().splitlines() or [""]
        emit({"variant": name, "error": f"not timed, {type(error).__name__}: {first[0][:400]}"})

    ready, errors = verified(workload, names, clock, refuse)
    if not ready:
        return  # each has given its reason
    with torch.no_grad():
        timing = interleaved(ready, rounds=options.rounds, seconds=options.seconds, device=clock)
    plain = [n for n in (*PLAIN[:-1], COMPILED) if n in ready]
    # A graph competes with all.
    rivals = {OUR_CALL: best(timing, plain), OUR_GRAPH: best(timing, [n for n in ready if OURS not in n])}
    for name in ready:
        row: dict[str, Any] = {
            "case": workload.name,
            "dtype": options.dtype,
            "variant": name,
            "timed as": "graph" if isinstance(ready[name], Replay) else "call",
            **_spread("ms", timing.seconds(name), 1e3),
            "images/s": workload.batch / timing.seconds(name).median,
            "error / eager's": errors[name],
            "rounds": len(timing.samples[name]),
        }
        rival = rivals.get(name)
        if rival is not None:
            row |= {"best peer": rival, **_spread("time / best peer", timing.ratio(name, rival))}
        emit(row)
    del ready
    gc.collect()
    if clock.name == "cuda":
        torch.cuda.empty_cache()
