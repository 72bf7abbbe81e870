"""The data that forward and backward of chain training share: layers, values, saved tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.spec import ConvSpec, conv_size

__all__ = [
    "SAVED",
    "TENSORS",
    "Layer",
    "SavedTensors",
    "Value",
    "block_ends",
    "counts",
    "dense",
    "layers_of",
    "unpacked",
]

# Tensors of a layer: weight, bias, gamma, beta, and the running mean and variance where batch norm is in eval mode.
TENSORS = 6


class Layer(NamedTuple):
    """A convolution with its batch norm: all that forward and backward must know besides tensors."""

    source: int
    residual: int
    relu: bool
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    eps: float
    normalized: bool
    batch_statistics: bool
    synced: bool = False  # the batch's of all processes


class SavedTensors(NamedTuple):
    """What the forward saves for the backward, by layer."""

    ys: list[Tensor | None]  # outputs of the convolutions; None for a last one without batch norm: nothing reads it
    sums: list[Tensor | None]  # results that are not the batch norm of a y: residual sums
    scales: list[Tensor | None]  # [scale; shift]
    stats: list[Tensor]  # [mean; variance]
    filters: list[Tensor | None]  # as the kernels read them; None where they pack them again
    counts: list[Tensor | None]  # values per channel in all processes, where batch norm is synchronised


SAVED = len(SavedTensors._fields)


class Value(NamedTuple):
    """A chain's input or a layer's result: a tensor, or a convolution's output, normalised where it is read."""

    tensor: Tensor
    scale_shift: Tensor | None = None
    relu: bool = False


def layers_of(specs: Sequence[ConvSpec], eps: list[float], normalized: list[bool], batch: list[bool]) -> list[Layer]:
    """The layers of a chain: ``specs`` with the attributes of their batch norms."""
    return [
        Layer(
            *(spec.source, spec.residual, spec.relu, list(spec.kernel), list(spec.stride), list(spec.padding)),
            *(epsilon, norm, own),
        )
        for spec, epsilon, norm, own in zip(specs, eps, normalized, batch, strict=True)
    ]


def block_ends(layers: Sequence[Layer | ConvSpec]) -> list[int]:
    """The residual sums that are all that later layers read of what was before, last to first."""
    ends, nearest = [], len(layers)
    for i, layer in reversed(list(enumerate(layers))):
        if layer.residual >= 0 and nearest > i:
            ends.append(i)
        nearest = min(nearest, layer.source, layer.residual if layer.residual >= 0 else nearest)
    return ends


def counts(layers: list[Layer], shape: torch.Size) -> list[int]:
    """Values per channel of each layer's output, for an input of ``shape``."""
    sizes = [tuple(shape[2:])]
    for layer in layers:
        sides = zip(sizes[layer.source], layer.padding, layer.kernel, layer.stride, strict=True)
        sizes.append(tuple(conv_size(*side) for side in sides))
    return [shape[0] * h * w for h, w in sizes[1:]]


def dense(t: Tensor) -> Tensor:
    """``t`` in channels_last, a copy only if need be."""
    return t.contiguous(memory_format=torch.channels_last)


def unpacked(t: Tensor | None) -> Any:
    """A saved tensor in the layout it was saved in: saved-tensor hooks may have changed it."""
    return t if t is None else dense(t) if t.dim() == 4 else t.contiguous()
