"""What the choice of a kernel depends on: :class:`Layer`, a convolution with its epilogue, and :class:`Gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import launch

__all__ = ["A100", "Gpu", "Layer", "gpu_of", "layer_of", "precision"]


@dataclass(frozen=True)
class Layer:
    """A convolution with its epilogue: all that the choice of a kernel and a tile may depend on."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: torch.dtype
    precision: str  # of the multiplications: "tf32" or "ieee" in float32, "ieee" otherwise
    residual: bool
    relu: bool
    role: str = "conv_bn_relu"  # in training: "conv_bn_stats", "data gradient" or "weight gradient"
    folded: bool = False  # whether batch norm's scale may be folded into the filters, which rounds them once more
    shifted: bool = True  # whether a shift is added here; if not, the layer that reads the result may add it

    @property
    def is_wide(self) -> bool:
        """Whether offsets within an activation need 64 bits."""
        return max(self.batch * self.height * self.width * self.channels, self.pixels * self.out_channels) >= 2**31

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Output pixels of the batch: M of the GEMM."""
        return self.batch * self.out_height * self.out_width

    @property
    def gemm_k(self) -> int:
        """Multiply-accumulates for each output element: K of the GEMM."""
        return self.kernel[0] * self.kernel[1] * self.channels


@dataclass(frozen=True)
class Gpu:
    """``arch``: compute capability, 80 for 8.0. ``shared``: the most bytes of shared memory of a block."""

    arch: int
    multiprocessors: int
    shared: int

    @property
    def family(self) -> int:
        """The list of tiles that applies: 80 (mma.sync with cp.async), 90 (wgmma), 100 (tcgen05)."""
        # 12.x has, like 8.x, neither wgmma nor tcgen05.
        return {9: 90, 10: 100, 11: 100}.get(self.arch // 10, 80)


A100 = Gpu(80, 108, 163 * 1024)


def gpu_of(device: torch.device) -> Gpu:
    """The properties that decide about tiles; an A100's for the simulator, which executes sm_80 code."""
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
    """A :class:`Layer` with the current precision of ``dtype``. shape: of the input. kernel: ``[K, R, S]``."""
    batch, channels, height, width = shape
    k, r, s = kernel
    sizes = ((r, s), (stride[0], stride[1]), (padding[0], padding[1]))
    arithmetic = precision(dtype)
    return Layer(*(batch, height, width, channels, k), *sizes, dtype, arithmetic, residual, relu, role, folded, shifted)
