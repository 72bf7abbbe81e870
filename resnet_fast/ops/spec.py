"""A chain of convolutions, described: :class:`ConvSpec`, its encoding as the operators' integers, and its shapes.

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

# On CUDA devices ``flags`` holds these bits: the convolution ends in a ReLU; its filters hold batch norm's scale; its
# shift is zero, because the layer that reads its result adds it.
RELU: Final = 1
FOLDED: Final = 2
DEFERRED: Final = 4


class ConvSpec(NamedTuple):
    """``value[i + 1] = [relu](batch_norm(conv2d(value[source])) [+ value[residual]])``

    residual: -1 for none. kernel, stride, padding: height and width.
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
        """Height and width of the output for an input of these."""
        (r, s), (stride_h, stride_w), (pad_h, pad_w) = self[4:]
        return conv_size(height, pad_h, r, stride_h), conv_size(width, pad_w, s, stride_w)


# Integers of a convolution: the fields of ConvSpec, pairs as two.
INTEGERS: Final = 10


def decode(integers: Sequence[int]) -> list[ConvSpec]:
    """The chain that :func:`encode` wrote.

    Raises:
        RuntimeError: these are no whole number of convolutions.
    """
    if len(integers) % INTEGERS:
        raise RuntimeError(f"layers has {len(integers)} integers, want {INTEGERS} for each convolution")
    rows = (integers[i : i + INTEGERS] for i in range(0, len(integers), INTEGERS))
    return [
        ConvSpec(source, residual, flags, k, (r, s), (stride_h, stride_w), (pad_h, pad_w))
        for source, residual, flags, k, r, s, stride_h, stride_w, pad_h, pad_w in rows
    ]


def encode(specs: Iterable[ConvSpec]) -> list[int]:
    """The integers by which the operators take a chain, ``kernels/csrc/ops.cpp``."""
    return [n for spec in specs for n in (*spec[:4], *spec.kernel, *spec.stride, *spec.padding)]


def check_values(name: str, specs: Sequence[ConvSpec]) -> None:
    """Whether each convolution reads values that are there before it.

    Raises:
        RuntimeError: one does not; ``name`` is that of the argument.
    """
    for i, spec in enumerate(specs):
        if not (0 <= spec.source <= i and -1 <= spec.residual <= i):
            read = f"values {spec.source} and {spec.residual}"
            raise RuntimeError(f"{name} has layer {i} read {read}, want at most {i}")


def shapes(specs: Iterable[ConvSpec], image: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Channels, height and width of every value of a chain, from those of its input on."""
    found = [(image[0], image[1], image[2])]
    for spec in specs:
        found.append((spec.out_channels, *spec.size(*found[spec.source][1:])))
    return found


def conv_size(size: Any, padding: int, kernel: int, stride: int) -> Any:
    """Height or width of a convolution's output."""
    return (size + 2 * padding - kernel) // stride + 1


def empty_image(x: Tensor, channels: Any, height: Any, width: Any) -> Tensor:
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
