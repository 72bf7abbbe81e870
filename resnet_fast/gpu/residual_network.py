"""Chains of narrow residual stages on CUDA devices, one launch a stage: their kernels, filters and launches.

A stage of narrow blocks runs as one launch (``kernels/csrc/cuda/stage/residual_stage.cuh``). Its activations stay in
shared memory: only the images, the filters, and the last activation or the scores pass through device memory. A chain
that :mod:`resnet_fast.chain` recorded is cut into such stages here; if that is not possible, it runs layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..backends import launch
from ..ops.chain import cuda_unpack
from ..ops.spec import RELU, ConvSpec, decode, empty_image

__all__ = ["Stage", "kernels", "pack", "residual_network", "runs", "stages"]

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
ENTRIES: Final = ("stem", "map", "strided")
# Of an A100, for which the simulator's code is compiled.
_SIMULATED_MULTIPROCESSORS: Final = 108


class Kernel(NamedTuple):
    """A kernel as the extension lists it; images, threads and bytes of shared memory are per block."""

    entry: str
    itemsize: int  # of a channel
    channels: int
    size: int
    images: int
    threads: int
    shared: int

    def dtypes(self) -> list[torch.dtype]:
        return [dtype for dtype in DTYPES if dtype.itemsize == self.itemsize]

    def name(self, dtype: torch.dtype) -> str:
        suffix = str(dtype).removeprefix("torch.")
        return f"residual_stage_{self.entry}_{self.channels}x{self.size}x{self.size}_{self.images}_{suffix}"


@dataclass(frozen=True)
class Stage:
    """Residual blocks that one launch runs; ``layers``: indices in the chain, in the order that the kernel takes."""

    entry: str
    channels: int
    size: int
    layers: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return (len(self.layers) - (self.entry != "map")) // 2

    def weights(self) -> list[tuple[int, int, int, int]]:
        """[K, R, S, C] of each layer."""
        c = self.channels
        shapes = [(c, 3, 3, c)] * len(self.layers)
        if self.entry == "stem":
            shapes[0] = (c, 3, 3, 3)
        if self.entry == "strided":
            shapes[:2] = [(c, 1, 1, c // 2), (c, 3, 3, c // 2)]
        return shapes

    def floats(self, dtype: torch.dtype) -> int:
        """Length of its packed filters in floats. The stem's taps are padded to 3 columns x 4 rows x 4 channels."""
        return sum(_filter_floats(shape, dtype) + 2 * shape[0] for shape in self.weights())

    def kernels(self, dtype: torch.dtype) -> list[int]:
        """The numbers of its kernels, in the order of images a block."""
        wanted = (self.entry, dtype.itemsize, self.channels, self.size)
        return [i for i, k in enumerate(kernels()) if k[:4] == wanted]


class Section(NamedTuple):
    """A layer in packed filters: its weight's [K, R, S, C], then where its filters begin, and how many floats they
    have; scale and shift follow."""

    layer: int
    shape: tuple[int, int, int, int]
    begin: int
    floats: int


