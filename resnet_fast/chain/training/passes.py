"""Forward and backward of a chain in training, on the device of its images; the autograd functions call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import backends
from .. import devices
from .driver import ChainBackward, forward
from .kernels import Kernels
from .layers import Layer, SavedTensors
from .synchronized import SyncedKernels

__all__ = ["Passes"]

_OPERATORS = Kernels()


class Passes:
    """Forward and backward of one chain. On a GPU the launches of a pass are recorded, then replayed from C++.

    group: the processes that synchronised layers take their statistics over, or None. A tape holds no collectives: with
    a group, GPUs run the operators one by one.
    """

    def __init__(self, layers: list[Layer], group: Any = None) -> None:
        self.layers, self.group = layers, group
        self._operators = _OPERATORS if group is None else SyncedKernels(layers, group)
        self._replayed: Any = None

    def _on_gpu(self, x: Tensor) -> Any:
        """The chain's replayed passes where ``x`` is on a GPU, else None."""
        if not self.updates_statistics(x):
            return None
        if self._replayed is None:
            self._replayed = devices.gpu.passes(self.layers)
        return self._replayed

    def updates_statistics(self, x: Tensor) -> bool:
        """Whether the forward itself updates the running statistics."""
        return backends.kind(x) == "cuda" and self.group is None

    def forward(
        self, x: Tensor, tensors: list[Tensor | None], recompute: bool, running: Sequence[Any]
    ) -> tuple[Tensor, SavedTensors]:
        """As :func:`.driver.forward`."""
        replayed = self._on_gpu(x)
        if replayed is not None:
            return replayed.forward(x, tensors, recompute, running)
        return forward(self._operators, self.layers, x, tensors, recompute)

    def backward(
        self, x: Tensor, saved: SavedTensors, tensors: list[Tensor | None], needs: Sequence[bool], grad: Tensor
    ) -> list[Tensor | None]:
        """As :class:`.driver.ChainBackward`. Empties ``saved``, so that each activation is freed after its last use."""
        replayed = self._on_gpu(x)
        if replayed is not None:
            return replayed.backward(x, saved, tensors, needs, grad)
        return ChainBackward(self._operators, self.layers, x, saved, tensors, needs).gradients(grad)
