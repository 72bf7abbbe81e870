"""The card and the versions of a run, by subject."""

from __future__ import annotations

import contextlib
import datetime
import platform
import subprocess

from .tools import tool

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Card, driver and versions, by subject."""
    import torch

    found = {
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
    }
    try:
        import triton

        found["Triton"] = triton.__version__
    except ImportError:
        found["Triton"] = "none"
    import resnet_fast

    found["resnet_fast"] = resnet_fast.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": torch.cuda.get_device_name(0),
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "L2, MiB": f"{properties.L2_cache_size / 2**20:.0f}",
            "memory, GiB": f"{properties.total_memory / 2**30:.1f}",
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    smi = tool("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            found["driver"] = done.stdout.strip() or "nvidia-smi says nothing"
    return found
