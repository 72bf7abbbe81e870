"""Tiles of the CUDA C++ convolution that can run a layer, ranked by a cost model; candidates for :mod:`..tune`.

The tiles and the geometry of their launches are those of ``kernels/csrc/cuda/conv/conv_plan.h``, asked for through the
extension: there is one copy of them. The model needs no GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer

__all__ = ["CudaConfig", "Plan", "candidates", "default", "estimate", "plan", "tiles"]

_LOADS = ("halo", "gather", "scalar")


@dataclass(frozen=True)
class Tile:
    """A row of ``conv_bn_relu_tiles``; a block computes at most ``pixels``, at the cost of at least ``least``."""

    load: str
    simt: bool  # exact float32 on the FMA units
    pixels: int
    least: int
    channels: int
    threads: int
    row_bytes: int
    warps_m: int
    warps_n: int
    warps_k: int


@functools.cache
def tiles() -> tuple[Tile, ...]:
    fields = 10
    numbers = torch.ops.resnet_fast.conv_bn_relu_tiles()
    rows = [numbers[i : i + fields] for i in range(0, len(numbers), fields)]
    return tuple(Tile(_LOADS[load], bool(simt), *rest) for load, simt, *rest in rows)


@dataclass(frozen=True)
class CudaConfig:
    """A block computes ``tile_pixels`` pixels with tile ``tile``; split-K over ``splits`` blocks."""

    tile: int
    tile_pixels: int
    splits: int = 1

    def __str__(self) -> str:
        t = tiles()[self.tile]
        split = f" split {self.splits}" if self.splits > 1 else ""
        return f"cuda {t.load} {self.tile_pixels}x{t.channels}{' simt' if t.simt else ''}{split}"


@dataclass(frozen=True)
class Plan:
    """A launch: its grid is ``(blocks, splits)``; with the split-K workspace and the kernel's argument struct."""

    blocks: int
    threads: int
    shared: int
    partial_floats: int
    counters: int
    args: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Plan | None:
        """The plan that the extension returned; None if it returned nothing."""
        if not numbers:
            return None
        blocks, threads, shared, partial_floats, counters, *args = numbers
        return cls(blocks, threads, shared, partial_floats, counters, tuple(args))


# Index in ConvArgs of a field that the model reads.
_K_BLOCKS = 18


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, config: CudaConfig, aligned: bool = True, vectors: bool = True) -> Plan | None:
    """The launch of a layer, or None if the tile cannot compute it.

    aligned: input and filters begin at multiples of 16 bytes. vectors: residual and output do, too.
    """
    vectors = vectors and layer.out_channels % (16 // layer.dtype.itemsize) == 0
    args = [
        *(layer.batch, layer.height, layer.width, layer.channels),
        *(layer.out_height, layer.out_width, layer.out_channels),
        *(*layer.kernel, *layer.stride, *layer.padding),
        *(int(layer.relu), int(vectors), 0, config.tile_pixels, 0, 0, config.splits),
    ]
    numbers = torch.ops.resnet_fast.conv_bn_relu_plan(config.tile, args, layer.dtype.itemsize, aligned)
    return Plan.of(numbers)


def estimate(layer: Layer, config: CudaConfig, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor, by the rule of :func:`.triton.estimate`; for ranking only."""
    made, tile = plan(layer, config), tiles()[config.tile]
    assert made is not None
    load = made.blocks * config.splits / gpu.multiprocessors
    rounds = math.ceil(load) + 0.1 * load  # with equal rounds, prefer less work
    k_blocks = -(-made.args[_K_BLOCKS] // config.splits)
    taps = layer.kernel[0] * layer.kernel[1] if tile.load == "halo" else 1
    row = k_blocks * taps * tile.row_bytes  # bytes of a pixel along k
    pixels = max(tile.least, -(-config.tile_pixels // (16 * tile.warps_m)) * 16 * tile.warps_m)
    rate = 64 if tile.simt else 1024 * 2 / layer.dtype.itemsize
    multiply = pixels * tile.channels * row / layer.dtype.itemsize / rate
    # Scalar loads: some 8 instructions an element, on 4 schedulers of 32 lanes.
    if tile.load == "scalar":
        multiply += (pixels + tile.channels) * row / layer.dtype.itemsize * 8 / 128
    reads = (pixels * tile.warps_n + tile.channels * tile.warps_m) * row / 128
    halo = 2 * (layer.width + 1) if tile.load == "halo" else 0
    fetched = (config.tile_pixels + halo) * row / taps + tile.channels * row
    cached = fetched / (2800 / gpu.multiprocessors)
    sums = 4 * pixels * tile.channels
    partial = 2 * sums / (2800 / gpu.multiprocessors) if config.splits > 1 else 0
    start = 1500  # prologue and epilogue: until the first operands arrive, and after the last mma
    return rounds * (max(multiply, reads + fetched / 128, cached) + partial + start)


_SPLITS = (1, 2, 3, 4, 6, 8)
_RUNS = 6


def _configs(layer: Layer, gpu: Gpu, load: str) -> Iterator[CudaConfig]:
    """All configurations that fit a multiprocessor, with tiles not much wider than the layer."""
    simt = layer.dtype == torch.float32 and layer.precision == "ieee"
    fits = [i for i, t in enumerate(tiles()) if t.simt == simt and t.load == load]
    fits = [i for i in fits if plan(layer, CudaConfig(i, min(16, tiles()[i].pixels))) is not None]
    narrowest = min((tiles()[i].channels for i in fits), default=0)
    for i in fits:
        t = tiles()[i]
        if t.channels >= 2 * max(narrowest, layer.out_channels):
            continue
        fewest = -(-layer.pixels // t.pixels)
        for runs in range(fewest, fewest + _RUNS):
            # Distribute the pixels evenly, in multiples of 8: ldmatrix loads 8 rows.
            pixels = min(t.pixels, -(-layer.pixels // (8 * runs)) * 8)
            for splits in _SPLITS:
                config = CudaConfig(i, pixels, splits)
                made = plan(layer, config)
                if made is None or made.shared > gpu.shared:
                    continue
                if splits == 1 or made.blocks * splits <= 2 * gpu.multiprocessors:
                    yield config


def candidates(layer: Layer, gpu: Gpu, most: int = 4) -> list[CudaConfig]:
    """The configurations worth a measurement, at most ``most``, best expected first.

    Halo tiles do not fit where an image is too wide for shared memory; scalar loads are the last resort.
    """
    found = [*_configs(layer, gpu, "halo"), *_configs(layer, gpu, "gather")] or list(_configs(layer, gpu, "scalar"))
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda c: (estimate(layer, c, gpu), c.splits))[:most]


def default(layer: Layer, gpu: Gpu) -> CudaConfig:
    """The configuration where nothing may be measured."""
    return candidates(layer, gpu, 1)[0]
