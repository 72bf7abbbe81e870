"""What ran on the GPU during some calls, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Kernel", "kernels"]


@dataclass(frozen=True)
class Kernel:
    """``microseconds`` and ``launches`` are those of one call."""

    name: str
    microseconds: float
    launches: float


def kernels(call: Callable[[], object], calls: int, device: str) -> list[Kernel]:
    """Longest first; copies and fills are among them. On the CPU the operators, in a rehearsal."""
    on_gpu = device == "cuda"
    call()
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, tuple[float, int]] = {}
    for event in found.events() or []:
        if (event.device_type == DeviceType.CUDA) != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        taken, count = times.get(event.name, (0.0, 0))
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        times[event.name] = taken + own, count + 1
    rows = [Kernel(name, taken / calls, count / calls) for name, (taken, count) in times.items()]
    return sorted(rows, key=lambda kernel: -kernel.microseconds)
