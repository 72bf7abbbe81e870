"""Programs and packages that may be missing on a machine."""

from __future__ import annotations

import glob
import importlib.util
import shutil

__all__ = ["PACKAGES", "PROGRAMS", "missing", "tool"]

PROGRAMS = {
    "compute-sanitizer": "sanitize cannot run",
    "ncu": "profile has no counters",
    "nvidia-smi": "the driver's version is not known",
}
PACKAGES = {
    "pytest": "tests cannot run",
    "xdist": "(pytest-xdist) tests run in one process",
    "pytest_benchmark": "(pytest-benchmark) tests of the benchmarks fail",
    "numpy": "tests cannot run",
    "sklearn": "(scikit-learn) images are noise alone",
    "matplotlib": "there is no chart",
    "triton": "resnet_fast has no kernels on GPUs",
}


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    places = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/usr/local/nvidia/bin")
    found = [shutil.which(name), *(shutil.which(name, path=place) for place in places)]
    found += sorted(glob.glob(f"/opt/nvidia/*/*/{name}"), reverse=True)
    return next((path for path in found if path), None)


def missing() -> dict[str, str]:
    """What is not here, and what follows from it."""
    programs = {name: what for name, what in PROGRAMS.items() if tool(name) is None}
    return programs | {name: what for name, what in PACKAGES.items() if importlib.util.find_spec(name) is None}
