"""Training steps under autocast in bfloat16: gradients verified against float64, then timed in turn.

A step is forward, backward and SGD with momentum, timed by calls with the host in it; ``kernels`` is the time that the
GPU was at work in a step, and ``peak`` what a step needs beyond what lies in memory between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from resnet_fast import backends

from ...timing import interleaved
from ...training import Gradients, Trainer, TrainingVariant
from ..clock import Clock
from ..kernels import kernels
from ..options import Options
from ..worker import Emit
from ..workloads import Workload, chosen

__all__ = ["VARIANTS", "items", "run", "trainer", "verified"]

OURS = "resnet_fast"
VARIANTS = {
    "eager": TrainingVariant(torch.channels_last, dtype=torch.bfloat16),
    "torch.compile": TrainingVariant(torch.channels_last, dtype=torch.bfloat16, compiled=True),
    OURS: TrainingVariant(torch.channels_last, dtype=torch.bfloat16, fused=True),
}


def items(options: Options) -> list[str]:
    return chosen(options, training=True)


def trainer(workload: Workload, name: str, device: str) -> Trainer:
    case = workload.training_case()
    return Trainer(case, case.build(), VARIANTS[name], "random", device)


def _peak_mib(step: Any, device: str) -> float | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def verified(
    workload: Workload, names: list[str], device: str, refuse: Callable[[str, Exception], None]
) -> tuple[dict[str, Trainer], dict[str, float]]:
    """What is ready to be timed, and the errors of its gradients as multiples of eager's."""
    case = workload.training_case()
    plain = case.build()
    # No search for the fastest algorithm in float64.
    torch.backends.cudnn.benchmark = False
    exact = Gradients(case, plain, "random", device)
    torch.backends.cudnn.benchmark = True
    ready: dict[str, Trainer] = {}
    errors: dict[str, float] = {}
    for name in names:
        backends.fallbacks(clear=True)
        try:
            made = Trainer(case, plain, VARIANTS[name], "random", device)
            errors[name] = exact.check(name, made)
            if VARIANTS[name].fused and (found := backends.fallbacks(clear=True)):
                raise RuntimeError(f"resnet_fast runs in part unfused: {found}")
            ready[name] = made
        except Exception as error:
            refuse(name, error)
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the context is lost
    return ready, errors


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    workload, device = Workload.of(item), options.device

    def refuse(name: str, error: Exception) -> None:
        first = str(error).strip().splitlines() or [""]
        emit({"variant": name, "error": f"not timed, {type(error).__name__}: {first[0][:400]}"})

    names = [name for name, variant in VARIANTS.items() if not (variant.compiled and options.simulated)]
    ready, errors = verified(workload, names, device, refuse)
    if not ready:
        return  # each has given its reason
    clock = Clock(device, torch.bfloat16)
    timing = interleaved(
        {n: t.step for n, t in ready.items()}, rounds=options.rounds, seconds=options.seconds, device=clock
    )
    rivals = [n for n in ready if n != OURS]
    rival = min(rivals, key=lambda n: timing.seconds(n).median, default=None)
    for name, made in ready.items():
        ms, run_by = timing.seconds(name), kernels(made.step, 3, device)
        row: dict[str, Any] = {
            "case": workload.name,
            "variant": name,
            "ms": ms.median * 1e3,
            "ms low": ms.low * 1e3,
            "ms high": ms.high * 1e3,
            "kernels ms": sum(k.microseconds for k in run_by) / 1e3,
            "launches": sum(k.launches for k in run_by),
            "peak MiB": _peak_mib(made.step, device),
            "error / eager's": errors[name],
            "rounds": len(timing.samples[name]),
        }
        if name == OURS and rival is not None:
            ratio = timing.ratio(name, rival)
            row |= {"best peer": rival, "time / best peer": ratio.median}
            row |= {"time / best peer low": ratio.low, "time / best peer high": ratio.high}
        emit(row)
    ready.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
