"""Was the machine at rest while times were taken? One line of the report says so; nothing fails for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .timing import Spread

__all__ = ["Load", "line"]

# What this process and the system's own add to the load average by themselves.
OWN_LOAD = 0.5
# Of a quiet machine the baseline's quartiles lie closer together, as a share of its median.
STEADY = 0.1


@dataclass(frozen=True)
class Load:
    """Load average of the last minute, taken before the first measurement: how many threads wanted a CPU."""

    average: float
    cpus: int
    threads: int  # that the measurement wants for itself

    @classmethod
    def now(cls, threads: int | None = None) -> Load:
        return cls(os.getloadavg()[0], os.cpu_count() or 1, threads or torch.get_num_threads())

    @property
    def limit(self) -> float:
        """Up to here every thread of the measurement has a CPU of its own."""
        return max(0, self.cpus - self.threads) + OWN_LOAD


def line(load: Load, baselines: Mapping[str, Spread]) -> str:
    """Whether the machine was busy, and by what that was told: the load at the start, the spread of the baseline.

    baselines: seconds of the baseline, by case.
    """
    signs = []
    wanted = f"{load.cpus} CPUs, {load.threads} threads"
    over = load.average > load.limit
    limit = f", want at most {load.limit:.1f}" if over else ""
    signs.append(f"load average {load.average:.2f} at the start ({wanted}{limit})")
    widest = max(baselines, key=lambda case: baselines[case].width, default=None)
    unsteady = widest is not None and baselines[widest].width > STEADY
    if widest is not None:
        where = f" ({widest}), want {STEADY:.0%}" if unsteady else ""
        signs.append(f"the baseline's quartiles are up to {baselines[widest].width:.0%} of its median apart{where}")
    state = "BUSY MACHINE, do not trust these times" if over or unsteady else "Quiet machine"
    return f"{state}: {'; '.join(signs)}."
