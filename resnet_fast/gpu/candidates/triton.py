"""Which tiles a convolution may run with on which GPU, and which of them a model of its cost expects to be best.

The lists are short, because each entry is compiled and measured once for each shape on the user's GPU; every entry says
why it is there. The model needs no GPU: it counts clocks of the busiest multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layer import Gpu, Layer

__all__ = ["Config", "candidates", "default", "estimate"]


@dataclass(frozen=True)
class Config:
    """A block computes ``block_m`` pixels x ``block_n`` channels, ``block_k`` products at a time, in ``num_warps``
    warps with ``num_stages`` slices of its operands on the way; ``split_k`` blocks share a sum."""

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
        """Slices of ``block_k`` products that a sum has."""
        return -(-layer.products // self.block_k)


# (block_m, block_n, num_warps): why. The products of a step come from _block_k.
_TILES: dict[int, list[tuple[int, int, int]]] = {
    80: [
        (256, 64, 4),  # 64 x 64 for each warp: below 2 wavefronts of shared memory for each mma; 64 channels at once
        (128, 128, 4),  # the same warps, for 128 channels and more
        (128, 64, 4),  # twice the blocks, where pixels are few
        (64, 128, 2),  # again 64 x 64 for each warp; 7 x 7 maps, where 128 rows would be a third empty
        (64, 64, 2),  # small batches
        (256, 32, 4),  # layers of 32 channels: each filter once for many pixels
        (256, 16, 4),  # layers of 16 channels
    ],
    90: [
        (128, 128, 8),  # wide layers: two warpgroups of 64 x 128
        (256, 64, 8),  # 64 channels at once, many pixels
        (128, 64, 4),  # twice the blocks
        (64, 128, 4),  # 7 x 7 maps
        (64, 64, 4),  # small batches: 64 rows are the least a warpgroup takes
        (128, 32, 4),
        (128, 16, 4),
    ],
    100: [
        (128, 128, 8),  # wide layers: 128 rows fill the tensor memory's lanes
        (256, 64, 8),  # 64 channels at once, many pixels
        (128, 64, 4),  # twice the blocks
        (64, 128, 4),  # 7 x 7 maps
        (64, 64, 4),  # small batches
        (128, 32, 4),
        (128, 16, 4),
    ],
}
# On 8.x operands pass through registers: in 32 bits they leave room for 64 sums a thread.
_TF32_TILES = [
    (128, 128, 8),  # wide layers
    (128, 64, 4),  # 64 channels at once
    (64, 64, 4),  # small batches
    (128, 32, 4),
    (128, 16, 4),
]
# Where a step mixes taps and channels, the offsets of all its elements are computed anew and take the registers.
_MIXED_TILES = [
    (128, 64, 8),  # stems
    (64, 64, 4),  # small batches
    (128, 32, 4),
    (128, 16, 4),
]
# Exact float32 runs on the plain units; a thread holds 32 sums.
_EXACT_TILES = [(64, 64, 4), (128, 32, 4), (128, 16, 4)]
_SPLITS = (2, 3, 4, 6, 8)


def tables() -> str:
    """All lists of tiles, as a text that changes with them."""
    return repr([_TILES, _TF32_TILES, _MIXED_TILES, _EXACT_TILES, _TRAINING_TILES, _SPLITS])


def _block_k(layer: Layer, family: int) -> int:
    """Products a step. They come as whole cache lines where the channels allow it: 64 of 16 bits, 32 of 32 bits.

    On 8.x 32 of 16 bits: the same traffic, and room for another stage. Where no such slice divides the channels, the
    kernel mixes taps and channels in steps of 32.
    """
    narrow = layer.dtype.itemsize == 2
    most = 16 if not narrow and layer.precision == "ieee" else 64 if narrow and family >= 90 else 32
    return next((k for k in (64, 32, 16) if k <= most and layer.channels % k == 0), min(most, 32))


def _stages(tile: tuple[int, int, int], block_k: int, itemsize: int, shared: int) -> int:
    """Up to 4, as far as the slices of both operands fit shared memory, with room for two blocks where 3 are enough."""
    slice_bytes = (tile[0] + tile[1]) * block_k * itemsize
    return 4 if 4 * slice_bytes <= shared // 2 else 3 if 3 * slice_bytes <= shared else 2


def tiles(layer: Layer, gpu: Gpu) -> Iterator[Config]:
    """Every tile of the list that suits the layer's channels, with undivided sums."""
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
        # Narrow tiles read the input once for every block_n channels: they are for narrow layers.
        if tile[1] >= min(widest, 64):
            yield Config(*tile[:2], block_k, tile[2], _stages(tile, block_k, layer.dtype.itemsize, gpu.shared))


