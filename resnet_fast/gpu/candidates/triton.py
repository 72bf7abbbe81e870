"""Tiles of the Triton convolutions for each family of GPUs, ranked by a cost model; candidates for :mod:`..tune`.

The lists are short, because the user's GPU compiles and measures the candidates once for each shape; each entry states
its purpose. The model needs no GPU: it counts clocks of the busiest multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer

__all__ = ["Config", "candidates", "default", "estimate"]


@dataclass(frozen=True)
class Config:
    """A block computes ``block_m`` pixels x ``block_n`` channels in steps of ``block_k`` along K, by ``num_warps``
    warps, with ``num_stages`` slices of the operands in flight; split-K over ``split_k`` blocks."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def __str__(self) -> str:
        split = f" split {self.split_k}" if self.split_k > 1 else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"triton {tile} {self.num_warps} warps {self.num_stages} stages{split}"

    def blocks(self, layer: Layer) -> int:
        """Blocks of one launch."""
        return -(-layer.pixels // self.block_m) * -(-layer.out_channels // self.block_n) * self.split_k

    def steps(self, layer: Layer) -> int:
        """Steps of ``block_k`` along K."""
        return -(-layer.gemm_k // self.block_k)


# (block_m, block_n, num_warps), with the purpose of each. block_k comes from _block_k.
_TILES: dict[int, list[tuple[int, int, int]]] = {
    80: [
        (256, 64, 4),  # 64 x 64 a warp: less than 2 shared-memory wavefronts an mma; layers of 64 channels
        (128, 128, 4),  # the same warp tile, for 128 channels and more
        (128, 64, 4),  # twice the blocks, for few pixels
        (64, 128, 2),  # again 64 x 64 a warp; 7 x 7 images, where a third of 128 rows would be empty
        (64, 64, 2),  # small batches
        (256, 32, 4),  # layers of 32 channels: each filter is read once for many pixels
        (256, 16, 4),  # layers of 16 channels
    ],
    90: [
        (128, 128, 8),  # wide layers: two warpgroups of 64 x 128
        (256, 64, 8),  # layers of 64 channels, many pixels
        (128, 64, 4),  # twice the blocks
        (64, 128, 4),  # 7 x 7 images
        (64, 64, 4),  # small batches: 64 rows are the minimum of a warpgroup
        (128, 32, 4),
        (128, 16, 4),
    ],
    100: [
        (128, 128, 8),  # wide layers: 128 rows fill the tensor memory's lanes
        (256, 64, 8),  # layers of 64 channels, many pixels
        (128, 64, 4),  # twice the blocks
        (64, 128, 4),  # 7 x 7 images
        (64, 64, 4),  # small batches
        (128, 32, 4),
        (128, 16, 4),
    ],
}
# On 8.x operands pass through registers: 32-bit ones leave room for 64 accumulators a thread.
_TF32_TILES = [
    (128, 128, 8),  # wide layers
    (128, 64, 4),  # layers of 64 channels
    (64, 64, 4),  # small batches
    (128, 32, 4),
    (128, 16, 4),
]
# A step over taps and channels together recomputes the offsets of all its elements, which take registers.
_MIXED_TILES = [
    (128, 64, 8),  # stems
    (64, 64, 4),  # small batches
    (128, 32, 4),
    (128, 16, 4),
]
# Exact float32 runs on the FMA units, with 32 accumulators a thread.
_EXACT_TILES = [(64, 64, 4), (128, 32, 4), (128, 16, 4)]
_SPLITS = (2, 3, 4, 6, 8)


def tables() -> str:
    """All lists of tiles as text, to detect that they have changed."""
    return repr([_TILES, _TF32_TILES, _MIXED_TILES, _EXACT_TILES, _TRAINING_TILES, _SPLITS])


def _block_k(layer: Layer, family: int) -> int:
    """``block_k``: whole cache lines if the channels allow it, 64 of 16 bits or 32 of 32 bits.

    On 8.x 32 of 16 bits: the same traffic, and room for another stage. If no such slice divides the channels, the
    kernel steps over taps and channels together, 32 at a time.
    """
    narrow = layer.dtype.itemsize == 2
    most = 16 if not narrow and layer.precision == "ieee" else 64 if narrow and family >= 90 else 32
    return next((k for k in (64, 32, 16) if k <= most and layer.channels % k == 0), min(most, 32))


def _stages(tile: tuple[int, int, int], block_k: int, itemsize: int, shared: int) -> int:
    """Pipeline stages: 4 if two such blocks fit in ``shared`` bytes, else 3 if one block fits, else 2."""
    slice_bytes = (tile[0] + tile[1]) * block_k * itemsize
    return 4 if 4 * slice_bytes <= shared // 2 else 3 if 3 * slice_bytes <= shared else 2


def tiles(layer: Layer, gpu: Gpu) -> Iterator[Config]:
    """All tiles of the list that suit the layer's channels, without split-K."""
    block_k = _block_k(layer, gpu.family)
    if layer.dtype == torch.float32 and layer.precision == "ieee":
        shapes = _EXACT_TILES
    elif layer.channels % block_k != 0:
        shapes = _MIXED_TILES
    elif gpu.family == 80 and layer.dtype == torch.float32:
        shapes = _TF32_TILES
    else:
        shapes = _TILES[gpu.family]
    padded = max(16, 1 << (layer.out_channels - 1).bit_length())
    suitable = [t for t in shapes if t[1] <= padded]
    widest = max(t[1] for t in suitable)
    for tile in suitable:
        # Tiles reread the input for every block_n channels: narrow ones are for narrow layers.
        if tile[1] >= min(widest, 64):
            yield Config(*tile[:2], block_k, tile[2], _stages(tile, block_k, layer.dtype.itemsize, gpu.shared))


def estimate(layer: Layer, config: Config, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor; for ranking only.

    The maximum of: the arithmetic at 1024 16-bit multiply-accumulates a clock; both operands through shared memory at
    128 bytes a clock (written once, read once for each warp that uses them); and all reads of the operands from the
    second-level cache at its share of 2800 bytes a clock. Split-K writes and reads the partial sums once more.
    """
    rounds = -(-config.blocks(layer) // gpu.multiprocessors)
    steps = -(-config.steps(layer) // config.split_k)
    m, n, k = config.block_m, config.block_n, config.block_k
    size = layer.dtype.itemsize
    rate = 1024 * 2 / size if layer.dtype != torch.float32 or layer.precision == "tf32" else 64
    multiply = steps * m * n * k / rate
    warp_m = max(1, min(config.num_warps, m // 64))
    warp_n = max(1, config.num_warps // warp_m)
    operands = (m + n) * k * size
    shared = steps * (operands + (m * warp_n + n * warp_m) * k * size) / 128
    cached = steps * operands / (2800 / gpu.multiprocessors)
    taps_in_l1 = layer.kernel[0] * layer.kernel[1] / 2 if layer.channels % k == 0 else 1
    cached *= (m / max(1.0, taps_in_l1) + n) / (m + n)
    partial = 2 * 4 * m * n / (2800 / gpu.multiprocessors) if config.split_k > 1 else 0
    launch = 2000 if config.split_k > 1 else 0  # a second kernel
    return rounds * (max(multiply, shared, cached) + partial) + launch


def measured_estimate(layer: Layer, config: Config, gpu: Gpu) -> float:
    """:func:`estimate` for 16-bit wgmma on Hopper, with constants fitted to 104 ImageNet layers timed on an H200.

    Of the six configurations that :func:`estimate` ranks first, the better of the two that this ranks first loses 0.03%
    to the fastest on average, and 3.4% at most (0.44% and 12% by the ranking of :func:`estimate`).

    512 multiply-accumulates a clock, a third fewer for tiles of less than 128 channels; operands through shared memory
    at 256 bytes a clock, and from the second-level cache at its share of 4000.
    """
    blocks, count = config.blocks(layer), gpu.multiprocessors
    rounds = (-(-blocks // count) + max(1.0, blocks / count)) / 2  # the last one may be short
    steps = -(-config.steps(layer) // config.split_k)
    m, n, k, size = config.block_m, config.block_n, config.block_k, layer.dtype.itemsize
    multiply = steps * m * n * k / 512 * (1.4 if n < 128 else 1)
    shared = steps * 2 * (m + n) * k * size / 256
    bandwidth = 4000 / count
    taps_in_l1 = layer.kernel[0] * layer.kernel[1] / 2 if layer.channels % k == 0 else 1
    cached = steps * k * size * (m / max(1.0, taps_in_l1) + n) / bandwidth
    ends = m * n * size * (2 if layer.residual else 1) / bandwidth + 500
    split = 2 * 4 * m * n / bandwidth if config.split_k > 1 else 0
    return rounds * (max(multiply, shared, cached) + ends + split) + (6000 if config.split_k > 1 else 0)


# Of the _RANKED that estimate ranks first, so many are measured; on Hopper those that measured_estimate ranks first.
_RANKED, _MEASURED, _MEASURED_ON_HOPPER = 6, 4, 2


def candidates(layer: Layer, gpu: Gpu, most: int = _RANKED) -> list[Config]:
    """The configurations worth a measurement, at most ``most``, best expected first."""
    if layer.role != "conv_bn_relu":
        return training_candidates(layer, gpu)[:most]
    found = []
    for tile in tiles(layer, gpu):
        found.append(tile)
        if tile.blocks(layer) < gpu.multiprocessors:
            splits = [
                s for s in _SPLITS if s <= tile.steps(layer) // 4 and tile.blocks(layer) * s <= 2 * gpu.multiprocessors
            ]
            found += [
                Config(tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, s) for s in splits
            ]
    found = sorted(found, key=lambda c: (estimate(layer, c, gpu), c.blocks(layer)))[:_RANKED]
    if gpu.family != 90 or layer.dtype == torch.float32:
        return found[: min(most, _MEASURED)]
    return sorted(found, key=lambda c: measured_estimate(layer, c, gpu))[: min(most, _MEASURED_ON_HOPPER)]


# Training kernels use more registers: operands are normalised in registers, and dy is computed from two tensors.
# (block_m, block_n, num_warps) as above; the tiles for few blocks are last.
_TRAINING_TILES = [(128, 64, 8), (64, 64, 4), (128, 32, 4), (64, 32, 4), (64, 16, 4)]


def training_candidates(layer: Layer, gpu: Gpu) -> list[Config]:
    """Tiles of the training kernels, which have batch norm in prologue and epilogue.

    For a weight gradient, ``block_m`` are output channels, ``block_n`` input channels of one tap, ``block_k`` pixels,
    and ``split_k`` blocks share the pixels.
    """
    exact = layer.dtype == torch.float32 and layer.precision == "ieee"
    if layer.role == "weight gradient":
        taps = layer.kernel[0] * layer.kernel[1]
        found = []
        for side in (64, 32):
            m, n = (max(16, min(side, 1 << (c - 1).bit_length())) for c in (layer.out_channels, layer.channels))
            blocks = -(-layer.out_channels // m) * -(-layer.channels // n) * taps
            # At least 1024 pixels a block, and at most two rounds of blocks.
            splits = max(1, min(layer.pixels // 1024, 2 * gpu.multiprocessors // blocks))
            found.append(Config(m, n, 16 if exact else 32, 4, 2, splits))
        return list(dict.fromkeys(found))
    columns = layer.channels if layer.role == "data gradient" else layer.out_channels
    reduced = layer.out_channels if layer.role == "data gradient" else layer.channels
    padded = max(16, 1 << (columns - 1).bit_length())
    block_k = next((k for k in (32, 16) if reduced % k == 0), 32)
    suitable = [t for t in _TRAINING_TILES if t[1] <= padded and (not exact or t[0] * t[1] <= 4096)]
    widest = max(t[1] for t in suitable)
    found = [Config(m, n, min(block_k, 16) if exact else block_k, w, 2) for m, n, w in suitable if n == min(widest, 64)]
    return sorted(found, key=lambda c: (estimate(layer, c, gpu), c.blocks(layer)))


def default(layer: Layer, gpu: Gpu) -> Config:
    """The configuration where nothing may be measured: within a CUDA graph's capture, or with tuning switched off."""
    return candidates(layer, gpu, 1)[0]
