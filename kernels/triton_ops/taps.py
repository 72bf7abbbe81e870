"""Which taps of a filter lie on the image, for each pixel of a tile: one bit a tap, made before the loop over taps.

Filters of more than 32 taps a side have no bits: their coordinates are compared inside the loop.
"""

import triton
import triton.language as tl

# constexpr: a global that kernels read. Bits of an int32.
_MOST: tl.constexpr = tl.constexpr(32)


@triton.jit
def tap_bits(first, limit, TAPS: tl.constexpr, STEP: tl.constexpr = 1):
    """Bit t: whether ``first + STEP * t``, one side of tap t's place, is in ``[0, limit)``."""
    bits = first * 0
    if TAPS <= _MOST:
        for t in tl.static_range(TAPS):
            place = first + STEP * t
            bits |= ((place >= 0) & (place < limit)).to(tl.int32) << t
    return bits


@triton.jit
def tap_is_inside(rows, cols, r, s, top, left, height, width, R: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr = 1):
    """Whether tap (r, s) lies on the image; rows and cols are :func:`tap_bits` of top and height, left and width."""
    if R <= _MOST and S <= _MOST:
        return ((rows >> r) & (cols >> s) & 1) != 0
    else:
        ih = top + STEP * r
        iw = left + STEP * s
        return (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
