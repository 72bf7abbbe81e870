"""Packed filters that follow their weights on the device: compares a fingerprint, packs anew where it differs.

    scale = gamma / sqrt(var + eps),  shift = beta + (bias - mean) * scale,  filters[i] = weight[place(i)]

as :mod:`resnet_fast.gpu.packing` and :mod:`resnet_fast.gpu.residual_network` compute them, bit for bit. One launch for
all filters of a chain, ordered by the stream: the host waits for nothing, and tapes and CUDA graphs hold it like any
launch.

Sources are read from the L2 cache: a multiprocessor's own may hold lines from before a write that nothing orders, and a
new fingerprint would name old filters.

A program owns a tile of one packed filter and the fingerprint under which that tile was packed. All programs of a
filter take the same sample, so they decide alike, and none waits for another. Programs of two streams that find a
change at once store the same bytes; one that finds it packed has acquired what the other released.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends import launch

from .tiles import cdiv

__all__ = ["PackedFilter", "places", "refresh_filters", "table", "tiles"]

# A row of the table, in int64 words: four lists with a word for each source (address, sampled halves of words, dtype,
# stride), then the fields below, then sizes and steps of the digits.
_SOURCES = tl.constexpr(16)  # 11 are used; a power of two
_FINGERPRINTS, _FILTERS, _SCALE, _SHIFT, _BIAS, _ELEMENTS, _FLAGS, _EPS, _OTHER_EPS = (
    tl.constexpr(4 * _SOURCES.value + i) for i in range(9)
)
_K, _R, _S, _C, _STRIDE_K, _STRIDE_R, _STRIDE_S, _STRIDE_C = (tl.constexpr(_OTHER_EPS.value + i) for i in range(1, 9))
_DIGITS = tl.constexpr(9)
_SIZES = tl.constexpr(_STRIDE_C.value + 1)
_STEPS = tl.constexpr(_SIZES.value + _DIGITS.value)
_ROW = tl.constexpr(_STEPS.value + _DIGITS.value)
_FOLDED, _DEFERRED, _ROUNDS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
# Where k, r and s begin in the word that names a weight's element; c comes first. Filters have at most 1,024 taps.
_AT_K, _AT_R, _AT_S = tl.constexpr(42), tl.constexpr(31), tl.constexpr(20)

_TILE = tl.constexpr(32768)  # elements of a program: a resnet50 has 725, an H200 holds 528 at once
_BLOCK = tl.constexpr(256)  # an element a thread: more would take registers that comparing does not need
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_KINDS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}  # as _load tells them apart


@triton.jit
def _load(address, kind, offset, mask):
    """Elements of a tensor whose dtype is known at run time only, in float64."""
    half = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask & (kind == 1), 0.0, cache_modifier=".cg")
    brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask & (kind == 2), 0.0, cache_modifier=".cg")
    single = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask & (kind == 3), 0.0, cache_modifier=".cg")
    return tl.where(kind == 1, half.to(tl.float32), tl.where(kind == 2, brain.to(tl.float32), single)).to(tl.float64)


@triton.jit
def _vector(row, number, k, mask, missing):
    """Elements k of source ``number``; ``missing`` where the layer has no such source."""
    kind = tl.load(row + 2 * _SOURCES + number)
    found = _load(tl.load(row + number), kind, k * tl.load(row + 3 * _SOURCES + number), mask)
    return tl.where(kind == 0, missing, found)


@triton.jit
def _scale(row, first: tl.constexpr, eps: tl.constexpr, k, mask):
    """Batch norm's scale; sources from ``first``: bias, gamma, beta, mean, variance."""
    var = _vector(row, first + 4, k, mask, 1.0) + tl.load(row + eps).to(tl.float64, bitcast=True)
    return _vector(row, first + 1, k, mask, 1.0) * (1.0 / tl.sqrt(var))


@triton.jit
def _shift(row, first: tl.constexpr, eps: tl.constexpr, k, mask):
    apart = _vector(row, first, k, mask, 0.0) - _vector(row, first + 3, k, mask, 0.0)
    return (_vector(row, first + 2, k, mask, 0.0) + apart * _scale(row, first, eps, k, mask)).to(tl.float32)


