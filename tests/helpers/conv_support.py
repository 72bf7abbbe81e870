"""What tests of the convolution on simulated GPUs share: random and whole-numbered cases, their layers, exact sums."""

import torch
import torch.nn.functional as F
from helpers.support import Case, channels_last, out_size, pair, unwatched

from resnet_fast import ops
from resnet_fast.gpu.candidates.cuda import CudaConfig, tiles
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.layer import Layer


def random_case(batch, size, channels, filters, kernel, stride, padding, dtype, values=torch.randn):
    """Images, residual and filters in ``dtype``; what goes with a channel in float32."""
    kernel, stride, padding = pair(kernel), pair(stride), pair(padding)
    return Case(
        values(batch, channels, *size).to(dtype),
        values(batch, filters, *out_size(size, kernel, stride, padding)).to(dtype),
        values(filters, channels, *kernel).to(dtype),
        torch.randn(filters),
        (torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters), torch.rand(filters)),
        1e-3,
        stride,
        padding,
    )


def whole(*shape):
    """Integers of one digit: sums of thousands of products are exact in float32, and in any order."""
    return torch.randint(-2, 3, shape).float()


def misaligned(t):
    """A copy in channels_last that does not begin at a multiple of 16 bytes."""
    n, c, h, w = t.shape
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    assert moved.data_ptr() % 16 != 0
    return moved.copy_(t)


def whole_case(*shape):
    return random_case(*shape, whole)


@unwatched()
def exact_sum(case):
    """relu(conv + residual) in float64, rounded once."""
    z = F.conv2d(case.x.double(), case.weight.double(), None, case.stride, case.padding) + case.residual.double()
    return z.relu().to(case.x.dtype)


def plain(case):
    return ops.conv_bn_add_relu(case.x, case.residual, case.weight, stride=case.stride, padding=case.padding)


def assert_exact(case, what=""):
    assert torch.equal(plain(case), exact_sum(case)), what


def layer_of(case, precision="ieee"):
    n, c, h, w = case.x.shape
    k, _, *kernel = case.weight.shape
    return Layer(n, h, w, c, k, tuple(kernel), case.stride, case.padding, case.x.dtype, precision, True, True)


def block_case(batch, size, channels, dtype=torch.float16, values=whole):
    """One convolution of a residual block, in channels_last."""
    case = random_case(batch, (size, size), channels, channels, 3, 1, 1, dtype, values)
    case.x, case.residual = channels_last(case.x), channels_last(case.residual)
    return case


def first_tile(load, channels=None):
    """Of CUDA C++, on tensor cores."""
    return next(i for i, t in enumerate(tiles()) if t.load == load and not t.simt and channels in (None, t.channels))


# Of 128 channels into 32: four blocks share each sum.
SPLIT_SUMS = {"triton": Config(64, 32, 32, 2, 3, split_k=4), "cuda": CudaConfig(first_tile("halo", 32), 128, 4)}
