"""Tiles of the 3x3 wgmma convolutions of training for Hopper that can run a layer, ranked by a cost model.

The tiles and the geometry of their launches are those of ``kernels/csrc/cuda/hopper/training/plan.h``, asked for
through the extension. They have run in a simulator alone: they are candidates of a measurement, never a default.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer
from .cuda import Plan
from .hopper import KERNELS, Tile

__all__ = ["TrainingConfig", "candidates", "computes", "instance", "parts", "plan", "tile_pixels", "tiles"]


@functools.cache
def tiles() -> tuple[Tile, ...]:
    numbers = torch.ops.resnet_fast.conv_halo_training_tiles()
    return tuple(Tile(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))


@dataclass(frozen=True)
class TrainingConfig:
    """Tile ``training``, of the convolution with statistics or of the data gradient."""

    training: int

    def __str__(self) -> str:
        t = tiles()[self.training]
        return f"wgmma training {64 * t.warpgroups}x{t.positions}"


# Indices in HaloArgs of fields that are read here.
_OUT_HEIGHT, _OUT_WIDTH, _LINES, _IMAGES, _CHUNK, _CHUNKS, _CHANNEL_BLOCKS = 7, 8, 10, 11, 13, 14, 15


def computes(layer: Layer) -> bool:
    """Whether the kernels compute such layers, if the sizes fit: 3x3, padding 1, 16 bits, stride 1, or 2 forward."""
    strides = {"conv_bn_stats": ((1, 1), (2, 2)), "data gradient": ((1, 1),)}
    return (
        layer.stride in strides.get(layer.role, ())
        and layer.dtype in (torch.float16, torch.bfloat16)
        and layer.kernel == (3, 3)
        and layer.padding == (1, 1)
        and not layer.is_wide
    )


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, config: TrainingConfig, relu: bool) -> Plan | None:
    """The launch of a layer, or None if the tile cannot compute it. Operands are aligned to 16 bytes.

    relu: forward, whether x has a ReLU to come; backward, whether dx is behind one. The data gradient is the
    convolution of the output's gradient, from ``out_channels`` to ``channels``.
    """
    if not computes(layer):
        return None
    gradient = layer.role == "data gradient"
    channels = (layer.out_channels, layer.channels) if gradient else (layer.channels, layer.out_channels)
    args = [layer.batch, layer.height, layer.width, *channels, layer.stride[0], int(relu), *([0] * 12)]
    return Plan.of(torch.ops.resnet_fast.conv_halo_training_plan(config.training, args, gradient))


def parts(made: Plan) -> int:
    """Tiles of the batch: parts of the partial sums."""
    return made.blocks // made.args[_CHANNEL_BLOCKS]


def tile_pixels(made: Plan) -> int:
    """Pixels of each tile but the last."""
    args = made.args
    lines = args[_IMAGES] * args[_OUT_HEIGHT] if args[_IMAGES] > 1 else args[_LINES]
    return lines * args[_OUT_WIDTH]


def instance(layer: Layer, config: TrainingConfig) -> int:
    """The kernel's number: six a tile, for strides 1 and 2, and slices of 64, 32 and 16 channels."""
    made = plan(layer, config, False)
    assert made is not None
    return KERNELS * config.training + 3 * (layer.stride[0] - 1) + (64, 32, 16).index(made.args[_CHUNK])


def estimate(layer: Layer, config: TrainingConfig, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor, computed: no such kernel has been timed. For ranking only.

    A vector of the halo costs the prologue some 50 instructions, on four schedulers of 32 lanes; blocks that share a
    multiprocessor hide it behind each other's products.
    """
    made, tile = plan(layer, config, False), tiles()[config.training]
    assert made is not None
    chunk, chunks, rows = made.args[_CHUNK], made.args[_CHUNKS], 64 * tile.warpgroups
    together = max(1, min(gpu.shared // made.shared, 2))
    load = made.blocks / gpu.multiprocessors
    rounds = math.ceil(load) + 0.1 * load
    multiply = 9 * chunks * chunk * rows * tile.positions / 2048
    reads = 9 * chunks * chunk * 2 * tile.warpgroups * (64 + tile.positions) / 128
    halo = layer.stride[0] ** 2 * tile.positions + 2 * (layer.out_width + 1)
    images = 2 if layer.role == "data gradient" else 1
    fetched = chunks * chunk * 2 * (9 * rows + images * halo) + 2 * images * rows * tile.positions
    prologue = chunks * chunk / 8 * halo * images * 50 / 128
    exposed = (prologue / chunks + 3 * rows * tile.positions / 128) / together
    return rounds * (max(multiply, reads, prologue, fetched / (2800 / gpu.multiprocessors)) + exposed + 1500 / together)


def candidates(layer: Layer, gpu: Gpu, most: int = 3) -> list[TrainingConfig]:
    """The configurations worth a measurement on a GPU of capability 9.0, at most ``most``, best expected first."""
    if gpu.family != 90 or not computes(layer):
        return []
    columns = layer.channels if layer.role == "data gradient" else layer.out_channels
    found = []
    for i, tile in enumerate(tiles()):
        made = plan(layer, TrainingConfig(i), False)
        if made is not None and made.shared <= gpu.shared and 64 * tile.warpgroups < 2 * max(64, columns):
            found.append(TrainingConfig(i))
    return sorted(found, key=lambda c: estimate(layer, c, gpu))[:most]
