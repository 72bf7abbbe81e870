"""Products in TF32 on GPUs: operands are rounded to nearest, in every kernel.

The units, and the simulator with them, cut off the bits that TF32 does not have. Of positive numbers each cut makes a
product smaller, 2^-11 on average, and no sum of theirs averages that out; what rounding leaves does.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device
from helpers.support import channels_last

from resnet_fast import ops
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import cuda as cuda_configs
from resnet_fast.gpu.candidates import triton as configs
from resnet_fast.gpu.layer import A100, Layer

# Of 144 products and more, whose errors are spread evenly over half a unit of 2^-10 either way.
LIMIT = 2.0**-13
SHAPE, FILTERS = (2, 16, 6, 5), 16
LAYER = Layer(2, 6, 5, 16, 16, (3, 3), (1, 1), (1, 1), torch.float32, "tf32", False, False)


@pytest.fixture(autouse=True)
def tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


def positive(*shape):
    return torch.rand(shape) + 0.5


def assert_rounded(found, exact):
    """By the mean: it is what cutting off moves, and rounding does not."""
    assert abs(((found.double() - exact) / exact).mean()) <= LIMIT


def role(name):
    return dataclasses.replace(LAYER, role=name)


@pytest.mark.parametrize("channels", [16, 5])
def test_triton_inference(simulated_device, channels):
    x, weight = positive(2, channels, 6, 5), positive(FILTERS, channels, 3, 3)
    with tune.use(configs.default(dataclasses.replace(LAYER, channels=channels), A100)):
        y = ops.conv_bn(x, weight, padding=1)
    assert_rounded(y, F.conv2d(x.double(), weight.double(), padding=1))


def test_cuda_inference():
    x, weight = positive(*SHAPE), positive(FILTERS, 16, 3, 3)
    with cuda_device(), tune.use(cuda_configs.default(LAYER, A100)):
        y = ops.conv_bn(x, weight, padding=1)
    assert_rounded(y, F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("channels", [16, 5])
def test_triton_training_forward(simulated_device, channels):
    x, weight = channels_last(positive(2, channels, 6, 5)), positive(FILTERS, channels, 3, 3)
    with tune.use(configs.default(dataclasses.replace(role("conv_bn_stats"), channels=channels), A100)):
        y, _ = torch.ops.resnet_fast.conv_bn_stats(x, None, False, weight, None, [1, 1], [1, 1], 0, True)
    assert_rounded(y, F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("which", ["data gradient", "weight gradient"])
def test_triton_training_backward(simulated_device, which):
    x, weight, grad = channels_last(positive(*SHAPE)), positive(FILTERS, 16, 3, 3), channels_last(positive(*SHAPE))
    data = which == "data gradient"
    rest = (None, None, x, None, False, weight, [1, 1], [1, 1], 0, data, not data, None, False, [], [])
    with tune.use(configs.default(role(which), A100)):
        dx, dw, _ = torch.ops.resnet_fast.conv_backward(grad, *rest)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, grad.double())
    assert_rounded(*((dx, exact[0]) if data else (dw, exact[1])))
