"""Launch geometry of the kernels on [rows, channels] tensors: pure functions of shapes.

The GPU's size does not enter, so every GPU adds a sum in the same order.
"""

import math
from dataclasses import dataclass

# Four warps with 4096 elements: the 32 of a thread are four 16-byte vectors of fp16 in flight, eight of fp32. An A100
# or H100 streams from memory with about 10 KB in flight on each SM. Such a block has 8 KB a tensor, and its
# accumulators, two floats an element, leave registers for two to four blocks on an SM.
WARPS = 4
TILE = 4096
# Blocks that fill a GPU: two or more on each of its 108 to 148 SMs.
ENOUGH_BLOCKS = 256
# Blocks of a reduction: more would only lengthen its second step, which reads two numbers a block and channel.
MOST_PARTS = 512


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def vector_hint(channels: int) -> int:
    """The power of two, up to 16, that divides the channels: the compiler uses whole vectors by it."""
    return math.gcd(channels, 16)


def channel_block(channels: int, itemsize: int, widest: int) -> int:
    """Channels a block spans: all of a small count, else as wide as wastes at most an eighth of the lanes.

    Never below 64 bytes, two sectors, unless there are fewer channels: two blocks would touch each sector.
    """
    block = min(power_of_2(channels), widest)
    while block * itemsize > 64 and cdiv(channels, block) * block * 8 > channels * 9:
        block //= 2
    return block


@dataclass(frozen=True)
class Reduction:
    """A sum over rows in two steps: over the `rows` rows of each of `parts` blocks, then over the parts."""

    block_m: int
    block_c: int
    rows: int
    parts: int
    grid: tuple[int, int]


def reduction(m: int, channels: int, itemsize: int) -> Reduction:
    """For m >= 1 rows. 64 channels a block, whole 128-byte lines of fp16: wider blocks would leave few rows a tile.

    A part has two tiles at least, so that its partial sums are a small share of the traffic.
    """
    block_c = channel_block(channels, itemsize, 64)
    block_m = max(1, min(TILE // block_c, power_of_2(m)))
    blocks = cdiv(channels, block_c)
    parts = max(1, min(cdiv(m, 2 * block_m), MOST_PARTS // blocks))
    rows = cdiv(cdiv(m, parts), block_m) * block_m
    return Reduction(block_m, block_c, rows, cdiv(m, rows), (cdiv(m, rows), blocks))


@dataclass(frozen=True)
class Tiling:
    """An elementwise pass: block (i, j) does rows i * block_m ... and channels j * block_c ..."""

    block_m: int
    block_c: int
    grid: tuple[int, int]


def tiling(m: int, channels: int, itemsize: int) -> Tiling:
    """For m >= 1 rows. Up to 256 channels a block.

    Small tensors take smaller tiles, down to a fourth, one vector of fp16 a thread, until the GPU has enough blocks.
    """
    block_c = channel_block(channels, itemsize, 256)
    block_m, blocks = max(1, TILE // block_c), cdiv(channels, block_c)
    while block_m * block_c > TILE // 4 and block_m > 1 and cdiv(m, block_m) * blocks < ENOUGH_BLOCKS:
        block_m //= 2
    return Tiling(block_m, block_c, (cdiv(m, block_m), blocks))
