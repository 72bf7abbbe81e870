"""Runs a case by several variants: verifies each on every kind of images, then times them in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Twin
from .timing import Spread, Timing, interleaved
from .variants import BASELINE, VARIANTS, UnavailableError
from .verify import Reference, WrongResultError

__all__ = ["Bench", "Result", "results"]


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

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module: Twin = case.build()
        self.errors: dict[str, float] = {}
        self._references = {kind: Reference.of(self.module, case.input(kind)) for kind in case.kinds}
        self._calls: dict[str, Callable[[Tensor], Any]] = {}

    @torch.no_grad()
    def call(self, name: str, kind: str) -> Callable[[], Any]:
        """``name`` bound to its input, after its results were found right on all kinds.

        Raises:
            UnavailableError: it cannot run here.
            WrongResultError: a result breaks the error rule.
        """
        variant = VARIANTS[name]
        if name not in self._calls:
            first, *_ = self.case.kinds
            call = variant.prepare(self.module, self._input(name, first))
            errors = [
                ref.check(f"{name} on {k}", call(self._input(name, k)), variant.slack)
                for k, ref in self._references.items()
            ]
            self._calls[name], self.errors[name] = call, max(errors)
        call, x = self._calls[name], self._input(name, kind)

        def bound() -> Any:
            with torch.no_grad():
                return call(x)

        return bound

    def _input(self, name: str, kind: str) -> Tensor:
        return self.case.input(kind).contiguous(memory_format=VARIANTS[name].layout)

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


def results(
    case: Case, variants: Iterable[str], kind: str, **timing: Any
) -> tuple[list[Result], dict[str, UnavailableError | WrongResultError]]:
    """All variants of a case in one interleaved run, and why the others have no time."""
    bench = Bench(case)
    calls = {}
    refused: dict[str, UnavailableError | WrongResultError] = {}
    for name in dict.fromkeys([BASELINE, *variants]):
        try:
            calls[name] = bench.call(name, kind)
        except (UnavailableError, WrongResultError) as reason:
            refused[name] = reason
    times = interleaved(calls, **timing)
    return [bench.result(name, kind, times) for name in calls], refused
