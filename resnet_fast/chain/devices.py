"""The functions of a GPU that chains call, as a table: :mod:`resnet_fast.gpu` fills it when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Gpu", "gpu"]


class Gpu(NamedTuple):
    chain: Callable[..., Any]  # (specs, sources, eps): runs a chain in inference
    passes: Callable[..., Any]  # (layers): runs forward and backward of a chain in training
    averages: Callable[..., bool]  # (x): whether a kernel pools x
    flat_average: Callable[..., Any]  # (x, kernel, stride): flatten(avg_pool2d(...), 1)


gpu: Any = None
