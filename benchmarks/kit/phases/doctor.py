"""What this machine has: a GPU, the package's own diagnosis, and what is missing."""

from __future__ import annotations

import subprocess
import sys
import time

from ..machine import versions
from ..options import ROOT, Options
from ..tools import missing
from ..worker import Emit

__all__ = ["items", "run"]


def items(options: Options) -> list[str]:
    return ["GPU", "missing", "diagnosis"]


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    if item == "GPU":
        if options.device == "cuda" and "card" not in versions():
            raise RuntimeError("no CUDA device is visible to PyTorch: the phases that need one will fail")
    elif item == "missing":
        for name, what in missing().items():
            emit({"missing": f"{name} is not installed here: {what}"})
    else:
        done = subprocess.run(
            [sys.executable, "-m", "resnet_fast", "doctor"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=options.environment(),
            timeout=max(5, deadline - time.time()),
        )
        print(done.stdout, done.stderr)
        for line in done.stdout.splitlines():
            subject, _, finding = line.partition("  ")
            emit({"subject": subject.strip(), "finding": finding.strip()})
        if done.returncode:
            raise RuntimeError(f"python -m resnet_fast doctor: {(done.stderr.strip().splitlines() or [''])[-1]}")
