"""What is installed and in use on this machine, and why not more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess

import torch

from . import backends
from .machine import cpu_flags, cpu_name

__all__ = ["diagnosis"]

# What the CPU kernels, and those of PyTorch, ask for.
_FLAGS = ("avx2", "fma", "avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16", "amx_bf16")


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


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "none visible" if torch.version.cuda else "none in use: this PyTorch is built for CPUs only"


def _gpu_choices() -> dict[str, str]:
    """What is known of this GPU's fastest kernels before anything is measured."""
    if not torch.cuda.is_available() or not backends.status()["triton"].startswith("loaded"):
        return {}
    from .gpu import shipped

    return {"GPU choices": shipped.status(torch.cuda.get_device_name())}


def _extension() -> str:
    """Its build may be older or newer than the torch that it was loaded into."""
    if not backends.loaded():
        return "not loaded: see backend cpu"
    major, minor = divmod(backends.native.target, 256)
    return f"built with torch {backends.native.built_with}, for torch {major}.{minor} and later"


def _isa() -> str:
    if not backends.loaded():
        return "no kernels loaded"
    cap = os.environ.get("ATEN_CPU_CAPABILITY")
    return f"{backends.isa()} (ATEN_CPU_CAPABILITY {'not set' if cap is None else f'= {cap}'})"


def diagnosis() -> dict[str, str]:
    """Findings by subject, in the order in which they are worth reading."""
    flags = cpu_flags()
    known = " ".join(flag for flag in _FLAGS if flag in flags) or "none of those that kernels use"
    status = backends.status()
    return {
        "resnet_fast": importlib.metadata.version("resnet_fast") if _installed() else "not installed, run in place",
        "extension": _extension(),
        **{f"backend {name}": state for name, state in status.items()},
        "CPU": f"{cpu_name()}, {os.cpu_count()} CPUs",
        "instruction sets": known if flags else "unknown: this system does not list them",
        "kernels use": _isa(),
        "PyTorch uses": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else torch.__version__,
        "Python": platform.python_version(),
        "C++ compiler": _compiler(),
        "nvcc": _nvcc(),
        "Triton": _triton(),
        "GPU": _gpu(),
        **_gpu_choices(),
    }


def _installed() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="resnet_fast"))