@triton.jit
def _fingerprint(row):
    """A hash of a sample of each source: all of up to 512 bytes, else eight pieces of 64 bytes. Never zero."""
    # In one dimension: in two, Triton would pass the addresses through shared memory, twice a barrier for each source.
    place = tl.arange(0, 256 * _SOURCES)
    source, i = place // 256, place % 256
    address, halves = tl.load(row + source), tl.load(row + _SOURCES + source)
    piece = i // 32
    start = tl.where(piece == 7, halves - 32, halves // 7 * piece // 32 * 32)
    at = tl.where(halves <= 256, i.to(tl.int64), start + i % 32)
    sampled = address.to(tl.pointer_type(tl.int16)) + at
    half = tl.load(sampled, i < halves, 0, cache_modifier=".cg").to(tl.int64) & 0xFFFF
    # Mixed with its place: halves that trade places change the sum.
    mixed = (half | (place + 1).to(tl.int64) << 16) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    return tl.sum(mixed ^ (mixed >> 32), 0) | 1


@triton.jit
def _refresh_filters_kernel(table, tiles, OUT: tl.constexpr):
    tile = tl.load(tiles + tl.program_id(0))
    row, first = table + (tile >> 32) * _ROW, (tile & 0xFFFFFFFF).to(tl.int32)
    found = _fingerprint(row)
    fingerprint = tl.load(row + _FINGERPRINTS).to(tl.pointer_type(tl.int64)) + first // _TILE
    packed_from = tl.atomic_or(fingerprint, 0, sem="acquire")
    if packed_from != found:
        if packed_from != 0:  # 0: the host has just packed it
            _pack(row, first, OUT)
            tl.debug_barrier()  # the block's stores come before the one that releases them
        tl.atomic_xchg(fingerprint, found, sem="release")


@triton.jit
def _pack(row, first, OUT: tl.constexpr):
    """Packs the tile from element ``first``; the first one, scale and shift, too."""
    flags = tl.load(row + _FLAGS)
    if first == 0:
        _pack_vectors(row, flags, OUT)
    elements = tl.load(row + _ELEMENTS).to(tl.int32)
    weight, kind = tl.load(row), tl.load(row + 2 * _SOURCES)
    filters = tl.load(row + _FILTERS).to(tl.pointer_type(OUT))
    for begin in range(first, tl.minimum(first + _TILE, elements), _BLOCK):
        i = begin + tl.arange(0, _BLOCK)
        rest, place = i, tl.zeros([_BLOCK], tl.int64)
        for d in tl.static_range(_DIGITS):
            size = tl.load(row + _SIZES + d).to(tl.int32)
            place += (rest % size) * tl.load(row + _STEPS + d)
            rest = rest // size
        k, r = place >> _AT_K, place >> _AT_R & ((1 << _AT_K - _AT_R) - 1)
        s, c = place >> _AT_S & ((1 << _AT_R - _AT_S) - 1), place & ((1 << _AT_S) - 1)
        mask = (i < elements) & (r < tl.load(row + _R)) & (s < tl.load(row + _S)) & (c < tl.load(row + _C))
        offset = k * tl.load(row + _STRIDE_K) + r * tl.load(row + _STRIDE_R)
        offset += s * tl.load(row + _STRIDE_S) + c * tl.load(row + _STRIDE_C)
        v = _load(weight, kind, offset, mask)
        if flags & _FOLDED != 0:
            v *= _scale(row, 1, _EPS, k, mask).to(tl.float32).to(tl.float64)
        v = v.to(tl.float32)
        if flags & _ROUNDS != 0:  # to TF32, ties away from zero
            bits = v.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
            v = tl.where((bits & 0x7F800000) != 0x7F800000, rounded, v)
        tl.store(filters + i, v.to(OUT), i < elements)


@triton.jit
def _pack_vectors(row, flags, OUT: tl.constexpr):
    channels = tl.load(row + _K).to(tl.int32)
    scales, biases = tl.load(row + _SCALE), tl.load(row + _BIAS)  # null where the layout has none
    for begin in range(0, channels, _BLOCK):
        k = begin + tl.arange(0, _BLOCK)
        mask = k < channels
        scale = tl.where(flags & _FOLDED != 0, 1.0, _scale(row, 1, _EPS, k, mask).to(tl.float32))
        shift = _shift(row, 1, _EPS, k, mask) + _shift(row, 6, _OTHER_EPS, k, mask)
        shift = tl.where(flags & _DEFERRED != 0, 0.0, shift)
        tl.store(scales.to(tl.pointer_type(tl.float32)) + k, scale, mask & (scales != 0))
        tl.store(tl.load(row + _SHIFT).to(tl.pointer_type(tl.float32)) + k, shift, mask)
        tl.store(biases.to(tl.pointer_type(OUT)) + k, shift.to(OUT), mask & (biases != 0))


@dataclass(frozen=True)
class PackedFilter:
    """A packed filter and what it was packed from.

    sources: weight ``[K, C, R, S]``; bias, gamma, beta, mean and variance; the same five of a layer whose shift is
    added here. eps: of both. folded: the weights are multiplied by scale. deferred: another layer adds the shift.
    rounds: float32 is rounded to TF32. filters, scale, shift, bias: views into the packed tensor; bias in its dtype.
    order: a view of :func:`places` in the order of ``filters``; beyond the weight, ``filters`` holds zeros.
    fingerprints: int64, one for each of :func:`tiles`, zeros: the first launch takes what is packed for fresh.
    """

    sources: Sequence[Tensor | None]
    eps: tuple[float, float]
    filters: Tensor
    scale: Tensor | None
    shift: Tensor
    bias: Tensor | None
    order: Tensor
    fingerprints: Tensor
    folded: bool = False
    deferred: bool = False
    rounds: bool = False

    def row(self) -> list[int]:
        sources = [*self.sources, *[None] * (_SOURCES.value - len(self.sources))]
        digits = [*zip(self.order.shape, self.order.stride(), strict=True)][::-1]  # innermost first
        digits += [(1, 0)] * (_DIGITS.value - len(digits))
        weight = self.sources[0]
        assert weight is not None
        strides = [weight.stride(d) for d in (0, 2, 3, 1)]
        flags = self.folded * _FOLDED.value | self.deferred * _DEFERRED.value | self.rounds * _ROUNDS.value
        into = (self.fingerprints, self.filters, self.scale, self.shift, self.bias)
        return [
            *map(_address, sources),
            *(0 if t is None else _span(t) // 2 for t in sources),
            *(0 if t is None else _KINDS[t.dtype] for t in sources),
            *(0 if t is None else t.stride(0) for t in sources),
            *map(_address, into),
            *(self.filters.numel(), flags),
            *(struct.unpack("q", struct.pack("d", e))[0] for e in self.eps),
            *(weight.shape[d] for d in (0, 2, 3, 1)),
            *strides,
            *(size for size, _ in digits),
            *(step for _, step in digits),
        ]

    def reaches(self) -> list[Tensor]:
        """All tensors that the kernel reads or writes for it."""
        tensors = (*self.sources, self.fingerprints, self.filters, self.scale, self.shift, self.bias)
        return [t for t in tensors if t is not None]


def places(k: int, r: int, s: int, c: int, dtype: torch.dtype) -> Tensor:
    """A weight ``[K, R, S, C]`` on "meta" whose strides tell the coordinates of its elements."""
    strides = (1 << _AT_K.value, 1 << _AT_R.value, 1 << _AT_S.value, 1)
    return torch.empty_strided((k, r, s, c), strides, dtype=dtype, device="meta")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _span(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def tiles(elements: int) -> int:
    """How many programs, and fingerprints, a packed filter has."""
    return max(1, cdiv(elements, _TILE.value))  # scale and shift are packed by the first


def table(filters: Sequence[PackedFilter], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of :func:`refresh_filters` and its tiles, one a program."""
    rows = [f.row() for f in filters]
    programs = [i << 32 | t * _TILE.value for i, f in enumerate(filters) for t in range(tiles(f.filters.numel()))]
    return (torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(programs, device=device))


def refresh_filters(table: Tensor, tiles: Tensor, dtype: torch.dtype, reaches: Sequence[Tensor]) -> None:
    """Packs anew those of the table whose sources have changed since the last launch, or the first.

    Args:
        table, tiles: int64 ``[filters, words]`` and ``[programs]``, by :func:`table`.
        dtype: of the packed filters.
        reaches: all tensors at addresses in the table.
    """
    launch.launch(
        _refresh_filters_kernel,
        (tiles.numel(),),
        (table, tiles),
        reaches=reaches,
        OUT=_DTYPES[dtype],
        num_warps=_BLOCK.value // 32,
        enable_fp_fusion=False,  # the bits that the host packs
    )
