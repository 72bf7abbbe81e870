"""Builds the networks that the program trains, and prepares their input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from . import checkpoints
from .data import Preparation
from .options import MODELS, ProgramError

__all__ = ["build", "of_checkpoint", "prepare", "prepared_values"]


class _Scores(models.ResNet32):
    """ResNet32 that returns logits, as the other networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def build(model: str, preparation: Preparation) -> nn.Module:
    """The network called ``model``, images to logits, with initial weights."""
    if model not in MODELS:  # from a checkpoint
        raise ProgramError(f"no network is called {model!r}: want one of {', '.join(MODELS)}")
    classes = len(preparation.classes)
    try:
        if model == "ResNet32":
            return _Scores(num_classes=classes, image_size=preparation.size)
    except ValueError as error:
        raise ProgramError(f"--model {model} for images of {preparation.size} x {preparation.size}: {error}") from error
    return getattr(models, model)(num_classes=classes)


def of_checkpoint(path: Path) -> tuple[nn.Module, Preparation]:
    """The network of a checkpoint in eval mode, with averaged weights if it has them, and how to prepare its input.

    Raises:
        ProgramError: the file cannot be loaded, or ``resnet_fast.train`` did not write it.
    """
    state = checkpoints.load(path)
    try:
        preparation = Preparation(**state["preparation"])
        network = build(state["options"]["model"], preparation)
        weights = state["model"]
        if state["ema"] is not None:
            weights = {name.removeprefix("module."): t for name, t in state["ema"].items() if name != "n_averaged"}
        network.load_state_dict(weights)
    except checkpoints.MISFITS as error:
        raise checkpoints.misfit(path, error) from error
    return network.eval().to(memory_format=torch.channels_last), preparation  # type: ignore[call-overload]


def prepare(images: Tensor, preparation: Preparation, like: Tensor, memory_format: Any) -> Tensor:
    """``(images / 255 - mean) / std``: ``uint8 [N, 1 or 3, H, W] -> [N, 3, H, W]``, dtype and device of ``like``."""
    x = images.to(like.device, non_blocking=True).to(like.dtype)
    mean, std = (like.new_tensor(v)[:, None, None] for v in (preparation.mean, preparation.std))
    # The stems take three channels: repeat a grey one.
    return ((x / 255 - mean) / std).expand(-1, 3, -1, -1).contiguous(memory_format=memory_format)


def prepared_values(preparation: Preparation, like: Tensor) -> Tensor:
    """What :func:`prepare` makes of the values of a pixel, ``[3, 256]``: by its own arithmetic, so bit for bit."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, len(preparation.mean), 1, 256)
    return prepare(values, preparation, like, torch.contiguous_format)[0, :, 0].contiguous()
