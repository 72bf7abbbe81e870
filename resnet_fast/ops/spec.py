"""The description of a chain of convolutions: :class:`ConvSpec`, its encoding as integers for operators, its shapes.

Values are numbered: 0 is the chain's input, ``i + 1`` the result of convolution ``i``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DEFERRED",
    "FOLDED",
    "INTEGERS",
    "RELU",
    "ConvSpec",
    "check_values",
    "conv_size",
    "decode",
    "empty_image",
    "encode",
    "shapes",
]

# Bits of ``flags``; CPUs know RELU alone.
RELU: Final = 1  # the convolution ends in a ReLU
FOLDED: Final = 2  # batch norm's scale is folded into the filters
DEFERRED: Final = 4  # the shift is zero here: the layer that reads the result adds it


class ConvSpec(NamedTuple):
    """``value[i + 1] = [relu](batch_norm(conv2d(value[source])) [+ value[residual]])``

    residual: -1 for none. kernel, stride, padding: (height, width).
    """

    source: int
    residual: int
    flags: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def relu(self) -> bool:
        return bool(self.flags & RELU)

    def size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Height and width of the output, from those of the input."""
        (r, s), (stride_h, stride_w), (pad_h, pad_w) = self[4:]
        return conv_size(height, pad_h, r, stride_h), conv_size(width, pad_w, s, stride_w)


# Integers that encode a convolution: the fields of ConvSpec, pairs as two.
INTEGERS: Final = 10


def decode(integers: Sequence[int]) -> list[ConvSpec]:
    """The inverse of :func:`encode`.

    Raises:
        RuntimeError: the length is no multiple of ``INTEGERS``.
    """
    if len(integers) % INTEGERS:
        raise RuntimeError(f"layers has {len(integers)} integers, want {INTEGERS} for each convolution")
    rows = (integers[i : i + INTEGERS] for i in range(0, len(integers), INTEGERS))
    return [
        ConvSpec(source, residual, flags, k, (r, s), (stride_h, stride_w), (pad_h, pad_w))
        for source, residual, flags, k, r, s, stride_h, stride_w, pad_h, pad_w in rows
    ]


def encode(specs: Iterable[ConvSpec]) -> list[int]:
    """A chain as the integers that the operators of ``kernels/csrc/ops.cpp`` take."""
    return [n for spec in specs for n in (*spec[:4], *spec.kernel, *spec.stride, *spec.padding)]


def check_values(name: str, specs: Sequence[ConvSpec]) -> None:
    """Checks that each convolution reads only values computed before it.

    Raises:
        RuntimeError: one does not; the message calls the argument ``name``.
    """
    for i, spec in enumerate(specs):
        if not (0 <= spec.source <= i and -1 <= spec.residual <= i):
            read = f"values {spec.source} and {spec.residual}"
            raise RuntimeError(f"{name} has layer {i} read {read}, want at most {i}")


def shapes(specs: Iterable[ConvSpec], image: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """(channels, height, width) of every value of a chain, those of the input ``image`` first."""
    values = [(image[0], image[1], image[2])]
    for spec in specs:
        values.append((spec.out_channels, *spec.size(*values[spec.source][1:])))
    return values


def conv_size(size: Any, padding: int, kernel: int, stride: int) -> Any:
    """Height or width of the output of a convolution."""
    return (size + 2 * padding - kernel) // stride + 1


def empty_image(x: Tensor, channels: Any, height: Any, width: Any) -> Tensor:
    """An uninitialised channels_last image with the batch, dtype and device of ``x``."""
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