@cache
def kernels() -> tuple[Kernel, ...]:
    """The extension's kernels, by number; none if it was built without CUDA."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "resnet_fast::residual_stage_kernels", "CompositeExplicitAutograd"
    ):
        return ()
    rows = torch.ops.resnet_fast.residual_stage_kernels()
    return tuple(Kernel(ENTRIES[rows[i]], *rows[i + 1 : i + 7]) for i in range(0, len(rows), 7))


def stages(layers: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> tuple[Stage, ...] | None:
    """The encoded chain ``layers`` on images of ``shape`` = (channels, height, width), cut into stages that have
    kernels; None if that is not possible."""
    return _stages(tuple(layers), tuple(shape), dtype)


def _conv3x3(source: int, residual: int, channels: int, stride: int = 1) -> ConvSpec:
    return ConvSpec(source, residual, RELU, channels, (3, 3), (stride, stride), (1, 1))


@lru_cache(maxsize=64)
def _stages(layers: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Stage, ...] | None:
    if dtype not in DTYPES or shape[1] != shape[2]:
        return None
    rows = decode(layers)
    found: list[Stage] = []
    at, channels, size = 0, shape[0], shape[1]  # of the value computed before layer `at`
    entry: str | None = None
    taken: list[int] = []

    def close() -> None:
        if entry is not None:
            found.append(Stage(entry, channels, size, tuple(taken)))

    while at < len(rows):
        out = rows[at].out_channels
        if at == 0 and channels == 3 and rows[0] == _conv3x3(0, -1, out):
            entry, channels, taken, at = "stem", out, [0], 1
            continue
        if rows[at : at + 2] == [_conv3x3(at, -1, out), _conv3x3(at + 1, at, out)] and out == channels:
            entry = entry or "map"
            taken += [at, at + 1]
            at += 2
        elif (
            rows[at : at + 3]
            == [
                _conv3x3(at, -1, out, stride=2),
                ConvSpec(at, -1, 0, out, (1, 1), (2, 2), (0, 0)),
                _conv3x3(at + 1, at + 2, out),
            ]
            and out == 2 * channels
            and size % 2 == 0
        ):
            close()
            entry, channels, size, taken = "strided", out, size // 2, [at + 1, at, at + 2]
            at += 3
        else:
            return None
    close()
    return tuple(found) if all(s.blocks > 0 and s.kernels(dtype) for s in found) else None


def has_head(found: Sequence[Stage]) -> bool:
    """Whether the last kernel can go on through average pooling and a linear layer."""
    return found[-1].size == 8


def runs(found: Sequence[Stage], dtype: torch.dtype) -> bool:
    """Whether the device has the kernels of these stages, and TF32 is allowed if they need it."""
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return False
    return all(launch.has_cuda(kernels()[i].name(dtype)) for stage in found for i in stage.kernels(dtype))


def _choose(stage: Stage, dtype: torch.dtype, images: int, multiprocessors: int) -> int:
    """Number of the kernel with the fewest images a block that still needs at most one block a multiprocessor.

    The images of a block share its reads of the filters, which pays only once every multiprocessor has a block.
    """
    numbers = stage.kernels(dtype)
    return next((i for i in numbers if images <= kernels()[i].images * multiprocessors), numbers[-1])


def _filter_floats(shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    k, r, s, c = shape
    return k * (48 if c == 3 else r * s * c) * dtype.itemsize // 4


def sections(found: Sequence[Stage], dtype: torch.dtype) -> list[Section]:
    """The layers in the order of :func:`pack`."""
    listed, begin = [], 0
    for stage in found:
        for layer, shape in zip(stage.layers, stage.weights(), strict=True):
            listed.append(Section(layer, shape, begin, _filter_floats(shape, dtype)))
            begin += listed[-1].floats + 2 * shape[0]
    return listed


def arranged(weight: Tensor) -> Tensor:
    """A view of [K, R, S, C] in the order of kernels; a stem's is padded to [K, 4, 3, 4]."""
    return _stem_fragments(weight) if weight.shape[3] == 4 else _fragments(weight)


