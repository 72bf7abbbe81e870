"""A trace of ten steps by ``torch.profiler``, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import profiler

from .. import report

__all__ = ["STEPS", "Trace"]

STEPS = 10
_BEFORE = 5  # the first steps choose kernels and fill caches


class Trace:
    """Records steps 6 to 15 after its start into ``path``; one that is off does nothing."""

    def __init__(self, path: Path, on: bool) -> None:
        self._path, self._profile = path, None
        if not on:
            return
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        schedule = profiler.schedule(wait=_BEFORE - 1, warmup=1, active=STEPS, repeat=1)
        self._profile = profiler.profile(activities=activities, schedule=schedule, on_trace_ready=self._write)
        self._profile.start()

    def _write(self, profile: Any) -> None:
        profile.export_chrome_trace(str(self._path))
        report.say(f"trace of {STEPS} steps: {self._path}")

    def step(self) -> None:
        """Call it after each step."""
        if self._profile is None:
            return
        self._profile.step()
        if self._profile.step_num == _BEFORE + STEPS:
            self.close()

    def close(self) -> None:
        """Ends the trace; of fewer steps there is one, too, if it had begun."""
        if self._profile is not None:
            if self._profile.step_num < _BEFORE:
                report.say(f"--profile: no {self._path.name}, fewer than {_BEFORE + 1} steps were left")
            self._profile.stop()
            self._profile = None
