"""The part of ``doctor`` that needs no PyTorch: CPU, Python, compilers, Triton, and this package."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

__all__ = ["compilers", "cpu", "cpu_name", "package", "python", "show"]

# Instruction sets that the CPU kernels, or PyTorch's, use.
_FLAGS = ("avx2", "fma", "avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16", "amx_bf16")


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, or an empty string."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(values, "")


def cpu_name() -> str:
    """The CPU's model, such as ``"AMD EPYC 9R14"``; its architecture where the system does not say."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"does not run: {error}"]
    return done.stdout.strip().splitlines() or ["says nothing"]


def _compiler() -> str:
    name = shlex.split(os.environ.get("CXX", "c++"))[0]
    path = shutil.which(name) or shutil.which("g++")
    return f"{_output([path, '--version'])[0]} ({path})" if path else "none: set CXX or install g++"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if path is None:
        return f"none on PATH or in {home}: CUDA kernels cannot be built here"
    release = next((line for line in _output([path, "--version"]) if "release" in line), "unknown release")
    return f"{release.strip()} ({path})"


def package() -> dict[str, str]:
    """The installed version, and the folder of the package that runs, which may be a clone."""
    version = _version("resnet_fast")
    return {"resnet_fast": f"{version or 'not installed, run in place'} ({Path(__file__).parents[1]})"}


def cpu() -> dict[str, str]:
    """The CPU, and its instruction sets by Linux's names."""
    flags = set(_cpuinfo("flags").split())
    known = " ".join(flag for flag in _FLAGS if flag in flags) or "none of those that kernels use"
    return {
        "CPU": f"{cpu_name()}, {os.cpu_count()} CPUs",
        "instruction sets": known if flags else "unknown: this system does not list them",
    }


def python() -> dict[str, str]:
    return {"Python": platform.python_version()}


def compilers() -> dict[str, str]:
    return {"C++ compiler": _compiler(), "nvcc": _nvcc(), "Triton": _version("triton") or "not installed"}


def show(findings: dict[str, str]) -> None:
    """Prints one line a subject."""
    width = max(map(len, findings))
    for subject, finding in findings.items():
        print(f"{subject.ljust(width)}  {finding}")
