"""Kernel choices that come with the package for GPUs that were measured: one file a GPU in ``choices/``.

A file states the versions and the kernels that it was measured with. If they differ here it is ignored, which
:func:`status` reports. ``python -m resnet_fast tune MODEL --export FILE`` writes one; :mod:`.tune` reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from .. import backends

__all__ = ["FOLDER", "current", "export", "kernels", "load", "status"]

FOLDER = Path(__file__).parent / "choices"


def _file(gpu: str) -> Path:
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', gpu)}.json"


def current() -> dict[str, str]:
    """What choices depend on besides the GPU: releases of PyTorch, Triton and cuDNN, and the lists of tiles."""
    from .candidates import triton as configs

    def release(version: str) -> str:
        return ".".join(version.split(".")[:2])

    def digest(*tiles: object) -> str:
        return hashlib.sha256(" ".join(map(str, tiles)).encode()).hexdigest()[:12]

    def built(*families: str) -> str:
        if not backends.has_cuda_convolution():
            return "none built"
        return digest(*(list(getattr(torch.ops.resnet_fast, f"{family}_tiles")()) for family in families))

    return {
        "torch": release(torch.__version__),
        "triton": release(backends.triton_version()),
        "cudnn": str((torch.backends.cudnn.version() or 0) // 100),
        "triton_tiles": digest(configs.tables()),
        "cuda_tiles": built("conv_bn_relu"),
        "hopper_tiles": built("conv_halo", "conv1x1", "conv_halo_training", "weight_gradient"),
    }


def kernels() -> str:
    """A digest of all lists of tiles: choices are their numbers."""
    tiles = [value for name, value in current().items() if name.endswith("_tiles")]
    return hashlib.sha256(" ".join(tiles).encode()).hexdigest()[:8]


def _is_current(found: dict[str, str]) -> bool:
    """Whether what a file states holds here. One that was measured before there were tiles for Hopper states none."""
    here = current()
    return all(found.get(name, here[name] if name == "hopper_tiles" else None) == value for name, value in here.items())


def load(gpu: str) -> dict[str, Any]:
    """Entries by key for the GPU of that name; none if there is no file or it is not current."""
    file = _file(gpu)
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    return content["choices"] if _is_current(content["versions"]) else {}


def status(gpu: str) -> str:
    """A line for the doctor."""
    file = _file(gpu)
    if not file.exists():
        return "none for this GPU: measured at the first call of a shape"
    content = json.loads(file.read_text())
    found, wanted = content["versions"], current()
    if _is_current(found):
        return f"{len(content['choices'])} of {content['date']}"
    differ = [f"{name} {found.get(name)} (here {wanted[name]})" for name in wanted if found.get(name) != wanted[name]]
    return f"not current, made with {', '.join(differ)}: measured anew at the first call of a shape"


def export(gpu: str, choices: dict[str, Any], file: Path, date: str) -> None:
    """Writes ``choices``, entries by key, for the GPU of that name to ``file``."""
    content = {"gpu": gpu, "date": date, "versions": current(), "choices": dict(sorted(choices.items()))}
    file.write_text(json.dumps(content, indent=1) + "\n")
