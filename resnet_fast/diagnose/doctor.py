"""``python -m resnet_fast doctor``: what is installed and in use on this machine, and why not more."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .. import backends
from ..backends.native import extension
from . import system

__all__ = ["diagnosis"]


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "none visible" if torch.version.cuda else "none in use: this PyTorch is built for CPUs only"


def _gpu_choices() -> dict[str, str]:
    """Whether kernel choices for this GPU come with the package; nothing without a GPU."""
    if not torch.cuda.is_available() or not backends.status()["triton"].startswith("loaded"):
        return {}
    from ..gpu import shipped

    return {"GPU choices": shipped.status(torch.cuda.get_device_name())}


def _extension() -> str:
    """The torch that the extension was built with, and its folder if it is another package's."""
    if not backends.loaded():
        return "not loaded: see backend cpu"
    major, minor = divmod(extension.target, 256)
    built = f"built with torch {extension.built_with}, for torch {major}.{minor} and later"
    folder = Path(extension.__file__).parent
    return (
        built if folder.samefile(Path(__file__).parents[1]) else f"{built}; that of the package installed in {folder}"
    )


def _isa() -> str:
    if not backends.loaded():
        return "no kernels loaded"
    cap = os.environ.get("ATEN_CPU_CAPABILITY")
    return f"{backends.isa()} (ATEN_CPU_CAPABILITY {'not set' if cap is None else f'= {cap}'})"


def diagnosis() -> dict[str, str]:
    """Findings by subject, the most useful first."""
    status = backends.status()
    return {
        **system.package(),
        "extension": _extension(),
        **{f"backend {name}": state for name, state in status.items()},
        **system.cpu(),
        "kernels use": _isa(),
        "PyTorch uses": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else torch.__version__,
        **system.python(),
        **system.compilers(),
        "GPU": _gpu(),
        **_gpu_choices(),
    }
