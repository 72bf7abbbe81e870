"""Times of several callables taken in turn, so that all of them see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .gpu.device import CPU, Device

__all__ = ["Spread", "Timing", "interleaved"]

# A sample is at least this long, so that the clock and the loop around the calls do not count.
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def width(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Timing:
    """Seconds a call of each callable, round by round: ``samples[name][round]``."""

    samples: dict[str, list[float]]

    def seconds(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """Time of ``name`` over time of ``baseline``, taken within each round: a slow spell hits both."""
        pairs = zip(self.samples[name], self.samples[baseline], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 30.0,
    warmup: int = 2,
    device: Device = CPU,
) -> Timing:
    """Calls A B C A B C ... and times each call.

    Args:
        callables: what to time, by name.
        rounds: samples of each, at least 5.
        seconds: budget for all samples; where they would take longer, there are fewer rounds, but 5 at least.
        warmup: unmeasured calls of each beforehand.
        device: whose clock and whose caches.

    Raises:
        ValueError: fewer than 5 rounds: quartiles would mean nothing.
    """
    if rounds < 5:
        raise ValueError(f"rounds is {rounds}, want at least 5")
    for call in callables.values():
        for _ in range(warmup):
            call()
    once = {name: device.sample(call, 1) for name, call in callables.items()}
    repeats = {name: max(1, round(SAMPLE_SECONDS / t)) for name, t in once.items()}
    round_seconds = sum(once[name] * repeats[name] for name in once)
    rounds = min(rounds, max(5, int(seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        for name, call in callables.items():
            samples[name].append(device.sample(call, repeats[name]))
    return Timing(samples)
