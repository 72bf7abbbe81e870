"""Registers fakes, gradients, autocast rules and FLOP formulas of the extension's operators with PyTorch, on import."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import augment, chain, conv_autograd, flops, training
from .add_relu import register as register_add_relu
from .arguments import shapeless
from .differentiation import Registry

__all__ = ["library", "without_gradient"]


def without_gradient(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"resnet_fast::{op} has no gradient of its own: use conv_bn_relu and its kin, or an uncompiled module"
        )

    return backward


def _register() -> Registry:
    unfused: dict[str, Any] = {op: conv_autograd.unfused_operator(op) for op in conv_autograd.OPERATORS}
    unfused["add_relu"] = lambda a, b: F.relu(a + b)
    registry = Registry("resnet_fast", "IMPL", unfused)
    conv_autograd.register(registry)
    register_add_relu(registry)
    fakes = {**chain.FAKES, **training.FAKES, **training.FAKES_ON_CPUS}
    for op, fake in fakes.items():
        torch.library.register_fake(f"resnet_fast::{op}", shapeless(op, fake), lib=registry)
        torch.library.register_autograd(f"resnet_fast::{op}", without_gradient(op), lib=registry)
    torch.library.register_fake("resnet_fast::augment", shapeless("augment", augment.fake), lib=registry)
    for op in (*unfused, *fakes, "augment"):
        backends.note_kernel(op)
    flops.register_when_imported()
    return registry


# Registrations live as long as their library object.
library = _register() if backends.loaded() else None
