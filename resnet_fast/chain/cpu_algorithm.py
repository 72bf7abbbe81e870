"""Which algorithm runs a convolution on the CPU: a cost model, checked against measurement.

Comes in: the sizes of a layer. Goes out: the algorithm's number, as ``pack_conv_bn`` and the kernels take it.

The unit of cost is a multiply-add of a direct convolution at full speed. Winograd's F(4x4, 3x3) multiplies 36 times for
16 outputs where direct convolution multiplies 144 times, but transforms input and output; edge tiles of 3 or 2 outputs
have 5 or 4 points a side instead of 6. Transformed filters are four times as large: with few tiles for each, reading
them takes longer than multiplying by them, so the compact form reads plain filters and transforms them in the kernel.
The factors were fitted to measured times (docs/measurements/cpu-inference.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .. import backends
from ..ops.spec import ConvSpec, shapes

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

# Numbers that pack_conv_bn and the kernels know.
DIRECT = 0
WINOGRAD = 1
COMPACT_WINOGRAD = 2
BF16_DIRECT = 3
BF16_WINOGRAD = 4
NAMES = ("direct", "winograd F(4x4)", "compact winograd F(4x4)", "bf16 direct", "bf16 winograd F(2x2)")

TILE = 4  # output pixels a side
_POINTS = 36

_MULTIPLY = 1.15  # small GEMMs run below the speed of a direct convolution
_TRANSFORM = 10.0  # per channel and point of a tile, input and output together
_TILES_PER_PASS = (32, 64)  # tiles multiplied in one pass over the filters: plain, compact
# Transforming a filter in the kernel, per point and pass.
_EXPAND = {"avx512": 1.5, "avx2": 4.0, "baseline": 4.0}
# A bfloat16 multiply-add costs about half the unit. Winograd's F(2x2) has 16 points for 4 outputs.
_BF16_TILE = 2
_BF16_POINTS = 16
_BF16_DIRECT = 0.545
_BF16_MULTIPLY = 0.52
_BF16_TRANSFORM = 4.9

_READ = 8.0  # loading a filter element from memory, for filters of more elements than a core's own cache holds:
_CACHED_ELEMENTS = 1 << 18
_READ_AGAIN = 2.0  # loading it again in later passes, from the shared cache
# Training transforms filters at every step: per point, into memory, which is then read.
_PACK = 13.0
# F(4x4) errs 2.0 to 2.9 times as much as PyTorch's convolution with 16 to 64 channels, 3.3 times with 8; a convolution
# may err 3 times as much.
_LEAST_CHANNELS = 16
# A whole network may err twice as much as PyTorch. Training stays below that if the batch statistics of small feature
# maps are accurate, where Winograd saves least time: up to this many values the convolution is direct.
_FEW_VALUES = 1 << 16
# With given statistics the gradients of batch norm err most: reductions of Winograd's results over few values.
_FEW_VALUES_GIVEN = 1 << 14


def _read(elements: int, passes: int) -> float:
    """The cost of reading ``elements`` of filters in ``passes``."""
    return (_READ + _READ_AGAIN * (passes - 1)) * elements if elements > _CACHED_ELEMENTS else 0.0


def _side(size: int) -> tuple[int, int]:
    """Tiles along a side of a feature map, and their points along it."""
    whole, rest = divmod(size, TILE)
    return whole + (rest > 0), 6 * whole + (0, 4, 4, 5)[rest]


def algorithm(
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    images: int,
    size: tuple[int, int],
    training: bool = False,
) -> int:
    """The cheapest algorithm in float32 for a convolution with outputs of ``size``."""
    # Feature maps smaller than a tile and few input channels gain too little for the accuracy they lose.
    few = min(size) < TILE or channels < _LEAST_CHANNELS
    if kernel != (3, 3) or stride != (1, 1) or few or not backends.cpu.allow_winograd:
        return DIRECT
    (rows, row_points), (columns, column_points) = _side(size[0]), _side(size[1])
    pairs = channels * out_channels
    points = images * row_points * column_points
    compute = points * (_MULTIPLY * pairs + _TRANSFORM * (channels + out_channels))
    passes, compact_passes = ((images * rows * columns + n - 1) // n for n in _TILES_PER_PASS)
    pack = _POINTS * _PACK * pairs + 2 * _read(_POINTS * pairs, 1) if training else 0.0
    costs = (
        9 * images * size[0] * size[1] * pairs + _read(9 * pairs, 1),
        compute + _read(_POINTS * pairs, passes) + pack,
        compute + _read(9 * pairs, compact_passes) + _POINTS * compact_passes * _EXPAND[backends.isa()] * pairs,
    )
    return costs.index(min(costs))


def bf16_algorithm(
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    images: int,
    size: tuple[int, int],
) -> int:
    """The cheapest algorithm in bfloat16 for a convolution with outputs of ``size``."""
    if kernel != (3, 3) or stride != (1, 1) or not backends.cpu.allow_winograd:
        return BF16_DIRECT
    pairs = channels * out_channels
    rows, columns = ((n + _BF16_TILE - 1) // _BF16_TILE for n in size)
    points = images * rows * columns * _BF16_POINTS
    direct = 9 * images * size[0] * size[1] * _BF16_DIRECT * pairs + _read(9 * pairs // 2, 1)
    winograd = points * (_BF16_MULTIPLY * pairs + _BF16_TRANSFORM * (channels + out_channels))
    return BF16_WINOGRAD if winograd + _read(_BF16_POINTS * pairs // 2, 1) < direct else BF16_DIRECT


def algorithm_of_filter(weight: torch.Tensor, stride: tuple[int, ...]) -> int:
    """The cheapest algorithm for whole tiles in large batches: for graphs that are traced before shapes are known."""
    k, c, *kernel = weight.shape
    if weight.dtype == torch.float64:
        return DIRECT
    if weight.dtype == torch.bfloat16 and backends.bf16_products():
        return bf16_algorithm(c, k, tuple(kernel), stride, 1 << 20, (_BF16_TILE, _BF16_TILE))
    return algorithm(c, k, tuple(kernel), stride, 1 << 20, (TILE, TILE))


def algorithms(specs: Sequence[ConvSpec], shape: torch.Size, dtype: torch.dtype) -> list[int]:
    """The algorithm of each convolution of a chain, for inputs of ``shape``."""
    batch, *image = shape
    if dtype == torch.float64:
        return [DIRECT] * len(specs)
    cheapest = bf16_algorithm if dtype == torch.bfloat16 and backends.bf16_products() else algorithm
    sizes = shapes(specs, image)
    return [
        cheapest(sizes[spec.source][0], spec.out_channels, spec.kernel, spec.stride, batch, (height, width))
        for spec, (_, height, width) in zip(specs, sizes[1:], strict=True)
    ]


def training_algorithm(
    weight: torch.Tensor,
    stride: list[int],
    x: torch.Tensor,
    backward: bool = False,
    needs_x: bool = True,
    given: bool = False,
) -> int:
    """The cheapest algorithm in training, where filters are packed at every step.

    backward: for the gradients, which swap the filter's channels. needs_x: whether the gradient of ``x`` is wanted
    beside that of the filter. given: batch norms take given statistics.
    """
    if weight.dtype == torch.float64 or backends.kind(x) == "cuda":
        return DIRECT
    bf16 = x.dtype == torch.bfloat16 and backends.bf16_products()
    few = 0 if x.dtype != torch.float32 else _FEW_VALUES_GIVEN if given else _FEW_VALUES
    switches = (bf16, few, backends.cpu.allow_winograd)
    return _training_algorithm(weight.shape, tuple(stride), x.shape, backward, needs_x, switches)


@lru_cache(1024)  # asked twice a layer in every step
def _training_algorithm(
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    image: tuple[int, ...],
    backward: bool,
    needs_x: bool,
    switches: tuple[bool, int, bool],
) -> int:
    k, c, *kernel = weight
    if backward:
        k, c = c, k
    batch, _, height, width = image
    bf16, few, _ = switches
    if batch * height * width * max(k, c) <= few:
        return DIRECT
    # The bfloat16 kernel writes the gradient of x in whole vectors: output channels must fill them.
    if bf16 and not (backward and needs_x and k % 16):
        out_h, out_w = (height + stride[0] - 1) // stride[0], (width + stride[1] - 1) // stride[1]
        return bf16_algorithm(c, k, tuple(kernel), stride, batch, (out_h, out_w))
    return algorithm(c, k, tuple(kernel), stride, batch, (height, width), training=True)
