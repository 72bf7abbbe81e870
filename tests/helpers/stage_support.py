"""What the tests of the stage kernels share: networks to run, and the simulated device with the extension's kernels."""

import copy
from pathlib import Path

import torch
from helpers.support import EAGER_LAYOUTS, assert_error_rule, unwatched
from torch import nn

from resnet_fast import blocks, reference
from resnet_fast.chain.executor import FusedModule
from resnet_fast.gpu import residual_network

INCLUDE = (f"-I{Path(__file__).parents[2] / 'kernels/csrc'}", "-std=c++20", "--expt-relaxed-constexpr")
SOURCE = '#include "cuda/stage/residual_stage_kernels.cuh"\n'
DTYPES = residual_network.DTYPES


def add_kernels(device):
    """Compiles all stage kernels for the simulated device, as the extension has them."""
    names = [k.name(dtype) for k in residual_network.kernels() for dtype in k.dtypes()]
    device.add_cuda(SOURCE, *names, flags=INCLUDE)


def to_tf32(t):
    """Rounded to the 10 bits of mantissa of TF32: to 11 places of the mantissa's 24 off, by adding and subtracting."""
    high = t * (2**13 + 1)
    return torch.where(t.isfinite(), high - (high - t), t)


def low_precision(model, dtype):
    """A copy of the eager model in ``dtype``; for float32, one whose convolutions multiply TF32, as on a GPU."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules() if dtype == torch.float32 else ():
        if isinstance(module, nn.Conv2d):
            module.weight.data = to_tf32(module.weight.data)
            module.register_forward_pre_hook(lambda module, inputs: (to_tf32(inputs[0]),))
    return model


@unwatched()
def assert_rule(out, eager, x, method="__call__"):
    """The error rule against ``eager``, of the weights that the fast model has."""
    low = low_precision(eager, x.dtype)
    with torch.no_grad():
        exact = getattr(copy.deepcopy(eager).double(), method)(x.double())
        results = [
            getattr(low.to(memory_format=layout), method)(x.contiguous(memory_format=layout))
            for layout in EAGER_LAYOUTS
        ]
    assert_error_rule(out, exact, results)


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


class FastStage(FusedModule, EagerStage):
    block, stage = blocks.BasicBlock, blocks.Stage

    def emit(self, build, x):
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
