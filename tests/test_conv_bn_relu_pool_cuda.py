"""The stem with its pooling in CUDA C++: compiled for sm_80 by nvcc, run in the simulator behind its own launcher."""

import pytest
import torch
import torch.nn.functional as F
from cuda_support import cuda_device
from support import channels_last

from resnet_fast._triton import cuda_stem
from resnet_fast._triton.configs import Layer

stage = torch.ops.resnet_fast.residual_stage
pack = torch.ops.resnet_fast.pack_conv_bn
POOLS = ([2, 2, 2, 2, 0, 0], [3, 3, 2, 2, 1, 1])
TYPES = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """float32 means float32, but where a test asks for TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device():
    with cuda_device() as simulated:
        yield simulated


def layer_of(x, weight, padding, relu, precision="ieee"):
    n, c, h, w = x.shape
    return Layer(n, h, w, c, weight.shape[0], weight.shape[2:], (2, 2), padding, x.dtype, precision, False, relu)


def run(x, weight, scale, shift, padding, relu, pool, precision="ieee", rows=0, tiles=0):
    """The kernel on ``weight`` as PyTorch has it."""
    layer = layer_of(x, weight, padding, relu, precision)
    layer = Layer(**{**layer.__dict__, "kernel": tuple(layer.kernel)})
    size = F.max_pool2d(torch.empty(1, 1, layer.out_height, layer.out_width), pool[:2], pool[2:4], pool[4:]).shape
    y = torch.empty(x.shape[0], weight.shape[0], *size[2:], dtype=x.dtype, memory_format=torch.channels_last)
    plan = cuda_stem.plan
    if rows:
        cuda_stem.plan = lambda *args: plan(*args, rows, tiles)
    try:
        filters = weight.permute(0, 2, 3, 1).contiguous()
        cuda_stem.conv_bn_relu_pool(layer, x, filters, scale, shift, pool, y)
    finally:
        cuda_stem.plan = plan
    return y


def expected_of(x, weight, scale, shift, padding, relu, pool):
    """In float64, rounded once."""
    z = F.conv2d(x.double(), weight.double(), None, 2, padding) * scale.double()[:, None, None]
    z = z + shift.double()[:, None, None]
    return F.max_pool2d(z.relu() if relu else z, pool[:2], pool[2:4], pool[4:]).to(x.dtype)


def whole(*shape):
    """Integers of one digit: sums of hundreds of products are exact in float32, and in any order."""
    return torch.randint(-2, 3, shape).float()


def planes(t):
    return t.contiguous()


def strided(t):
    """Neither format, and no column after the other."""
    return torch.empty(*t.shape[:3], 2 * t.shape[3], dtype=t.dtype)[..., ::2].copy_(t)


def off(t):
    """channels_last, but not from a multiple of 16 bytes on."""
    n, c, h, w = t.shape
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return moved.copy_(t)


SHAPES = [
    # batch, size, filter, padding, filters, layout
    (2, (37, 48), 7, (3, 3), 64, channels_last),
    (1, (46, 40), 7, (3, 3), 64, planes),
    (2, (33, 35), 7, (3, 3), 48, channels_last),  # odd sizes; a part of the filters
    (3, (23, 29), 7, (2, 0), 16, planes),  # rows begin at even elements
    (1, (70, 104), 7, (3, 3), 80, strided),  # two groups of filters
    (2, (31, 24), 3, (1, 1), 32, planes),
    (2, (29, 32), 3, (0, 1), 64, off),
    (1, (7, 260), 7, (3, 3), 16, channels_last),  # more than one patch across
    (2, (16, 8), 3, (1, 0), 16, channels_last),
]


@pytest.mark.parametrize(("dtype", "precision"), TYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_integers(shape, pool, dtype, precision):
    """Every kernel with several shares of a warp: the same bits as float64 rounded once."""
    batch, size, kernel, padding, filters, layout = shape
    x, weight = layout(whole(batch, 3, *size).to(dtype)), whole(filters, 3, kernel, kernel).to(dtype)
    scale, shift = torch.ldexp(torch.tensor([1.0, -1.0])[torch.arange(filters) % 2], torch.tensor(-1)), whole(filters)
    for seed, (relu, rows, tiles) in enumerate([(True, 0, 0), (False, 1, 1), (True, 3, 2)]):
        expected = expected_of(x, weight, scale, shift, padding, relu, pool)
        with cuda_device(seed=seed) as device:
            y = run(x, weight, scale, shift, padding, relu, pool, precision, rows, tiles)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, expected), (rows, tiles, (y != expected).nonzero()[:5])
        ((_, report),) = device.launches
        assert bool(report.mma_flops) is (dtype != torch.float32 or precision == "tf32")
