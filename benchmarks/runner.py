"""Runs a case by several variants: verifies each on every kind of images, then times them in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Twin
from .gpu.device import CPU, Device
from .gpu.variants import GPU_VARIANTS
from .timing import Spread, Timing, interleaved
from .variants import BASELINE, VARIANTS, UnavailableError, Variant
from .verify import Reference, WrongResultError

__all__ = ["Bench", "Measured", "Result", "measured", "results", "variants_of"]


def variants_of(device: Device) -> dict[str, Variant]:
    """What can be measured there, by name."""
    return GPU_VARIANTS if device.name == "cuda" else VARIANTS


@dataclass(frozen=True)
class Result:
    """One line of the report. ``ratio`` is time over the time of eager channels_last in the same interleaved run."""

    group: str
    variant: str
    images: str
    threads: int
    rounds: int
    seconds: Spread
    ratio: Spread
    error: float  # of the first output against float64, as a multiple of eager's; the worst kind of images


class Bench:
    """A case, its exact results, and the variants prepared for it."""

    def __init__(self, case: Case, device: Device = CPU) -> None:
        self.case, self.device = case, device
        self.module: Twin = case.build().to(device.name)
        self.errors: dict[str, float] = {}
        self._references = {
            kind: Reference.of(self.module, case.input(kind).to(device.name), device) for kind in case.kinds
        }
        self._calls: dict[str, Callable[[Tensor], Any]] = {}

    @torch.no_grad()
    def call(self, name: str, kind: str) -> Callable[[], Any]:
        """``name`` bound to its input, after its results were found right on all kinds.

        Raises:
            UnavailableError: it cannot run here.
            WrongResultError: a result breaks the error rule.
        """
        variant = variants_of(self.device)[name]
        if name not in self._calls:
            first, *_ = self.case.kinds
            with self.device.arithmetic():
                call = variant.prepare(self.module, self._input(variant, first))
                errors = [
                    ref.check(f"{name} on {k}", call(self._input(variant, k)), variant.slack)
                    for k, ref in self._references.items()
                ]
            self._calls[name], self.errors[name] = call, max(errors)
        call, x = self._calls[name], self._input(variant, kind)

        def bound() -> Any:
            with torch.no_grad(), self.device.arithmetic():
                return call(x)

        return bound

    def _input(self, variant: Variant, kind: str) -> Tensor:
        x = self.case.input(kind).to(self.device.name, self.device.dtype if variant.cast else None)
        return x.contiguous(memory_format=variant.layout)

    def result(self, name: str, kind: str, timing: Timing) -> Result:
        return Result(
            group=self.case.group,
            variant=name,
            images=kind,
            threads=torch.get_num_threads(),
            rounds=len(timing.samples[name]),
            seconds=timing.seconds(name),
            ratio=timing.ratio(name, BASELINE),
            error=self.errors[name],
        )


@dataclass(frozen=True)
class Measured:
    """A case after its one interleaved run. Each variant has a result and its call, or is refused with the reason."""

    case: Case
    results: dict[str, Result]
    calls: dict[str, Callable[[], Any]]
    refused: dict[str, Exception]


def measured(
    case: Case,
    variants: Iterable[str],
    kind: str,
    device: Device = CPU,
    *,
    refusals: tuple[type[Exception], ...] = (UnavailableError, WrongResultError),
    **timing: Any,
) -> Measured:
    """All variants of a case, and the baseline, built and verified once, then timed in one interleaved run.

    refusals: what a variant may raise without ending the run of the others; of the baseline everything is raised.
    """
    bench = Bench(case, device)
    calls = {BASELINE: bench.call(BASELINE, kind)}
    refused: dict[str, Exception] = {}
    for name in variants:
        try:
            calls[name] = bench.call(name, kind)
        except refusals as reason:
            refused[name] = reason
    times = interleaved(calls, device=device, **timing)
    return Measured(case, {name: bench.result(name, kind, times) for name in calls}, calls, refused)


def results(
    case: Case, variants: Iterable[str], kind: str, device: Device = CPU, **timing: Any
) -> tuple[list[Result], dict[str, Exception]]:
    """All variants of a case in one interleaved run, and why the others have no time."""
    found = measured(case, variants, kind, device, **timing)
    return list(found.results.values()), found.refused
