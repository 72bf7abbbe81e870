"""Average pooling into the classifier's matrix in CUDA C++: compiled for sm_80, run in the simulator."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import assert_error_rule, channels_last, twins
from ptxsim.sim import GLOBAL_BASE, Fault
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.chain.pooling import flat_average
from resnet_fast.gpu.cuda import avg_pool as cuda_avg_pool

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAME = "avg_pool_flatten_fwd_kernel"


SHAPES = [
    # shape, kernel, stride
    ((3, 512, 7, 7), (2, 2), (2, 2)),  # ResNet32
    ((2, 72, 7, 7), (7, 7), (7, 7)),  # ResNet
    ((2, 64, 8, 5), (8, 5), (8, 5)),
    ((1, 8, 1, 1), (1, 1), (1, 1)),
    ((1, 16, 13, 11), (3, 2), (2, 1)),  # more cells than a block sums at a time
    ((2, 136, 4, 9), (1, 4), (3, 5)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "stride"), SHAPES, ids=str)
def test_values(device, shape, kernel, stride, dtype):
    x = channels_last(torch.randn(shape).to(dtype))
    y = cuda_avg_pool.avg_pool_flatten(x, kernel, stride)
    eager = torch.flatten(F.avg_pool2d(x, kernel, stride), 1)
    assert y.shape == eager.shape
    assert y.is_contiguous()
    exact = torch.flatten(F.avg_pool2d(x.double(), kernel, stride), 1)
    assert_error_rule(y, exact, [eager, torch.flatten(F.avg_pool2d(x.contiguous(), kernel, stride), 1)], "average")
    whole = channels_last(torch.randint(-8, 9, shape).to(dtype))
    sums = torch.flatten(F.avg_pool2d(whole.double(), kernel, stride, divisor_override=1), 1)
    expected = (sums.float() / (kernel[0] * kernel[1])).to(dtype)  # exact sums, one division, one rounding
    assert torch.equal(cuda_avg_pool.avg_pool_flatten(whole, kernel, stride), expected)
    for name, report in device.launches:
        assert name == cuda_avg_pool.kernel_name(dtype)
        assert sum(b["written"] for b in report.buffers.values()) == y.nbytes
        if kernel == (2, 2):  # the last row and column are never read
            assert report.sectors[0] * 32 <= x.nbytes * 36 // 49 + y.nbytes + 32 * shape[0] * shape[1] // 8


def test_nan_and_infinity(device):
    x = channels_last(torch.ones(2, 16, 6, 6).half())
    x[0, 3, 1, 2], x[1, 5, 5, 5], x[1, 6, 0, 0], x[1, 6, 1, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    y, eager = cuda_avg_pool.avg_pool_flatten(x, (2, 2), (2, 2)), torch.flatten(F.avg_pool2d(x, 2), 1)
    assert torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(y.nan_to_num(7), eager.nan_to_num(7))


def test_offsets_beyond_32_bits(device, monkeypatch):
    """The second image begins 4.6e9 bytes on, where nothing lies: the fault names the full address."""
    x, y = torch.zeros(2, 16, 1, 1).half(), torch.zeros(2, 16).half()
    args = cuda_avg_pool.struct.pack("10i", 16, 12000, 12000, 1, 1, 12000, 12000, 1, 1, 1)
    with pytest.raises(Fault) as found:
        device.cuda(cuda_avg_pool.kernel_name(x.dtype), (2,), (256,), 0, (x, y, args))
    assert found.value.kind == "out-of-bounds"
    assert 0 <= found.value.address - GLOBAL_BASE - 12000 * 12000 * 16 * 2 < 2**20


def test_arguments(device):
    with pytest.raises(ValueError, match=r"kernel is \[3, 2\] and stride \[1, 1\] in images of 2 x 2"):
        cuda_avg_pool.avg_pool_flatten(channels_last(torch.zeros(1, 8, 2, 2)), [3, 2], [1, 1])


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d(8),
        nn.AdaptiveAvgPool2d(2),
        nn.MaxPool2d(2),
    ],
    ids=repr,
)
def test_other_poolings_are_left_alone(device, pool):
    assert flat_average(pool, channels_last(torch.randn(1, 16, 7, 7).half())) is None


def test_other_inputs_are_left_alone(device):
    pool, x = nn.AvgPool2d(2), channels_last(torch.randn(2, 16, 6, 6).half())
    assert flat_average(pool, x) is not None
    wide = channels_last(torch.randn(2, 16, 6, 8).half())
    others = (x.contiguous(), wide[..., :6], x[:, :12], x.double(), x[:0], x[0], channels_last(torch.randn(2, 3, 6, 6)))
    for other in others:
        assert flat_average(pool, other) is None
    assert flat_average(pool, x.clone().requires_grad_()) is None
    with backends.use("triton"):
        assert flat_average(pool, x) is None
    pool.register_forward_hook(lambda *_: None)
    assert flat_average(pool, x) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["ResNet32", "ResNet", "CifarResNet"])
def test_networks(device, name, dtype):
    """From the last feature map to the classifier's input in one launch; the same keys as before."""
    options = {"ResNet32": {"image_size": 96}, "ResNet": {"layers": [1] * 4}, "CifarResNet": {"num_blocks": 1}}[name]
    fast, eager = twins(getattr(resnet_fast.models, name), getattr(reference, name), **options)
    channels = 64 if name == "CifarResNet" else 512
    x = channels_last(torch.randn(2, channels, 3, 3).to(dtype))
    with torch.no_grad():
        y = fast.to(dtype).flat(x)
    assert [n for n, _ in device.launches] == [cuda_avg_pool.kernel_name(dtype)]
    exact = copy.deepcopy(eager).flat(x.double())
    assert_error_rule(y, exact, [eager.flat(x), eager.flat(x.contiguous())], name)
    assert fast.flat(x.clone().requires_grad_()).requires_grad
    assert len(device.launches) == 1


def test_without_the_kernel(simulated_device):
    x = channels_last(torch.randn(2, 512, 3, 3).half())
    model = resnet_fast.models.ResNet([1, 1, 1, 1], 7).eval().half()
    assert torch.equal(model.flat(x), torch.flatten(model.avgpool(x), 1))
    assert simulated_device.launches == []
