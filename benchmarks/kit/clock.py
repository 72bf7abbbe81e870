"""How time is taken on a GPU: calls by the host's clock until their work has ended, graphs by the GPU's own.

A call is what a user waits for, launches included. A graph is replayed several times between two events, while the GPU
was kept busy before the first: it never waits for the host, and no image is copied into the graph meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..gpu.device import Device
from ..gpu.variants import Graphed

__all__ = ["Clock", "Replay"]

MOST_REPLAYS = 200
_CYCLES = 2e9  # a second of the GPU's clock, about


@dataclass(frozen=True)
class Replay:
    """A graph to be timed without host and copy."""

    graph: Graphed

    def __call__(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Clock(Device):
    """``interleaved(..., device=Clock("cuda", dtype))``"""

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds a call, of ``repeats`` in a row, or fewer replays."""
        if isinstance(call, Replay) and self.name == "cuda":
            return _replays(call, min(repeats, MOST_REPLAYS))
        self._wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return (time.perf_counter() - begin) / repeats

    def _wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()


def _replays(call: Replay, repeats: int) -> float:
    """Raises: RuntimeError where the host cannot keep ahead: such a time would be the host's."""
    lead = 2e-3
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(lead * _CYCLES))
        begin.record()
        for _ in range(repeats):
            call()
        ahead = not begin.query()
        end.record()
        end.synchronize()
        if ahead:
            return float(begin.elapsed_time(end)) * 1e-3 / repeats
        # Longer sleep, fewer replays: the queue of launches is finite, too.
        lead, repeats = 3 * lead, max(5, repeats // 2)
    raise RuntimeError("the host does not keep ahead of the GPU: no time of the graph was taken")