def _fragments(weight: Tensor) -> Tensor:
    """[K, R, S, C] in the order of mma fragments.

    From the outermost: 32 bytes of input channels, column, row, 16 output channels, lane (output channel mod 8, word of
    16 input bytes), and the lane's four words (8 output channels, 16 input bytes).
    """
    k, r, s, c = weight.shape
    word = 4 // weight.element_size()
    parts = weight.view(k // 16, 2, 8, r, s, c // (8 * word), 2, 4, word)
    return parts.permute(5, 4, 3, 0, 2, 7, 1, 6, 8)


def _stem_fragments(weight: Tensor) -> Tensor:
    """:func:`_fragments` of a stem's [K, 3, 3, 3], padded to [K, 4, 3, 4]: four rows of taps of four channels.

    In 16 bits a word has two channels of one row: the lane mod 4 gives the row's low bit and the pair of channels, the
    word's index the row's high bit. In float32 the lane mod 4 is the channel, the word's index the row's low bit, and
    each half of the rows is a step of its own.
    """
    k = weight.shape[0]
    parts = weight.view(k // 16, 2, 8, 2, 2, 3, 2, 2)
    if weight.element_size() == 4:
        return parts.permute(5, 3, 0, 2, 6, 7, 1, 4)
    return parts.permute(5, 0, 2, 4, 6, 1, 3, 7)


def _to_tf32(weight: Tensor) -> Tensor:
    """Rounds to TF32's 10 bits of mantissa, ties away from zero, as the kernels round activations."""
    rounded = ((weight.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(weight.isfinite(), rounded, weight)


def pack(
    found: Sequence[Stage],
    filters: Sequence[Tensor],
    dtype: torch.dtype,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """The filters of all stages in one tensor, in the order in which the kernels read them.

    filters: by layer of the chain, as ``pack_conv_bn`` returns them on CUDA devices, for images of ``dtype``. head:
    weight ``[classes, channels]`` and bias of the linear layer at the end.
    """
    pieces: list[Tensor] = []
    for section in sections(found, dtype):
        weight, scale, shift, _ = cuda_unpack(filters[section.layer], section.shape, dtype)
        weight = _to_tf32(weight) if dtype == torch.float32 else weight
        if section.shape[3] == 3:
            weight = torch.nn.functional.pad(weight, (0, 1, 0, 0, 0, 1))
        pieces += [arranged(weight).reshape(-1).view(torch.float32), scale, shift]
    if head is not None:
        weight, bias = head
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        pieces += [weight.to(dtype).reshape(-1).view(torch.float32), bias.float()]
    packed = torch.cat(pieces)
    # Kernels copy 16 bytes at a time.
    return torch.nn.functional.pad(packed, (0, -packed.numel() % 4))


def residual_network(x: Tensor, packed: Tensor, layers: list[int], classes: int = 0) -> Tensor:
    """The operator ``residual_network`` on CUDA devices: one launch a stage. See ``ops.cpp``."""
    if x.dim() != 4:
        raise RuntimeError(f"x has {x.dim()} dimensions, want 4: [batch, channels, height, width]")
    found = stages(layers, x.shape[1:], x.dtype)
    if found is None:
        raise RuntimeError(
            f"layers and x of {tuple(x.shape)}, {x.dtype}, are no chain of stages that have kernels: "
            + ", ".join(k.name(x.dtype) for k in kernels())
        )
    if packed.device != x.device or packed.dtype != torch.float32:
        raise RuntimeError(f"packed is on {packed.device} in {packed.dtype}, want {x.device} and float32")
    if classes < 0 or (classes > 0 and not has_head(found)):
        raise RuntimeError(f"classes is {classes}, want 0{' or more' if has_head(found) else ''}")
    wanted = sum(s.floats(x.dtype) for s in found) + classes * (found[-1].channels * x.element_size() // 4 + 1)
    if packed.numel() != wanted + -wanted % 4:
        raise RuntimeError(f"packed has {packed.numel()} floats, want {wanted + -wanted % 4}")
    multiprocessors = (
        _SIMULATED_MULTIPROCESSORS
        if launch.is_simulated()
        else torch.cuda.get_device_properties(x.device).multi_processor_count
    )
    batch, at = x.shape[0], 0
    for stage in found:
        kernel = kernels()[_choose(stage, x.dtype, batch, multiprocessors)]
        channels_last = stage.entry != "stem" or not x.is_contiguous()
        x = launch.aligned(
            x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        )
        outputs = classes if stage is found[-1] else 0
        y = x.new_empty((batch, outputs)) if outputs else empty_image(x, stage.channels, stage.size, stage.size)
        args = (x, packed[at:], y, batch, stage.blocks, outputs, channels_last)
        grid = (-(-batch // kernel.images),)
        launch.cuda_launch(kernel.name(x.dtype), grid, (kernel.threads,), kernel.shared, args)
        at += stage.floats(x.dtype)
        x = y
    return x


def _launcher(number: int) -> launch.Launcher:
    def start(grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: tuple) -> None:
        x, filters, y, _, blocks, classes, channels_last = args
        torch.ops.resnet_fast.residual_stage_launch(number, x, filters, y, blocks, classes, channels_last)

    return start


def register() -> None:
    """Registers the extension's kernels with the launch seam."""
    for number, kernel in enumerate(kernels()):
        for dtype in kernel.dtypes():
            launch.gpu.register(kernel.name(dtype), _launcher(number))
