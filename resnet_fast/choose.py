"""Which algorithm a convolution on the CPU takes: a model of its cost, checked against measurement.

Costs are in multiply-adds of a direct convolution at full speed. Winograd's F(4x4, 3x3) multiplies 36 times for 16
outputs where direct convolution multiplies 144 times, but transforms its input and output, computes the tiles at the
edges whole, and reads filters four times as large. The factors were fitted to measured times (benchmarks/NOTES.md).
"""

from __future__ import annotations

import torch

from . import backends

__all__ = ["DIRECT", "WINOGRAD", "algorithm_name", "tile_size", "tile_size_of_filter", "tile_sizes"]

DIRECT = 0
WINOGRAD = 4  # output pixels of a tile, in each direction
_POINTS = (WINOGRAD + 2) ** 2

_MULTIPLY = 1.15  # small matrix products run below the speed of a direct convolution
_TRANSFORM = 10.0  # for each channel of a tile, in and out, and each of its points
_READ = 2.0  # multiply-adds in the time in which a byte of a filter arrives


def tile_size(
    channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...], pixels: int, tiles: int
) -> int:
    """``WINOGRAD`` or ``DIRECT`` for a convolution with so many output pixels, or 4 x 4 tiles of them, in the batch."""
    if kernel != (3, 3) or stride != (1, 1) or not backends.cpu.allow_winograd:
        return DIRECT
    pairs = channels * out_channels
    direct = 9 * pairs * (pixels + 4 * _READ)
    winograd = _POINTS * (tiles * (_MULTIPLY * pairs + _TRANSFORM * (channels + out_channels)) + 4 * _READ * pairs)
    return WINOGRAD if winograd < direct else DIRECT


def tile_size_of_filter(weight: torch.Tensor, stride: tuple[int, ...]) -> int:
    """The same for maps of whole tiles in large batches, for graphs that shapes are not known to when they are made."""
    k, c, *kernel = weight.shape
    if weight.dtype == torch.float64:
        return DIRECT
    many = 1 << 20
    return tile_size(c, k, tuple(kernel), stride, many * WINOGRAD**2, many)


def tile_sizes(layers: list[int], shape: torch.Size, dtype: torch.dtype) -> list[int]:
    """One tile size for each layer of a chain (the integers of ``residual_stage``) on inputs of ``shape``."""
    from .ops import LAYER_FIELDS, conv_size

    batch, *image = shape
    maps = [tuple(image)]
    tiles = []
    for i in range(0, len(layers), LAYER_FIELDS):
        source, _, _, k, r, s, stride_h, stride_w, pad_h, pad_w = layers[i : i + LAYER_FIELDS]
        c, h, w = maps[source]
        height, width = conv_size(h, pad_h, r, stride_h), conv_size(w, pad_w, s, stride_w)
        maps.append((k, height, width))
        count = batch * ((height + WINOGRAD - 1) // WINOGRAD) * ((width + WINOGRAD - 1) // WINOGRAD)
        exact = dtype == torch.float64
        tile = tile_size(c, k, (r, s), (stride_h, stride_w), batch * height * width, count)
        tiles.append(DIRECT if exact else tile)
    return tiles


def algorithm_name(tile: int) -> str:
    return "direct" if tile == DIRECT else f"winograd F({tile}x{tile})"
