"""What the tests of the stage kernels share: networks to run, and the simulated device with the extension's kernels."""

from pathlib import Path

import torch
from torch import nn

from resnet_fast import blocks, reference, residual_network
from resnet_fast.chain import Fused

INCLUDE = (f"-I{Path(__file__).parent.parent / 'kernels/csrc/cuda'}", "-std=c++20", "--expt-relaxed-constexpr")
SOURCE = '#include "residual_stage_kernels.cuh"\n'
DTYPES = residual_network.DTYPES


def add_kernels(device):
    """Compiles all stage kernels for the simulated device, as the extension has them."""
    names = [k.name(dtype) for k in residual_network.kernels() for dtype in DTYPES]
    device.add_cuda(SOURCE, *names, flags=INCLUDE)


class EagerStage(nn.Module):
    """Blocks, behind a stem of their width if there is one."""

    block, stage = reference.BasicBlock, nn.Sequential

    def __init__(self, entry, channels, count):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False) if entry == "stem" else None
        self.bn1 = nn.BatchNorm2d(channels) if entry == "stem" else None
        self.relu = nn.ReLU() if entry == "stem" else None
        first = self.block(channels // 2, channels, 2) if entry == "strided" else self.block(channels, channels)
        self.blocks = self.stage(first, *(self.block(channels, channels) for _ in range(count - 1)))

    def forward(self, x):
        return self.blocks(x if self.conv1 is None else self.relu(self.bn1(self.conv1(x))))


class FastStage(Fused, EagerStage):
    block, stage = blocks.BasicBlock, blocks.Stage

    def flow(self, build, x):
        if self.conv1 is not None:
            x = build.conv(self.conv1, self.bn1, x, relu=self.relu)
        return build.block(self.blocks, x)

    def forward(self, x):
        y = self.fused(x)
        return super().forward(x) if y is None else y


def input_of(kernel, batch, dtype, layout=torch.channels_last):
    channels = {"stem": 3, "map": kernel.channels, "strided": kernel.channels // 2}[kernel.entry]
    size = kernel.size * (2 if kernel.entry == "strided" else 1)
    return torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=layout)
