"""Where the variants run, in which arithmetic, and how their time is taken: the CPU, or the GPU where there is one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from resnet_fast.diagnose.system import cpu_name

__all__ = ["CPU", "DEVICES", "DTYPES", "Device", "of"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Device:
    """``dtype``: of the arithmetic. Modules and inputs are float32; where it is narrower, they run under autocast.

    ``cold``: every call finds its weights and maps in memory, not in the GPU's cache.
    """

    name: str = "cpu"
    dtype: torch.dtype = torch.float32
    cold: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("cpu", "cuda"):
            raise ValueError(f"name is {self.name!r}, want 'cpu' or 'cuda'")
        if self.name == "cpu" and (self.cold or self.dtype not in (torch.float32, torch.bfloat16)):
            raise ValueError("on the CPU times are taken in float32 or bfloat16, with warm caches")

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Within it modules compute in ``dtype``."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.name, self.dtype)

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds a call, of ``repeats`` in a row. On the GPU by its own clock, when all of them have ended."""
        if self.name == "cuda":
            return _cold_sample(call, repeats) if self.cold else _event_sample(call, repeats)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    def describe(self) -> str:
        """The machine and the arithmetic, for the report."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.name == "cpu":
            return f"{cpu_name()}, {dtype}"
        caches = "caches overwritten before each call" if self.cold else "caches warm"
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {dtype}, {caches}"


CPU = Device()


def of(name: str, dtype: str | None, cold: bool) -> Device:
    """The device of the options: ``"auto"`` is the GPU where one is visible. ``dtype``: float32, float16 on GPUs.

    Raises:
        ValueError: ``"cuda"`` where no CUDA device is visible, or options that the CPU does not know.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but no CUDA device is visible")
    if name == "cuda":
        torch.backends.cudnn.benchmark = True
    return Device(name, DTYPES[dtype or ("float16" if name == "cuda" else "float32")], cold)


def _event_sample(call: Callable[[], object], repeats: int) -> float:
    begin, end = _events(), _events()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


def _cold_sample(call: Callable[[], object], repeats: int) -> float:
    """While the GPU overwrites its cache the host is already ahead: the time of launching is left out here."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        pairs.append((_events(), _events()))
        pairs[-1][0].record()
        call()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return sum(float(begin.elapsed_time(end)) for begin, end in pairs) * 1e-3 / repeats


def _events() -> Any:
    return torch.cuda.Event(enable_timing=True)
