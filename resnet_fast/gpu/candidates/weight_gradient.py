"""Tiles of the weight gradient of 3x3 convolutions for Hopper that can run a layer, ranked by a cost model.

The tiles and the geometry of their launches are those of ``kernels/csrc/cuda/hopper/weight_gradient_plan.h``, asked for
through the extension. They have run in a simulator alone: they are candidates of a measurement, never a default.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer
from .cuda import Plan

__all__ = ["GradientConfig", "candidates", "computes", "plan", "tiles"]


@dataclass(frozen=True)
class Tile:
    """A row of ``weight_gradient_tiles``: output and input channels of a block; a warpgroup issues the products of 16
    ``steps`` positions at once."""

    rows: int
    columns: int
    steps: int
    stages: int

    @property
    def parts(self) -> int:
        """Parts of a tile's positions: a warpgroup each, or one of which the warpgroups share the taps."""
        return 1 if self.rows == 64 else 3

    @property
    def products(self) -> int:
        """Of 64 rows, for the nine taps of 16 positions."""
        return {64: 9, 32: 6, 16: 3}[self.rows]


@functools.cache
def tiles() -> tuple[Tile, ...]:
    numbers = torch.ops.resnet_fast.weight_gradient_tiles()
    return tuple(Tile(*numbers[i : i + 4]) for i in range(0, len(numbers), 4))


@dataclass(frozen=True)
class GradientConfig:
    """Tile ``gradient`` on at least ``positions`` output pixels at a time; ``splits`` blocks share all of them."""

    gradient: int
    positions: int
    splits: int

    def __str__(self) -> str:
        t = tiles()[self.gradient]
        return f"wgmma gradient {t.rows}x{t.columns} of {self.positions} split {self.splits}"


# Indices in GradientArgs of fields that are read here.
_POSITIONS, _TILES, _GROUPS = 9, 14, 16


def computes(layer: Layer) -> bool:
    """Whether the kernels compute such layers, if the sizes fit: 3x3, stride 1 or 2, padding 1, 16 bits."""
    return (
        layer.role == "weight gradient"
        and layer.dtype in (torch.float16, torch.bfloat16)
        and layer.kernel == (3, 3)
        and layer.stride in ((1, 1), (2, 2))
        and layer.padding == (1, 1)
        and not layer.is_wide
    )


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, config: GradientConfig, affine: bool = True, batch_norm: bool = True) -> Plan | None:
    """The launch of a layer, or None if the tile cannot compute it. Operands are aligned to 16 bytes.

    affine: whether x has a scale and a shift to come. batch_norm: whether the gradient is that of batch norm's output.
    """
    if not computes(layer):
        return None
    sizes = (layer.batch, layer.height, layer.width, layer.channels, layer.out_channels, layer.stride[0])
    args = [*sizes, int(affine), int(layer.relu), int(batch_norm), config.positions, config.splits, *([0] * 17)]
    return Plan.of(torch.ops.resnet_fast.weight_gradient_plan(config.gradient, args))


def estimate(layer: Layer, config: GradientConfig, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor, computed: no such kernel has been timed. For ranking only.

    A product of 64 rows takes half a clock a column, and a group of them no less than the 60 of its latency; a vector
    of the prologue 0.4 clocks (50 instructions); reads of the second-level cache its share of 2800 bytes a clock.
    """
    made, tile = plan(layer, config), tiles()[config.gradient]
    assert made is not None
    rounds = math.ceil(made.blocks * config.splits / gpu.multiprocessors)
    positions, groups = made.args[_POSITIONS], made.args[_GROUPS]
    clocks = tile.steps * tile.parts * tile.products * tile.columns / 2
    count = -(-made.args[_TILES] // config.splits)
    bandwidth = 2800 / gpu.multiprocessors
    multiply = groups * max(60, clocks)
    halo = layer.stride[0] ** 2 * positions + 2 * (layer.out_width + 1)
    vectors = tile.rows // 8 * positions, tile.columns // 8 * halo
    cached = 16 * (2 * vectors[0] + vectors[1]) / bandwidth
    partial = 2 * 4 * 9 * tile.rows * tile.columns / bandwidth
    return rounds * (count * (max(multiply + 0.4 * sum(vectors), cached) + 500) + partial + 1500)


_POSITION_COUNTS = (120, 250, 500)


def candidates(layer: Layer, gpu: Gpu, most: int = 3) -> list[GradientConfig]:
    """The configurations worth a measurement on a GPU of capability 9.0, at most ``most``, best expected first."""
    if gpu.family != 90 or not computes(layer):
        return []
    found = []
    for i in range(len(tiles())):
        for positions in _POSITION_COUNTS:
            whole = plan(layer, GradientConfig(i, positions, 1))
            if whole is None or whole.shared > gpu.shared:
                continue
            # One round of blocks, or two where one leaves multiprocessors idle.
            for rounds in (1, 2):
                splits = min(max(1, rounds * gpu.multiprocessors // whole.blocks), whole.args[_TILES])
                found.append(GradientConfig(i, positions, splits))
    found = list(dict.fromkeys(found))
    return sorted(found, key=lambda c: (estimate(layer, c, gpu), c.splits))[:most]