def estimate(layer: Layer, config: Config, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor; good for ranking alone.

    The larger of: the products at 1024 multiply-adds of 16 bits a clock; both operands through shared memory at 128
    bytes a clock (written once, read once for each warp's share); and all reads of the operands through the
    second-level cache at its share of 2800 bytes a clock. Split sums are written and read once more.
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
    """The same for wgmma on Hopper in 16 bits, with constants fitted to times of 104 layers of ImageNet networks on an
    H200: the fastest of the six configurations that :func:`estimate` likes best is among its first two, but for 0.03%
    of a layer's time on average and 3.4% of one (by the order of :func:`estimate` 0.44% and 12%).

    Products at 512 multiply-adds a clock, a third fewer where a tile has less than 128 channels; operands through
    shared memory at 256 bytes a clock, through the second-level cache at its share of 4000.
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


# Of so many that the model likes best, so many are compiled and measured; on Hopper by a model that knows more.
_LIKED, _MEASURED, _MEASURED_ON_HOPPER = 6, 4, 2


def candidates(layer: Layer, gpu: Gpu, most: int = _LIKED) -> list[Config]:
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
    found = sorted(found, key=lambda c: (estimate(layer, c, gpu), c.blocks(layer)))[:_LIKED]
    if gpu.family != 90 or layer.dtype == torch.float32:
        return found[: min(most, _MEASURED)]
    return sorted(found, key=lambda c: measured_estimate(layer, c, gpu))[: min(most, _MEASURED_ON_HOPPER)]


# Kernels of training hold more registers: operands are normalised on their way, so they pass through them, and a
# gradient is made of two maps. (block_m, block_n, num_warps), as above, for few blocks last.
_TRAINING_TILES = [(128, 64, 8), (64, 64, 4), (128, 32, 4), (64, 32, 4), (64, 16, 4)]


def training_candidates(layer: Layer, gpu: Gpu) -> list[Config]:
    """Tiles of the kernels with batch norm at their ends. Of a weight gradient, ``block_m`` are output channels and
    ``block_n`` input channels of one tap, ``block_k`` pixels, and ``split_k`` blocks share the pixels."""
    exact = layer.dtype == torch.float32 and layer.precision == "ieee"
    if layer.role == "weight gradient":
        taps = layer.kernel[0] * layer.kernel[1]
        found = []
        for side in (64, 32):
            m, n = (max(16, min(side, 1 << (c - 1).bit_length())) for c in (layer.out_channels, layer.channels))
            blocks = -(-layer.out_channels // m) * -(-layer.channels // n) * taps
            # Sums of 1024 pixels at least, and as many blocks as two rounds of the GPU have.
            splits = max(1, min(layer.pixels // 1024, 2 * gpu.multiprocessors // blocks))
            found.append(Config(m, n, 16 if exact else 32, 4, 2, splits))
        return list(dict.fromkeys(found))
    columns = layer.channels if layer.role == "data gradient" else layer.out_channels
    products = layer.out_channels if layer.role == "data gradient" else layer.channels
    padded = max(16, 1 << (columns - 1).bit_length())
    block_k = next((k for k in (32, 16) if products % k == 0), 32)
    suitable = [t for t in _TRAINING_TILES if t[1] <= padded and (not exact or t[0] * t[1] <= 4096)]
    widest = max(t[1] for t in suitable)
    found = [Config(m, n, min(block_k, 16) if exact else block_k, w, 2) for m, n, w in suitable if n == min(widest, 64)]
    return sorted(found, key=lambda c: (estimate(layer, c, gpu), c.blocks(layer)))


def default(layer: Layer, gpu: Gpu) -> Config:
    """What runs where nothing may be measured: inside a CUDA graph's capture, or with tuning switched off."""
    return candidates(layer, gpu, 1)[0]
