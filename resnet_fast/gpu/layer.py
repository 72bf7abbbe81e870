"""What the choice of a kernel depends on: a convolution with its epilogue, and the GPU that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import launch

__all__ = ["A100", "Gpu", "Layer", "gpu_of", "layer_of", "precision"]


@dataclass(frozen=True)
class Layer:
    """A convolution with its epilogue: everything the choice of a tile may depend on."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: torch.dtype
    precision: str  # of the products: "tf32" or "ieee" in float32, "ieee" otherwise
    residual: bool
    relu: bool
    role: str = "conv_bn_relu"  # in training: "conv_moments", "data gradient" or "weight gradient"
    folded: bool = False  # whether batch norm's scale may be in the filters, rounded once more with them
    shifted: bool = True  # whether something is added; what is not may be added where the result is read

    @property
    def is_wide(self) -> bool:
        """Whether offsets in a map need 64 bits."""
        return max(self.batch * self.height * self.width * self.channels, self.pixels * self.out_channels) >= 2**31

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Output pixels of the batch: rows of the matrix product."""
        return self.batch * self.out_height * self.out_width

    @property
    def products(self) -> int:
        """Products for each output element: the sum's length."""
        return self.kernel[0] * self.kernel[1] * self.channels


@dataclass(frozen=True)
class Gpu:
    """``arch``: compute capability, 80 for 8.0. ``shared``: bytes of shared memory a block may have."""

    arch: int
    multiprocessors: int
    shared: int

    @property
    def family(self) -> int:
        """The list of tiles: 80 (mma.sync with cp.async), 90 (wgmma), 100 (tcgen05)."""
        # 12.x, like 8.x, has neither warpgroup nor tensor-memory instructions.
        return {9: 90, 10: 100, 11: 100}.get(self.arch // 10, 80)


A100 = Gpu(80, 108, 163 * 1024)


def gpu_of(device: torch.device) -> Gpu:
    """What decides about tiles; an A100 behind the simulator, which executes code for it."""
    if launch.is_simulated():
        return A100
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count, shared)


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def layer_of(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool,
    relu: bool,
    role: str = "conv_bn_relu",
    folded: bool = False,
    shifted: bool = True,
) -> Layer:
    """shape: of the input. kernel: ``[K, R, S]``."""
    batch, channels, height, width = shape
    k, r, s = kernel
    sizes = ((r, s), (stride[0], stride[1]), (padding[0], padding[1]))
    arithmetic = precision(dtype)
    return Layer(*(batch, height, width, channels, k), *sizes, dtype, arithmetic, residual, relu, role, folded, shifted)
