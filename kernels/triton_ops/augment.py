"""augment on NVIDIA GPUs: a batch from uint8 images in device memory, cropped, mirrored and normalised in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends import launch

from .tiles import cdiv

# 128 threads write eight elements each: three blocks an image of CIFAR, so that 128 images fill a GPU.
WARPS = 4
BLOCK = 1024


@triton.jit
def _mix(z):
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(state, i):
    """The i-th number in [0, 1) of an image: 53 bits, in double as NumPy computes it."""
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)  # the product with i wraps
    return (_mix(state + step * i) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


# Not specialized: the stream is another in every epoch.
@triton.jit(do_not_specialize=["stream"])
def _augment_kernel(
    images,
    index,
    table,
    out,
    stream,
    count,
    height,
    width,
    padding,
    IN_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANDOM: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    image = tl.load(index + n)
    there = (image >= 0) & (image < count)
    # An output element's channel and pixel: channels_last.
    size = CHANNELS * height * width
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = i % CHANNELS
    y = i // CHANNELS // width
    x = i // CHANNELS % width
    if RANDOM:
        state = _mix(stream.to(tl.int64).to(tl.uint64, bitcast=True) + image.to(tl.uint64, bitcast=True))
        shifts = 2 * padding + 1
        if FLIP:
            x = tl.where(_uniform(state, 3) < 0.5, width - 1 - x, x)
        y += (_uniform(state, 1) * shifts).to(tl.int32) - padding
        x += (_uniform(state, 2) * shifts).to(tl.int32) - padding
    inside = there & (i < size) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    plane = k if IN_CHANNELS > 1 else 0
    source = images + image * (IN_CHANNELS * height * width)
    pixel = tl.load(source + (plane * height + y) * width + x, inside, 0)
    tl.store(out + n * size + i, tl.load(table + k * 256 + pixel.to(tl.int32)), i < size)


def geometry(batch: int, size: int) -> tuple[int, int]:
    """The grid: images, and blocks of an image of ``size`` elements."""
    return batch, cdiv(size, BLOCK)


def augment(images: Tensor, index: Tensor, table: Tensor, stream: int | None, padding: int, flip: bool) -> Tensor:
    """``y[n, k, h, w] = table[k, pixel]``: see :func:`resnet_fast.ops.augment.augment`.

    Arguments are checked. Indices cannot be, without waiting for the device: one out of range gives zeros.
    """
    (count, channels, height, width), outputs = images.shape, table.shape[0]
    out = torch.empty(
        (len(index), outputs, height, width),
        dtype=table.dtype,
        device=table.device,
        memory_format=torch.channels_last,
    )
    grid = geometry(len(index), outputs * height * width)
    args = (images, index, table, out, stream or 0, count, height, width, padding)
    meta = {"IN_CHANNELS": channels, "CHANNELS": outputs, "RANDOM": stream is not None, "FLIP": flip, "BLOCK": BLOCK}
    launch.launch(_augment_kernel, grid, args, **meta, num_warps=WARPS)
    return out
