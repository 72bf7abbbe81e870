"""Tiles of the 1x1 wgmma convolution for Hopper that can run a layer, ranked by a cost model.

The tiles and the geometry of their launches are those of ``kernels/csrc/cuda/hopper/conv1x1_plan.h``, asked for through
the extension. They have run in a simulator alone: they are candidates of a measurement, never a default.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer
from .cuda import Plan

__all__ = ["Conv1x1Config", "candidates", "computes", "plan", "tiles"]


@dataclass(frozen=True)
class Tile:
    """A row of ``conv1x1_tiles``: a block computes 64 channels for each warpgroup of ``pixels`` pixels.

    blocks: of them on a multiprocessor, as far as registers go.
    """

    pixels: int
    warpgroups: int
    blocks: int


@functools.cache
def tiles() -> tuple[Tile, ...]:
    numbers = torch.ops.resnet_fast.conv1x1_tiles()
    return tuple(Tile(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))


@dataclass(frozen=True)
class Conv1x1Config:
    """Tile ``conv1x1``; split-K over ``splits`` blocks."""

    conv1x1: int
    splits: int = 1

    def __str__(self) -> str:
        t = tiles()[self.conv1x1]
        split = f" split {self.splits}" if self.splits > 1 else ""
        return f"wgmma 1x1 {64 * t.warpgroups}x{t.pixels}{split}"


_CHUNK = 64  # channels of a k step
# Indices in Conv1x1Args of fields that are read here.
_CHUNKS, _STAGES = 11, 14


def computes(layer: Layer) -> bool:
    """Whether the kernels compute such layers, if the sizes fit: 1x1, equal strides, no padding, 16 bits."""
    return (
        layer.role == "conv_bn_relu"
        and layer.dtype in (torch.float16, torch.bfloat16)
        and layer.kernel == (1, 1)
        and layer.stride[0] == layer.stride[1]
        and layer.padding == (0, 0)
        and not layer.is_wide
    )


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, config: Conv1x1Config) -> Plan | None:
    """The launch of a layer, or None if the tile cannot compute it. Operands are aligned to 16 bytes."""
    if not computes(layer):
        return None
    sizes = (layer.batch, layer.height, layer.width, layer.channels, layer.out_channels, layer.stride[0])
    args = [*sizes, int(layer.relu), int(layer.residual), *([0] * 5), config.splits, *([0] * 4)]
    return Plan.of(torch.ops.resnet_fast.conv1x1_plan(config.conv1x1, args))


def estimate(layer: Layer, config: Conv1x1Config, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor, computed: no such kernel has been timed. For ranking only."""
    made, tile = plan(layer, config), tiles()[config.conv1x1]
    assert made is not None
    rows, steps = 64 * tile.warpgroups, -(-made.args[_CHUNKS] // config.splits)
    # 2048 multiply-accumulates and 128 bytes of shared memory a clock; a warpgroup reads each operand once a step.
    multiply = steps * _CHUNK * rows * tile.pixels / 2048
    reads = steps * _CHUNK * 2 * tile.warpgroups * (64 + tile.pixels) / 128
    # Operands that several blocks read arrive at 5600 bytes a clock: Triton's tiles drew 10 TB/s on an H200. Half of it
    # is what residual, results and partial sums may take.
    operands = steps * _CHUNK * 2 * (rows + tile.pixels)
    outputs = rows * tile.pixels * (2 + (2 if layer.residual else 0) + (8 if config.splits > 1 else 0))
    cached = (operands + 2 * outputs) / (5600 / gpu.multiprocessors)
    count = -(-made.blocks * config.splits // gpu.multiprocessors)
    resident = max(1, min(tile.blocks, (gpu.shared + 1024) // (made.shared + 1024)))
    rounds = -(-count // resident)
    # A step waits some 700 clocks for the second-level cache, with the copies of all stages but one under way.
    waits = 700 * steps / max(1, made.args[_STAGES] - 1)
    return max(count * max(multiply, reads, cached), rounds * waits) + 1500 * rounds


_SPLITS = (1, 2, 3, 4, 6, 8, 16)


def candidates(layer: Layer, gpu: Gpu, most: int = 4) -> list[Conv1x1Config]:
    """The configurations worth a measurement on a GPU of capability 9.0, at most ``most``, best expected first."""
    if gpu.family != 90 or not computes(layer):
        return []
    found = []
    for i, tile in enumerate(tiles()):
        if 64 * tile.warpgroups >= 2 * max(64, layer.out_channels):
            continue
        for splits in _SPLITS:
            config = Conv1x1Config(i, splits)
            made = plan(layer, config)
            if made is None or made.shared > gpu.shared:
                continue
            if splits == 1 or made.blocks * splits <= 2 * gpu.multiprocessors:
                found.append(config)
    return sorted(found, key=lambda c: (estimate(layer, c, gpu), c.splits))[:most]
