"""Times GPU work by the GPU's own clock, without the host's launch overhead; :mod:`.tune` measures with it.

Each candidate is captured into a CUDA graph of several calls in a row, and the graphs are replayed in turn. That is the
GPU's time in a network that is replayed or launched ahead, however long the host takes for a call.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["interleaved"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

# Duration of a graph, about, and of a sample of replays, at least: an event's time is accurate to a microsecond.
GRAPH_SECONDS = 150e-6
SAMPLE_SECONDS = 300e-6
MOST_CALLS = 32
ROUNDS = 7
# After this many rounds, candidates slower than the fastest by this factor are dropped.
TRIAL_ROUNDS, BEHIND = 2, 1.25
# GPU cycles to sleep, some 100 us, while the host queues the work to be timed.
SLEEP_CYCLES = 200_000


class _Replay:
    """Calls in a row as one CUDA graph."""

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        once = _seconds(calls[0], 1)
        self.calls = min(MOST_CALLS, max(2, round(GRAPH_SECONDS / once)))
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # thread_local: other threads may allocate meanwhile, such as a data loader's.
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in itertools.islice(itertools.cycle(calls), self.calls):
                    call()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.replays = 1
        self.replays = max(1, math.ceil(SAMPLE_SECONDS / (self.sample() * self.calls)))

    def sample(self) -> float:
        """Seconds a call, in one sample of replays."""
        return _seconds(self.graph.replay, self.replays) / self.calls


def _seconds(call: Call, repeats: int) -> float:
    """Seconds a call on the current stream, with the host ahead of the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


def interleaved(
    candidates: Mapping[Name, Sequence[Call]],
    device: torch.device,
    errors: tuple[type[Exception], ...] = (RuntimeError,),
) -> tuple[dict[Name, float], dict[Name, Exception]]:
    """Seconds a call of each candidate on ``device``: the median over rounds in which all take turns.

    Args:
        candidates: by name, calls that compute the same on different operands; they alternate, so that operands that
            would be cold in a network are not always in cache. Each allocates its result.
        device: a CUDA device, used on its current stream.
        errors: exceptions that mean that a candidate cannot run here.

    Returns:
        The seconds by candidate, and the exceptions of those that cannot run. Failures of the device are raised.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        replays: dict[Name, _Replay] = {}
        refused: dict[Name, Exception] = {}
        collects = gc.isenabled()
        gc.disable()  # memory freed by a collection during a capture would end it
        try:
            for name, calls in candidates.items():
                try:
                    calls[0]()  # compiles, and lets cuDNN choose its algorithm
                    replays[name] = _Replay(calls, stream)
                except torch.AcceleratorError:
                    raise
                except errors as error:
                    refused[name] = error.with_traceback(None)  # which would keep the operands alive
        finally:
            if collects:
                gc.enable()
        samples: dict[Name, list[float]] = {name: [] for name in replays}
        racing = dict(replays)
        for round_ in range(ROUNDS):
            for name, replay in racing.items():
                samples[name].append(replay.sample())
            if round_ + 1 == TRIAL_ROUNDS:
                best = min((min(samples[name]) for name in racing), default=0.0)
                racing = {name: replay for name, replay in racing.items() if min(samples[name]) <= BEHIND * best}
        torch.cuda.current_stream().synchronize()
        return {name: statistics.median(s) for name, s in samples.items()}, refused
