"""What a module is run by. A new peer is one more function: ``prepare(module, x) -> callable``.

``prepare`` gets the plain module in eval mode and an example input, laid out as the variant likes it best; it compiles,
exports or converts, and returns a callable that takes an input of that shape and layout and returns what the module
returns. All of that is outside the times. It raises :class:`UnavailableError` where the peer is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import resnet_fast

from .cases import Twin
from .verify import in_layout

__all__ = ["BASELINE", "OURS", "SLOW", "VARIANTS", "UnavailableError", "Variant"]

Call = Callable[[Tensor], Any]


class UnavailableError(RuntimeError):
    """The variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    prepare: Callable[[Twin, Tensor], Call]
    layout: torch.memory_format = torch.channels_last
    slack: float = (
        1.0  # on the error rule: another engine may trade accuracy for speed, and must compute the same network
    )
    cast: bool = False  # inputs come in the dtype of the arithmetic, and weights are to be in it


VARIANTS: dict[str, Variant] = {}


def _variant(
    name: str, layout: torch.memory_format = torch.channels_last
) -> Callable[[Callable[[Twin, Tensor], Call]], Callable[[Twin, Tensor], Call]]:
    def register(prepare: Callable[[Twin, Tensor], Call]) -> Callable[[Twin, Tensor], Call]:
        VARIANTS[name] = Variant(prepare, layout)
        return prepare

    return register


@_variant("eager", layout=torch.contiguous_format)
def eager(module: Twin, x: Tensor) -> Call:
    return in_layout(module, torch.contiguous_format)


@_variant("eager channels_last")
def eager_channels_last(module: Twin, x: Tensor) -> Call:
    return in_layout(module, torch.channels_last)


def _compiled(module: Twin, x: Tensor) -> Call:
    torch.compiler.reset()
    compiled: Any = module.compiled()
    # Dynamo and Inductor read this switch while they compile, which happens at the first call.
    with torch._inductor.config.patch(freezing=True):
        compiled(x)
    # What is timed is the program made above.
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
    return compiled


@_variant("torch.compile, freezing")
def compile_freezing(module: Twin, x: Tensor) -> Call:
    return _compiled(in_layout(module, torch.channels_last), x)


def _fast(module: Twin, x: Tensor) -> Twin:
    if not resnet_fast.backends.loaded():
        raise UnavailableError(resnet_fast.backends.status()["cpu"])
    fast = module.fast()
    resnet_fast.backends.fallbacks(clear=True)
    with resnet_fast.backends.use("cpu"):  # raises where something would run unfused
        fast(x)
    return fast


@_variant("resnet_fast")
def fused(module: Twin, x: Tensor) -> Call:
    return _fast(module, x)


@_variant("resnet_fast, torch.compile")
def compile_fused(module: Twin, x: Tensor) -> Call:
    return _compiled(_fast(module, x), x)


SLOW = ("torch.compile, freezing", "resnet_fast, torch.compile")  # half a minute of compiling for a network
BASELINE = "eager channels_last"
OURS = "resnet_fast"
