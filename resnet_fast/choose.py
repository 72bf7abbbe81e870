"""Which algorithm a convolution on the CPU takes: a model of its cost, checked against measurement.

Costs are in multiply-adds of a direct convolution at full speed. Winograd's F(4x4, 3x3) multiplies 36 times for 16
outputs where direct convolution multiplies 144 times, but transforms its input and output and computes the tiles at the
edges whole. Its filters are four times as large, and where there are few tiles for each, reading them takes longer than
multiplying by them: then they are read as they are, and transformed on the way. The factors were fitted to measured
times (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backends

__all__ = [
    "BF16_DIRECT",
    "BF16_WINOGRAD",
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
BF16_DIRECT = 3
BF16_WINOGRAD = 4
NAMES = ("direct", "winograd F(4x4)", "compact winograd F(4x4)", "bf16 direct", "bf16 winograd F(2x2)")

TILE = 4  # output pixels, in each direction
_POINTS = 36

_MULTIPLY = 1.15  # small matrix products run below the speed of a direct convolution
_TRANSFORM = 10.0  # for each channel of a tile, in and out, and each of its points
# For each point of a filter that is transformed on the way, and for how many tiles it is transformed once: in
# registers, or where these are too few, through memory.
_EXPAND = {"avx512": (2.2, 4), "avx2": (4.4, 32), "baseline": (4.4, 32)}
# Products of bfloat16, in the same unit, half of which they take. Winograd's F(2x2) has 16 points for 4 outputs.
_BF16_TILE = 2
_BF16_POINTS = 16
_BF16_DIRECT = 0.545
_BF16_MULTIPLY = 0.52
_BF16_TRANSFORM = 4.9

_READ = 8.0  # in the time in which an element of a filter arrives, if it does not stay in a core's own cache:
_KEPT_ELEMENTS = 1 << 18


def _read(elements: int) -> float:
    return _READ * elements if elements > _KEPT_ELEMENTS else 0.0


def algorithm(
    channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...], pixels: int, tiles: int
) -> int:
    """The cheapest for a convolution with so many output pixels, or 4 x 4 tiles of them, in the batch."""
    if kernel != (3, 3) or stride != (1, 1) or not backends.cpu.allow_winograd:
        return DIRECT
    pairs = channels * out_channels
    products = _POINTS * tiles * (_MULTIPLY * pairs + _TRANSFORM * (channels + out_channels))
    expand, at_once = _EXPAND[backends.isa()]
    passes = (tiles + at_once - 1) // at_once
    costs = (
        9 * pixels * pairs + _read(9 * pairs),
        products + _read(_POINTS * pairs),
        products + _read(9 * pairs) + _POINTS * passes * expand * pairs,
    )
    return costs.index(min(costs))


def bf16_algorithm(
    channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...], pixels: int, tiles: int
) -> int:
    """The cheaper one in bfloat16, for so many output pixels, or 2 x 2 tiles of them, in the batch."""
    if kernel != (3, 3) or stride != (1, 1) or not backends.cpu.allow_winograd:
        return BF16_DIRECT
    pairs = channels * out_channels
    direct = 9 * pixels * _BF16_DIRECT * pairs + _read(9 * pairs // 2)
    products = _BF16_POINTS * tiles * (_BF16_MULTIPLY * pairs + _BF16_TRANSFORM * (channels + out_channels))
    return BF16_WINOGRAD if products + _read(_BF16_POINTS * pairs // 2) < direct else BF16_DIRECT


def _tiles(batch: int, height: int, width: int, tile: int) -> int:
    return batch * ((height + tile - 1) // tile) * ((width + tile - 1) // tile)


def algorithm_of_filter(weight: torch.Tensor, stride: tuple[int, ...]) -> int:
    """The same for maps of whole tiles in large batches, for graphs that shapes are not known to when they are made."""
    k, c, *kernel = weight.shape
    if weight.dtype == torch.float64:
        return DIRECT
    many = 1 << 20
    if weight.dtype == torch.bfloat16 and backends.bf16_products():
        return bf16_algorithm(c, k, tuple(kernel), stride, many * _BF16_TILE**2, many)
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
        if dtype == torch.bfloat16 and backends.bf16_products():
            tiles = _tiles(batch, height, width, _BF16_TILE)
            chosen.append(bf16_algorithm(c, k, (r, s), (stride_h, stride_w), batch * height * width, tiles))
            continue
        tiles = _tiles(batch, height, width, TILE)
        exact = dtype == torch.float64
        best = algorithm(c, k, (r, s), (stride_h, stride_w), batch * height * width, tiles)
        chosen.append(DIRECT if exact else best)
    return chosen


def training_algorithm(
    weight: torch.Tensor, stride: list[int], x: torch.Tensor, backward: bool = False, padding: Sequence[int] = (0, 0)
) -> int:
    """The cheapest in training, where filters are packed at every step; ``backward`` turns the filter around."""
    if weight.dtype == torch.float64 or backends.kind(x) == "cuda":
        return DIRECT
    k, c, *kernel = weight.shape
    if backward:
        k, c = c, k
    batch, _, height, width = x.shape
    # Data gradients are convolutions by products of bfloat16 where the stride is 1 and all vectors are full.
    turned = set(stride) == {1} and k % 16 == 0 and all(p < size for p, size in zip(padding, kernel, strict=True))
    if x.dtype == torch.bfloat16 and backends.bf16_products() and (turned or not backward):
        out_h, out_w = (height + stride[0] - 1) // stride[0], (width + stride[1] - 1) // stride[1]
        tiles = _tiles(batch, out_h, out_w, _BF16_TILE)
        return bf16_algorithm(c, k, tuple(kernel), tuple(stride), batch * out_h * out_w, tiles)
    tiles = _tiles(batch, height, width, TILE)
    return algorithm(c, k, tuple(kernel), tuple(stride), batch * height * width, tiles)
