"""Measures the CPU's peak arithmetic rate and memory bandwidth, for :mod:`.explain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Peak", "measure_peak"]

# Larger than any last-level cache.
COPY_BYTES = 256 << 20
MATRIX = 2048


@dataclass(frozen=True)
class Peak:
    """Measured peak rates with ``threads`` threads, the best of several runs.

    ``flops``: FLOP/s of ``torch.mm`` on 2048 x 2048 matrices (2 per multiply-add), a few percent below the hardware's
    limit: a good kernel may exceed it slightly, Winograd by far. ``bytes``: bytes/s that a copy of 256 MiB reads and
    writes.
    """

    flops: float
    bytes: float
    threads: int


def _best(call: Callable[[], object], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_peak(dtype: torch.dtype = torch.float32, runs: int = 7) -> Peak:
    """Measures the peak for ``dtype``, in a second or two."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    with torch.inference_mode():
        mm_seconds = _best(lambda: torch.mm(a, b, out=product), runs)
        copy_seconds = _best(lambda: target.copy_(source), runs)
    return Peak(2 * MATRIX**3 / mm_seconds, 2 * COPY_BYTES / copy_seconds, torch.get_num_threads())
