"""Times of GPU work by the GPU's own clock, with the host out of the way.

Every candidate is captured into a CUDA graph of several calls in a row, and the graphs are replayed in turn: what is
timed is what the GPU does in a network that is replayed or launched ahead, however long the host takes for a call.
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

# A graph lasts about this long and a sample of replays at least so long: an event's time is good to a microsecond.
GRAPH_SECONDS = 150e-6
SAMPLE_SECONDS = 300e-6
MOST_CALLS = 32
ROUNDS = 7
# After this many rounds, who is slower than the fastest by this factor is out of the race.
TRIAL_ROUNDS, BEHIND = 2, 1.25
# The GPU sleeps so many of its cycles while the host queues what is timed: some 100 us.
SLEEP_CYCLES = 200_000


class _Replay:
    """Calls in a row as one CUDA graph."""

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        once = _seconds(calls[0], 1)
        self.calls = min(MOST_CALLS, max(2, round(GRAPH_SECONDS / once)))
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # thread_local: other threads may allocate meanwhile, say for the loading of data.
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
        """Seconds a call, of a sample of replays."""
        return _seconds(self.graph.replay, self.replays) / self.calls


def _seconds(call: Call, repeats: int) -> float:
    """Seconds a call on the current stream, while the host is ahead."""
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
    """Seconds a call of each candidate on ``device``, the median of rounds in which all take turns.

    Args:
        candidates: by name, calls that compute the same on different operands: they are made in turn, so that
            operands which would be cold in a network are not always in the cache. Each allocates what it returns.
        device: a CUDA device; its current stream is the one in use.
        errors: what a candidate raises that cannot run here.

    Returns:
        The seconds, and of the candidates that cannot run what they raised. Failures of the device itself are raised.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        replays: dict[Name, _Replay] = {}
        refused: dict[Name, Exception] = {}
        collects = gc.isenabled()
        gc.disable()  # what a collection frees during a capture would end it
        try:
            for name, calls in candidates.items():
                try:
                    calls[0]()  # compiles, and lets libraries choose their algorithms
                    replays[name] = _Replay(calls, stream)
                except torch.AcceleratorError:
                    raise
                except errors as error:
                    refused[name] = error
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
