"""Which algorithm a convolution on the CPU takes: a model of its cost, checked against measurement.

Costs are in multiply-adds of a direct convolution at full speed. Winograd's F(4x4, 3x3) multiplies 36 times for 16
outputs where direct convolution multiplies 144 times, but transforms its input and output and computes the tiles at the
edges whole. Its filters are four times as large, and where there are few tiles for each, reading them takes longer than
multiplying by them: then they are read as they are, and transformed on the way. The factors were fitted to measured
times (benchmarks/NOTES.md).
"""

from __future__ import annotations

import torch

from . import backends

__all__ = [
    "COMPACT_WINOGRAD",
    "DIRECT",
    "NAMES",
    "WINOGRAD",
    "algorithm",
    "algorithm_of_filter",
    "algorithms",
    "training_algorithm",
]

# As pack_conv_bn numbers them.
DIRECT = 0
WINOGRAD = 1
COMPACT_WINOGRAD = 2
NAMES = ("direct", "winograd F(4x4)", "compact winograd F(4x4)")

TILE = 4  # output pixels, in each direction
_POINTS = 36

_MULTIPLY = 1.15  # small matrix products run below the speed of a direct convolution
_TRANSFORM = 10.0  # for each channel of a tile, in and out, and each of its points
# For each point of a filter that is transformed on the way, and for how many tiles it is transformed once: in
# registers, or where these are too few, through memory.
_EXPAND = {"avx512": (2.2, 4), "avx2": (4.4, 32), "baseline": (4.4, 32)}
_READ = 8.0  # in the time in which an element of a filter arrives, if it does not stay in a core's own cache:
_KEPT_ELEMENTS = 1 << 18
# In training filters are transformed at every step, for each point: once into memory, or compact ones for some tiles.
_PACK, _EXPAND_MANY = 13.0, (5.0, 32)


def _read(elements: int) -> float:
    return _READ * elements if elements > _KEPT_ELEMENTS else 0.0


def algorithm(
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pixels: int,
    tiles: int,
    training: bool = False,
) -> int:
    """The cheapest for a convolution with so many output pixels, or 4 x 4 tiles of them, in the batch."""
    if kernel != (3, 3) or stride != (1, 1) or not backends.cpu.allow_winograd:
        return DIRECT
    pairs = channels * out_channels
    products = _POINTS * tiles * (_MULTIPLY * pairs + _TRANSFORM * (channels + out_channels))
    expand, at_once = _EXPAND_MANY if training else _EXPAND[backends.isa()]
    passes = (tiles + at_once - 1) // at_once
    costs = (
        9 * pixels * pairs + _read(9 * pairs),
        products + (3 if training else 1) * _read(_POINTS * pairs) + (_POINTS * _PACK * pairs if training else 0.0),
        products + _read(9 * pairs) + _POINTS * passes * expand * pairs,
    )
    return costs.index(min(costs))


def algorithm_of_filter(weight: torch.Tensor, stride: tuple[int, ...]) -> int:
    """The same for maps of whole tiles in large batches, for graphs that shapes are not known to when they are made."""
    k, c, *kernel = weight.shape
    if weight.dtype == torch.float64:
        return DIRECT
    many = 1 << 20
    return algorithm(c, k, tuple(kernel), stride, many * TILE**2, many)


def algorithms(layers: list[int], shape: torch.Size, dtype: torch.dtype) -> list[int]:
    """One for each layer of a chain (the integers of ``residual_stage``) on inputs of ``shape``."""
    from .ops import LAYER_FIELDS, conv_size

    batch, *image = shape
    maps = [tuple(image)]
    chosen = []
    for i in range(0, len(layers), LAYER_FIELDS):
        source, _, _, k, r, s, stride_h, stride_w, pad_h, pad_w = layers[i : i + LAYER_FIELDS]
        c, h, w = maps[source]
        height, width = conv_size(h, pad_h, r, stride_h), conv_size(w, pad_w, s, stride_w)
        maps.append((k, height, width))
        tiles = batch * ((height + TILE - 1) // TILE) * ((width + TILE - 1) // TILE)
        exact = dtype == torch.float64
        best = algorithm(c, k, (r, s), (stride_h, stride_w), batch * height * width, tiles)
        chosen.append(DIRECT if exact else best)
    return chosen


def training_algorithm(weight: torch.Tensor, stride: list[int], x: torch.Tensor, backward: bool = False) -> int:
    """The cheapest in training, where filters are packed at every step; ``backward`` turns the filter around."""
    if weight.dtype == torch.float64 or backends.kind(x) == "cuda":
        return DIRECT
    k, c, *kernel = weight.shape
    if backward:
        k, c = c, k
    batch, _, height, width = x.shape
    tiles = batch * ((height + TILE - 1) // TILE) * ((width + TILE - 1) // TILE)
    return algorithm(c, k, tuple(kernel), tuple(stride), batch * height * width, tiles, training=True)
