"""What forward and backward of a chain in training tell each other: its layers, its values, what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.spec import ConvSpec, conv_size

__all__ = ["SAVED", "TENSORS", "Layer", "SavedTensors", "Value", "counts", "dense", "layers_of", "unpacked"]

# Of each layer: weight, bias, gamma, beta, and the mean and variance that batch norm in eval mode is given.
TENSORS = 6


class Layer(NamedTuple):
    """A convolution with its batch norm, and what the forward and the backward must know of them beside tensors."""

    source: int
    residual: int
    relu: bool
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    eps: float
    normalized: bool
    batch_statistics: bool


class SavedTensors(NamedTuple):
    """What the backward pass needs of the forward pass, a list over the layers each."""

    ys: list[Tensor | None]  # None for a last one without batch norm: nothing reads it
    sums: list[Tensor | None]  # values that are no batch norm of a y: residual sums
    scales: list[Tensor | None]  # [scale; shift]
    moments: list[Tensor]  # [mean; variance]
    filters: list[Tensor | None]  # as kernels read them; None for those that they make anew


SAVED = len(SavedTensors._fields)


class Value(NamedTuple):
    """A chain's input or a layer's result: a tensor, or a convolution's output that is normalised where it is read."""

    tensor: Tensor
    scale_shift: Tensor | None = None
    relu: bool = False


def layers_of(specs: Sequence[ConvSpec], eps: list[float], normalized: list[bool], batch: list[bool]) -> list[Layer]:
    """The convolutions of a chain with what training wants to know of their batch norms."""
    return [
        Layer(
            *(spec.source, spec.residual, spec.relu, list(spec.kernel), list(spec.stride), list(spec.padding)),
            *(epsilon, norm, own),
        )
        for spec, epsilon, norm, own in zip(specs, eps, normalized, batch, strict=True)
    ]


def counts(layers: list[Layer], shape: torch.Size) -> list[int]:
    """Values per channel of each layer's output, for an input of ``shape``."""
    maps = [tuple(shape[2:])]
    for layer in layers:
        sizes = zip(maps[layer.source], layer.padding, layer.kernel, layer.stride, strict=True)
        maps.append(tuple(conv_size(*size) for size in sizes))
    return [shape[0] * h * w for h, w in maps[1:]]


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def unpacked(t: Tensor | None) -> Any:
    """A saved tensor as it was when it was saved: hooks of saved tensors may give it back in another layout."""
    return t if t is None else dense(t) if t.dim() == 4 else t.contiguous()
