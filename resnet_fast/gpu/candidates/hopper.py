"""Tiles of the 3x3 wgmma convolution for Hopper that can run a layer, ranked by a cost model.

The tiles and the geometry of their launches are those of ``kernels/csrc/cuda/hopper/conv_halo_plan.h``, asked for
through the extension. They have run in a simulator alone: they are candidates of a measurement, never a default.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer
from .cuda import Plan

__all__ = ["HopperConfig", "candidates", "computes", "instance", "plan", "tiles"]


@dataclass(frozen=True)
class Tile:
    """A row of ``conv_halo_tiles``: a block computes 64 channels for each warpgroup of at most ``positions`` pixels."""

    positions: int
    warpgroups: int
    stages: int


@functools.cache
def tiles() -> tuple[Tile, ...]:
    numbers = torch.ops.resnet_fast.conv_halo_tiles()
    return tuple(Tile(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))


@dataclass(frozen=True)
class HopperConfig:
    """Tile ``halo``; split-K over ``splits`` blocks."""

    halo: int
    splits: int = 1

    def __str__(self) -> str:
        t = tiles()[self.halo]
        split = f" split {self.splits}" if self.splits > 1 else ""
        return f"wgmma halo {64 * t.warpgroups}x{t.positions}{split}"


KERNELS = 6  # of a tile
# Indices in HaloArgs of fields that are read here.
_CHUNK, _CHUNKS = 13, 14


def computes(layer: Layer) -> bool:
    """Whether the kernels compute such layers, if the sizes fit: 3x3, stride 1 or 2, padding 1, 16 bits."""
    return (
        layer.role == "conv_bn_relu"
        and layer.dtype in (torch.float16, torch.bfloat16)
        and layer.kernel == (3, 3)
        and layer.stride in ((1, 1), (2, 2))
        and layer.padding == (1, 1)
        and not layer.is_wide
    )


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, config: HopperConfig) -> Plan | None:
    """The launch of a layer, or None if the tile cannot compute it. Operands are aligned to 16 bytes."""
    if not computes(layer):
        return None
    sizes = (layer.batch, layer.height, layer.width, layer.channels, layer.out_channels, layer.stride[0])
    args = [*sizes, int(layer.relu), *([0] * 9), config.splits, 0, 0]
    numbers = torch.ops.resnet_fast.conv_halo_plan(config.halo, args)
    return Plan.of(numbers)


def instance(layer: Layer, config: HopperConfig) -> int:
    """The kernel's number: six a tile, for strides 1 and 2, and slices of 64, 32 and 16 channels."""
    made = plan(layer, config)
    assert made is not None
    return KERNELS * config.halo + 3 * (layer.stride[0] - 1) + (64, 32, 16).index(made.args[_CHUNK])


def estimate(layer: Layer, config: HopperConfig, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor, computed: no such kernel has been timed. For ranking only."""
    made, tile = plan(layer, config), tiles()[config.halo]
    assert made is not None
    blocks = made.blocks * config.splits
    load = blocks / gpu.multiprocessors
    rounds = math.ceil(load) + 0.1 * load
    chunk, parts = made.args[_CHUNK], -(-made.args[_CHUNKS] // config.splits)
    rows = 64 * tile.warpgroups
    # 2048 multiply-accumulates and 128 bytes of shared memory a clock; a warpgroup reads each operand once a step.
    multiply = 9 * parts * chunk * rows * tile.positions / 2048
    reads = 9 * parts * chunk * 2 * tile.warpgroups * (64 + tile.positions) / 128
    halo = layer.stride[0] ** 2 * tile.positions + 2 * (layer.width + 1)
    fetched = parts * chunk * 2 * (9 * rows + halo)
    sums = 2 * 4 * rows * tile.positions if config.splits > 1 else 0
    outputs = 2 * 2 * rows * tile.positions
    cached = (fetched + sums + outputs) / (2800 / gpu.multiprocessors)
    return rounds * (max(multiply, reads, cached) + 1500)


_SPLITS = (1, 2, 3, 4, 6, 8)


def candidates(layer: Layer, gpu: Gpu, most: int = 4) -> list[HopperConfig]:
    """The configurations worth a measurement on a GPU of capability 9.0, at most ``most``, best expected first."""
    if gpu.family != 90 or not computes(layer):
        return []
    found = []
    for i, tile in enumerate(tiles()):
        if 64 * tile.warpgroups >= 2 * max(64, layer.out_channels):
            continue
        for splits in _SPLITS:
            config = HopperConfig(i, splits)
            made = plan(layer, config)
            if made is None or made.shared > gpu.shared:
                continue
            if splits == 1 or made.blocks * splits <= 2 * gpu.multiprocessors:
                found.append(config)
    return sorted(found, key=lambda c: (estimate(layer, c, gpu), c.splits))[:most]
