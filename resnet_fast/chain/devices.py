"""What a device does for chains in its own way. GPUs fill in their table as :mod:`resnet_fast.gpu` is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Gpu", "gpu"]


class Gpu(NamedTuple):
    chain: Callable[..., Any]  # (specs, sources, eps): a chain in inference
    passes: Callable[..., Any]  # (layers): forward and backward pass of a chain in training
    averages: Callable[..., bool]  # (x): whether there is a kernel of average pooling for it
    flat_average: Callable[..., Any]  # (x, kernel, stride)


gpu: Any = None
